"""Progress of a compile: what is told, and how it looks in a terminal or notebook."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fst_dspy.config import BudgetConfig
from fst_dspy.types import CycleRecord, RolloutCounts


class StopRun(Exception):
    """Raised by a listener in ``cycle_done``: the run ends there, as if its budget were spent."""


class ProgressListener(Protocol):
    """Hears what the joint loop does. Every method may be called from one thread only.

    An exception that a listener raises ends the compile (``StopRun`` ends it well). The run folder
    stands as after a kill: the same compile goes on from its last checkpoint.
    """

    def begin(self, budget: BudgetConfig) -> None:
        """The loop starts, or goes on after an interruption."""

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        """A phase of a cycle begins, or another step of it: ``name`` says which."""

    def cycle_done(self, record: CycleRecord) -> None:
        """A cycle has ended and was saved; a resumed run tells of its last cycle again."""

    def end(self) -> None:
        """The loop has ended, well or not."""


class SilentProgress:
    """Says nothing."""

    def begin(self, budget: BudgetConfig) -> None: ...

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None: ...

    def cycle_done(self, record: CycleRecord) -> None: ...

    def end(self) -> None: ...


class RichProgress:
    """A live line with the phase, rollouts a second and time left; a printed line a cycle."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, rate="", left="")
        self._budget = BudgetConfig(max_cycles=1)
        self._started = 0.0
        self._rollouts_before: int | None = None

    def begin(self, budget: BudgetConfig) -> None:
        self._budget = budget
        self._started = time.monotonic()
        self._bar.start()

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        if self._rollouts_before is None:
            self._rollouts_before = counts.total
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (counts.total - self._rollouts_before) / seconds
        share = self._share(cycle, counts)
        left = f"about {seconds * (1 - share) / share:.0f} s left" if share > 0.02 else ""
        self._bar.update(
            self._task,
            description=f"cycle {cycle} · {name}",
            completed=share,
            total=1.0,
            rate=f"{counts.total:,} rollouts, {rate:.0f}/s",
            left=left,
        )

    def cycle_done(self, record: CycleRecord) -> None:
        self.console.print(cycle_line(record))

    def end(self) -> None:
        self._bar.stop()

    def _share(self, cycle: int, counts: RolloutCounts) -> float:
        budget = self._budget
        shares = [0.0]
        if budget.max_cycles is not None:
            shares.append(max(0, cycle - 1) / budget.max_cycles)
        if budget.max_rollouts is not None:
            shares.append(counts.total / budget.max_rollouts)
        if budget.max_seconds is not None:
            shares.append((time.monotonic() - self._started) / budget.max_seconds)
        return min(1.0, max(shares))


def cycle_line(record: CycleRecord) -> str:
    """One line that says how a cycle ended."""
    reward = "   —" if record.train_reward is None else f"{record.train_reward:.2f}"
    return (
        f"cycle {record.cycle:>3}  step {record.step:>4}  reward {reward}  "
        f"validation {record.val_score:.3f}  KL {record.kl_to_base:.4f}  "
        f"rollouts {record.total_rollouts.total:,}"
    )
