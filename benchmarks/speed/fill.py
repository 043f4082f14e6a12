"""How full generation batches are, with agents that act in environments, in real threads.

64 programs of ``fst_dspy.env``, each in a room of its own whose tool sleeps, for episodes of 4 to
16 turns, on the model in the package, which really generates: 16 tokens a turn. A batch's fill is
its rows over the agents that are alive when it is opened; ``all`` is over the 64 that began. It
takes a minute.

    python -m benchmarks.speed.fill
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import dspy
import typer

import fst_dspy
from benchmarks.speed.measure import commit, machine
from benchmarks.speed.models import WholeAnswer, without_end
from fst_dspy import LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.model.generate import GenerationRequest, GenerationResult, generate
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate

RESULTS = Path(__file__).parent.parent / "results" / "fill.json"
AGENTS, TURNS, TOKENS = 64, (4, 16), 16
TOOLS = (0.0, 0.05, 0.2, 1.0)
"""Mean seconds of a tool, exponentially distributed."""


class Alive:
    """How many agents have not ended yet."""

    def __init__(self, count: int) -> None:
        self._count, self._lock = count, threading.Lock()

    def end(self) -> None:
        with self._lock:
            self._count -= 1

    def __call__(self) -> int:
        return self._count


class Room:
    """A room that is left after so many turns; its tool takes its time.

    Args:
        alive: Told when the episode ends.
        mean: Seconds of the tool.
    """

    def __init__(self, alive: Alive, mean: float) -> None:
        self._alive, self._mean = alive, mean
        self.done, self.reward = False, 0.0

    def reset(self, number: int, turns: int) -> str:
        """Begin in a room."""
        self._left, self._rng = turns, random.Random(number)
        self.done = False
        return f"room {number}"

    def act(self, action: str) -> str:
        """What to do."""
        time.sleep(self._rng.expovariate(1 / self._mean) if self._mean else 0.0)
        self._left -= 1
        self.done = self._left == 0
        return f"{self._left} left"

    def close(self) -> None:
        """Leave."""
        self._alive.end()


def measured(agents: int, turns: tuple[int, int], mean: float, seed: int = 0) -> dict[str, Any]:
    """Play the episodes of some agents; how full the batches were.

    Args:
        agents: At once.
        turns: Fewest and most of an episode.
        mean: Seconds of a tool.
        seed: Of the episodes' lengths.
    """
    alive = Alive(agents + 1)  # one is made and closed to see what its tools are
    lm = without_end(LocalLM("embedded"))
    batches: list[tuple[int, int]] = []
    generating = 0.0

    def counting(policy: Policy, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        nonlocal generating
        began = time.monotonic()
        batches.append((len(requests), alive()))
        results = generate(policy, requests)
        generating += time.monotonic() - began
        return results

    lm.policy.generator = counting
    rng = random.Random(seed)
    examples = [
        dspy.Example(number=n, turns=rng.randint(*turns)).with_inputs("number", "turns")
        for n in range(agents)
    ]
    program = fst_dspy.env(lambda: Room(alive, mean), "observation -> action", max_turns=max(turns))
    with dspy.context(lm=lm, adapter=WholeAnswer()):
        sampling = SamplingConfig(max_tokens=TOKENS, num_threads=agents)
        runner = RolloutRunner(program, fst_dspy.env_reward, lm, sampling, seed)
        candidate = seed_candidate(program)
        began = time.monotonic()
        jobs = [RolloutJob(example, candidate) for example in examples]
        rollouts = runner.run(jobs, channel="slow", salt=0)
        took = time.monotonic() - began
    calls = sum(example.turns for example in examples)
    if any(rollout.failure for rollout in rollouts) or sum(rows for rows, _ in batches) != calls:
        raise RuntimeError("not all agents took their turns")
    return {
        "agents": agents, "turns": turns, "tool": mean, "calls": calls, "batches": len(batches),
        "early": runner.early_batches, "seconds": took, "generating": generating,
        "fill": fmean(rows / live for rows, live in batches),
        "fill_of_calls": sum(rows * rows / live for rows, live in batches) / calls,
        "fill_of_all": fmean(rows / agents for rows, _ in batches),
    }  # fmt: skip


def main(out: Path = RESULTS, seed: int = 0) -> None:
    """Measure with tools of every length and write the figures.

    Args:
        out: JSON file.
        seed: Of the episodes.
    """
    rows = []
    for mean in TOOLS:
        row = measured(AGENTS, TURNS, mean, seed)
        rows.append(row)
        print(
            f"tools of {mean:g} s: {row['batches']} batches ({row['early']} early) of "
            f"{row['calls']} calls in {row['seconds']:.1f} s, {row['generating']:.1f} s of it "
            f"generating; fill {row['fill']:.2f}, by calls {row['fill_of_calls']:.2f}, of all 64 "
            f"{row['fill_of_all']:.2f}",
            flush=True,
        )
    out.write_text(json.dumps({"commit": commit(), "machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
