"""(f) ``dspy.GRPO`` through the package's provider, against FST's slow channel alone.

Both take the same number of optimizer steps on 8 problems of 8 rollouts of triage. What is timed is
the step: DSPy's validation and FST's are left out, by taking the time of many steps less that of
few, over the steps between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import dspy

from benchmarks.quality import dspy_grpo
from benchmarks.speed.measure import Clock, Row, row_of
from fst_dspy import FST, LocalLM
from fst_dspy.tasks import load_task
from fst_dspy.types import Task

FEW, MANY, MANY_QUICK = 1, 5, 2


def run(quick: bool) -> Iterator[Row]:
    """One row: ``dspy.GRPO``'s time for a step over FST's."""
    values, notes = [], []
    logging.getLogger("dspy").setLevel(logging.CRITICAL)  # answers that do not parse are data here
    many = MANY_QUICK if quick else MANY
    for seed in range(1 if quick else 3):
        native, ours = _step_seconds(_native, seed, many), _step_seconds(_ours, seed, many)
        values.append(native / ours)
        notes.append(f"{native:.2f} s against {ours:.2f} s a step of 64 rollouts")
    what = "dspy.GRPO through the provider against FST(arm='rl_only'), a step"
    yield row_of("f", what, "x", values, "", notes[0])


def _step_seconds(
    compile_with: Callable[[Task, LocalLM, int, int], None], seed: int, many: int
) -> float:
    seconds = []
    for steps in (FEW, many):
        lm = LocalLM("embedded", max_tokens=dspy_grpo.MAX_TOKENS, cache=False)
        task = load_task("triage", seed)
        started = Clock.now()
        with dspy.context(lm=lm, adapter=dspy_grpo.ADAPTER, max_errors=1_000_000):
            compile_with(task, lm, seed, steps)
        seconds.append(Clock.now() - started)
    return (seconds[1] - seconds[0]) / (many - FEW)


def _native(task: Task, lm: LocalLM, seed: int, steps: int) -> None:
    program = task.program.deepcopy()
    program.set_lm(lm)
    optimizer = dspy_grpo.grpo(task, seed, steps, 1e-4)
    optimizer.num_steps_for_val = 1000  # the last step is validated all the same
    optimizer.compile(program, trainset=task.trainset, valset=task.valset[:8])


def _ours(task: Task, lm: LocalLM, seed: int, steps: int) -> None:
    fst = FST(task.metric, arm="rl_only", seed=seed, max_cycles=1, steps_per_cycle=steps)
    fst.compile(task.program, trainset=task.trainset, valset=task.valset[:8])
