"""kill -9 at random instants over a compile: every run must end in the same weights and prompts.

    python benchmarks/machines/kill_nine.py --trials 30

A trial starts a compile of triage on the embedded model in a child process, kills it with SIGKILL
at a random instant, once or several times, and starts it again on the same run folder until it
ends. Full fine-tuning and LoRA take turns. Exits with 1 if any trial ended otherwise than the
uninterrupted run, or left a folder that cannot be resumed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import dspy
import torch
import typer

from fst_dspy import FST, LocalLM
from fst_dspy.loop import folder as run_state
from fst_dspy.tasks import load_task

SETTINGS = {
    "max_cycles": 2,
    "steps_per_cycle": 3,
    "group_size": 4,
    "population_size": 2,
    "problems_per_step": 2,
    "first_cycle_iterations": 2,
    "cycle_iterations": 1,
    "minibatch_size": 4,
    "val_size": 6,
    "max_tokens": 40,
}


def compile_once(folder: Path, lora: bool) -> None:
    """The compile under test; it writes its outcome to ``result.json`` in the folder."""
    torch.set_num_threads(1)
    # Every step, so that kills fall into many checkpoints.
    run_state.RunFolder.is_due = lambda self, closes: True
    task, lm = load_task("triage"), LocalLM("embedded")
    with dspy.context(lm=lm):
        FST(task.metric, seed=0, log_dir=folder, lora=lora, **SETTINGS).compile(
            task.program, trainset=task.trainset, valset=task.valset
        )


def in_child(work: Callable[[], None]) -> int:
    """Run something in a forked process, which shares the imports; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        work()
        code = 0
    finally:
        os._exit(code)


def finish(folder: Path, lora: bool, kill_after: float | None) -> bool:
    """One attempt; whether it ended by itself, and well."""
    pid = in_child(lambda: compile_once(folder, lora))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError(f"the compile failed on {folder}")
    return os.WIFEXITED(status)


def outcome(folder: Path) -> dict[str, object]:
    """What must not depend on kills: final weights, the best pair and the population."""
    result = json.loads((folder / "result.json").read_text())
    names = ("weights_version", "best", "population")
    lines = {p.name: p.read_text().count("\n") for p in sorted(folder.glob("*.jsonl"))}
    return {**{name: result[name] for name in names}, "lines": lines}


def main(
    trials: Annotated[int, typer.Option(help="Runs that are killed.")] = 30,
    seed: Annotated[int, typer.Option(help="Decides the instants.")] = 0,
) -> None:
    """Run the trials and say how they ended."""
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="kill-nine-"))
    expected: dict[bool, dict[str, object]] = {}
    seconds: dict[bool, float] = {}
    for lora in (False, True)[:trials]:
        started = time.monotonic()
        finish(root / f"whole-{lora}", lora, None)
        seconds[lora] = time.monotonic() - started
        expected[lora] = outcome(root / f"whole-{lora}")
    kills = same = 0
    for trial in range(trials):
        lora, folder = bool(trial % 2), root / f"trial-{trial}"
        for _ in range(rng.randint(1, 3)):
            ended = finish(folder, lora, rng.uniform(0.1, 0.8 * seconds[lora]))
            kills += not ended
            if ended:
                break
        finish(folder, lora, None)
        found = outcome(folder)
        same += found == expected[lora]
        odd = [name for name in found if found[name] != expected[lora][name]]
        print(f"trial {trial}: {'differs in ' + ', '.join(odd) if odd else 'same'}", flush=True)
        shutil.rmtree(folder)
    shutil.rmtree(root)
    print(f"{kills} kills over {trials} runs; {same} of {trials} ended as the uninterrupted run")
    sys.exit(same != trials)


if __name__ == "__main__":
    typer.run(main)
