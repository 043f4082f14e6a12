"""Agents in real threads whose tools take time: the scheduler against continuous batching.

``RolloutRunner`` runs the agents as in a compile: threads, copies of the program, DSPy, the adapter
and the scheduler; a turn is a call of the model and a tool that sleeps. The model is a stand-in
that takes a set time: ``fixed + row * b`` seconds for b rows, slept. The bound is that of
``benchmarks/speed/scheduler.py``: the same agents, tools and costs on a clock of its own, where a
call joins at any token, and where DSPy takes no time. It takes six minutes.

    python -m benchmarks.speed.agents
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dspy
import typer

from benchmarks.speed.measure import commit, machine
from benchmarks.speed.models import WholeAnswer
from benchmarks.speed.scheduler import Turns, Workload, barrier, continuous, scheduled
from fst_dspy import LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.model.generate import GenerationRequest, GenerationResult
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate

RESULTS = Path(__file__).parent.parent / "results" / "agents.json"
AGENTS = (32, 128)
WORKLOADS = ((Workload((10, 30), 1.0, 0.5, 0.01), 1), (Workload((20, 60), 10.0, 0.5, 0.01), 10))
"""Each with how many times shorter its tools and batches are made."""


class Agent(dspy.Module):
    """Turns of a call and a tool, as ``turns`` says for each example."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.act = dspy.Predict("question -> answer")
        self.turns = tuple(tuple(seconds) for seconds in turns)  # shared by all copies

    def forward(self, number: int) -> Any:
        for turn, seconds in enumerate(self.turns[number]):
            found = self.act(question=f"agent {number}, turn {turn}")
            time.sleep(seconds)
        return found


def main(out: Path = RESULTS, seed: int = 0) -> None:
    """Time the agents and write the ratios.

    Args:
        out: JSON file.
        seed: Of the agents' turns and tools.
    """
    rows = []
    for (work, shorter), count in itertools.product(WORKLOADS, AGENTS):
        short = replace(
            work, tool=work.tool / shorter, fixed=work.fixed / shorter, row=work.row / shorter
        )
        turns = short.agents(seed)[:count]
        seconds, early, batches = measured(short, turns)
        bound = continuous(short, turns)
        row = {
            **asdict(work), "agents": count, "shorter": shorter, "seconds": seconds,
            "bound": bound, "ratio": seconds / bound, "batches": batches, "early": early,
            "ratio_of_rule": scheduled(short, turns) / bound,
            "ratio_of_barrier": barrier(short, turns) / bound,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{count:3} agents, {work.turns[0]}-{work.turns[1]} turns, tools of {short.tool:g} s: "
            f"{seconds:.1f} s, bound {bound:.1f} s, ratio {row['ratio']:.2f} "
            f"(by the rule {row['ratio_of_rule']:.2f}, barrier {row['ratio_of_barrier']:.2f})"
        )
    out.write_text(json.dumps({"commit": commit(), "machine": machine(), "rows": rows}, indent=1))


def measured(work: Workload, turns: Turns) -> tuple[float, int, int]:
    """Seconds that the runner takes; batches opened early, and all batches."""
    batches = []

    def generate(policy: Policy, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        batches.append(len(requests))
        time.sleep(work.seconds(len(requests)))
        return [GenerationResult((1,), (0.0,), "done", "stop") for _ in requests]

    lm = LocalLM("embedded")
    lm.policy.generator = generate
    examples = [dspy.Example(number=n).with_inputs("number") for n in range(len(turns))]
    with dspy.context(lm=lm, adapter=WholeAnswer()):
        program = Agent(turns)
        sampling = SamplingConfig(max_calls=max(map(len, turns)), max_tokens=4)
        runner = RolloutRunner(program, lambda gold, pred, trace=None: 1.0, lm, sampling, 0)
        candidate = seed_candidate(program)
        began = time.monotonic()
        rollouts = runner.run(
            [RolloutJob(example, candidate) for example in examples], channel="slow", salt=0
        )
        took = time.monotonic() - began
    failed = [rollout.failure for rollout in rollouts if rollout.failure is not None]
    if failed or sum(batches) != sum(map(len, turns)):
        raise RuntimeError(f"not all agents took their turns: {failed[:1]}")
    return took, runner.early_batches, len(batches)


if __name__ == "__main__":
    typer.run(main)
