"""A compile by one process and by two, which share out rollouts and the optimizer step.

    python -m benchmarks.machines.processes    # two processes of one thread, several minutes

Both run the same compile in turn, on random models with the embedded tokenizer, and every process
has one thread: two of them can be twice as fast at best, where a core is free for each. Only the
loop is timed. Their validation scores must agree within 1e-3.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import dspy
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machines.gpu_work import endless, write_model
from benchmarks.speed.measure import commit, machine
from benchmarks.speed.models import WholeAnswer, early_letters, program, questions
from fst_dspy import FST, distributed
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.types import CycleRecord

RESULT = Path(__file__).parent.parent / "results" / "processes.json"
SIZES = {"1 M": (128, 6), "5 M": (256, 6)}  # hidden, layers
SETTINGS: dict[str, Any] = {
    "max_cycles": 1,
    "steps_per_cycle": 3,
    "val_size": 16,
    "max_tokens": 32,
    "first_cycle_iterations": 2,
}
PROMPT_TOKENS = 160
console = Console()


class Stopwatch(SilentProgress):
    """The seconds from the first validation on, when every process has loaded everything."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0

    def cycle_done(self, record: CycleRecord) -> None:
        """Start, or take the time."""
        if record.cycle == 0:
            self.started = time.perf_counter()
        self.ended = time.perf_counter()


def compile_once(folder: Path, out: Path) -> None:
    """What every process does; the first one writes what came of it."""
    lm = endless(folder, torch.device("cpu"))
    examples, watch = questions(lm, 64, PROMPT_TOKENS), Stopwatch()
    fst = FST(early_letters, track_stats=True, progress=watch, **SETTINGS)
    with dspy.context(lm=lm, adapter=WholeAnswer()):
        compiled = fst.compile(program(), trainset=examples[:48], valset=examples[48:])
    records = compiled.detailed_results.records
    if distributed.is_main():
        found = {
            "parameters": sum(w.numel() for w in lm.policy.model.parameters()),
            "seconds": watch.ended - watch.started,
            "rollouts": records[-1].total_rollouts.total,
            "scores": [record.val_score for record in records],
            "kl_to_base": [record.kl_to_base for record in records],
        }
        out.write_text(json.dumps(found))


def run(processes: int, folder: Path, out: Path) -> dict[str, Any]:
    """A compile by so many processes: what it found."""
    launch: list[str] = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [
            *(sys.executable, *launch, "-m", "benchmarks.machines.processes"),
            *("--work", str(folder), "--out", str(out)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{processes} processes failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    processes: Annotated[int, typer.Option(min=2)] = 2,
    work: Annotated[Path | None, typer.Option(hidden=True)] = None,
    out: Path = RESULT,
) -> None:
    """Measure, print a table and write the JSON file."""
    if work is not None:
        compile_once(work, out)
        return
    table = Table("weights", "one process, s", f"{processes} processes, s", "ratio", "scores")
    sizes = []
    with tempfile.TemporaryDirectory() as root, console.status("") as status:
        for name, (hidden, layers) in SIZES.items():
            folder = write_model(Path(root) / f"random-{hidden}", hidden, layers)
            pairs = []
            for repeat in range(repeats):
                status.update(f"{name} weights, {repeat + 1} of {repeats}")
                scratch = Path(root) / "found.json"
                pairs.append([run(count, folder, scratch) for count in (1, processes)])
            ratio = statistics.median(two["seconds"] / one["seconds"] for one, two in pairs)
            difference = max(
                abs(a - b)
                for one, two in pairs
                for a, b in zip(one["scores"], two["scores"], strict=True)
            )
            seconds = [statistics.median(pair[n]["seconds"] for pair in pairs) for n in (0, 1)]
            table.add_row(
                name,
                *(f"{value:.1f}" for value in seconds),
                f"{ratio:.2f}",
                f"within {difference:.1g}",
            )
            sizes.append({"ratio": ratio, "score_difference": difference, "runs": pairs})
    report = {
        "machine": machine(),
        "commit": commit(),
        "command": "python -m benchmarks.machines.processes",
        "processes": processes,
        "settings": SETTINGS,
        "sizes": sizes,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
