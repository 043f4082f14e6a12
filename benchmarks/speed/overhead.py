"""(c) What a compile takes beyond its two channels: rollouts, optimizer steps and proposals.

Counted as the channels' own: ``RolloutRunner.run``, ``SlowTrainer.advance``, the proposer,
which reads rollouts and writes prompts, and the measurement of the KL. All else is bookkeeping:
choosing candidates, records, checkpoints, logs, and setting up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dspy

from benchmarks.speed.measure import Clock, Row, row_of
from fst_dspy import FST, LocalLM, optimizer
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.tasks import load_task

CHANNELS = (
    (RolloutRunner, "run"),
    (SlowTrainer, "advance"),
    (LessonProposer, "propose"),
    (LessonProposer, "observe"),
    (optimizer, "kl_to_base"),
)


class Channels:
    """Seconds inside any of some functions; what they call of each other counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def timed(self, owner: Any, name: str) -> Any:
        """The function, on this clock."""
        function = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started = Clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += Clock.now() - started

        return run


def run(quick: bool) -> Iterator[Row]:
    """One row: the share of a compile's wall time that is bookkeeping."""
    shares, notes = [], []
    for seed in range(1 if quick else 3):
        share, note = bookkeeping(seed, cycles=1 if quick else 4)
        shares.append(100 * share)
        notes.append(note)
    yield row_of("c", "bookkeeping in a compile with a run folder", "%", shares, "<= 3", notes[0])


def bookkeeping(seed: int, cycles: int) -> tuple[float, str]:
    """Share of the wall time of a compile of triage on the embedded model, 0 to 1."""
    task, clock = load_task("triage", seed), Channels()
    lm = LocalLM("embedded")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(dspy.context(lm=lm))
        for owner, name in CHANNELS:
            stack.enter_context(patch.object(owner, name, clock.timed(owner, name)))
        fst = FST(task.metric, seed=seed, max_cycles=cycles, log_dir=folder / "run")
        started = Clock.now()
        fst.compile(task.program, trainset=task.trainset, valset=task.valset)
        wall = Clock.now() - started
    return 1 - clock.seconds / wall, f"{wall:.1f} s in all, {clock.seconds:.1f} s in the channels"
