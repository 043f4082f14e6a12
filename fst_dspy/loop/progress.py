"""Progress of a compile: what is told, and how it looks in a terminal or notebook."""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fst_dspy.config import BudgetConfig
from fst_dspy.display import Terminal, as_text
from fst_dspy.plan.plan import Plan
from fst_dspy.rollouts.health import told_failures
from fst_dspy.types import CycleRecord, RolloutCounts, TurnCounts

logger = logging.getLogger(__name__)
PHASE_SECONDS = 15.0
"""Between lines of a log, where nothing but phases has ended."""


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
        """A cycle has ended; a run that goes on tells of those again that were not saved yet."""

    def end(self) -> None:
        """The loop has ended, well or not."""


@runtime_checkable
class TellsPlan(Protocol):
    """A listener that is told the plan as well."""

    def plan(self, plan: Plan) -> None:
        """Before the first rollout, and once the first validation has shown how fast they are."""


class SilentProgress:
    """Says nothing."""

    def begin(self, budget: BudgetConfig) -> None: ...

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None: ...

    def cycle_done(self, record: CycleRecord) -> None: ...

    def end(self) -> None: ...

    def say(self, text: str) -> None: ...


class LogProgress(SilentProgress):
    """A log line a cycle, on level INFO; what went wrong the loop logs by itself, as warnings.

    Where cycles take long, the phases are told as well, one in ``PHASE_SECONDS`` at most. Where
    logging was not set up, the lines go to standard error, so that a run into a file is not mute.
    """

    def __init__(self) -> None:
        self._pace = _Pace(BudgetConfig(max_cycles=1))
        self._told = -math.inf

    def begin(self, budget: BudgetConfig) -> None:
        self._pace = _Pace(budget)

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        now = self._pace.at(cycle, counts)
        if time.monotonic() - self._told >= PHASE_SECONDS:
            self._write(now.line(cycle, name))

    def cycle_done(self, record: CycleRecord) -> None:
        self._pace.told(record)
        self._write(cycle_line(record))

    def _write(self, line: str) -> None:
        self._told = time.monotonic()
        if logger.hasHandlers():
            logger.info("%s", line)
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        logger.warning("%s", text)


def tell(listener: ProgressListener, text: str) -> None:
    """Have a listener say what concerns the whole run; one without ``say`` has it logged."""
    say = getattr(listener, "say", None) or LogProgress().say
    say(text)


def tell_plan(listener: ProgressListener, plan: Plan) -> None:
    """Tell a listener the plan, if it is one that hears of it."""
    if isinstance(listener, TellsPlan):
        listener.plan(plan)


class RichProgress:
    """A live line with the phase, rollouts a second and time left; a printed line a cycle."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Terminal(stderr=True)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, rate="", left="")
        self._pace = _Pace(BudgetConfig(max_cycles=1))

    def begin(self, budget: BudgetConfig) -> None:
        self._pace = _Pace(budget)
        self._bar.start()

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        now = self._pace.at(cycle, counts)
        self._bar.update(
            self._task,
            description=f"cycle {cycle} · {name}",
            completed=now.share,
            total=1.0,
            rate=now.rate,
            left=now.left,
        )

    def plan(self, plan: Plan) -> None:
        lines = plan.lines() if plan.timing == "estimated" else [plan.time_line()]
        for name, words in lines:
            self.console.print(
                as_text(f"{name:>9}  ", "dim").append_text(as_text(words, "not dim"))
            )

    def cycle_done(self, record: CycleRecord) -> None:
        self._pace.told(record)
        self.say(cycle_line(record))

    def end(self) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(as_text(text))


class NotebookProgress:
    """One plain-text output, rewritten in place: a line a cycle, and the phase under way below.

    Needs no widgets; what is left at the end is a line a cycle.
    """

    def __init__(self) -> None:
        self._pace = _Pace(BudgetConfig(max_cycles=1))
        self._lines: list[str] = []
        self._output: Any = None

    def begin(self, budget: BudgetConfig) -> None:
        from IPython.display import display

        self._pace = _Pace(budget)
        self._lines = []
        self._output = display({"text/plain": "starting"}, raw=True, display_id=True)

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        now = self._pace.at(cycle, counts)
        self._show(now.line(cycle, name))

    def cycle_done(self, record: CycleRecord) -> None:
        self._pace.told(record)
        self.say(cycle_line(record))

    def end(self) -> None:
        self._show()

    def say(self, text: str) -> None:
        self._lines.append(text)
        if self._output is not None:
            self._show()

    def _show(self, *under_way: str) -> None:
        self._output.update({"text/plain": "\n".join([*self._lines, *under_way])}, raw=True)


def default_progress() -> ProgressListener:
    """Shows itself where there is a terminal or a notebook, and logs elsewhere."""
    console = Terminal(stderr=True)
    if console.is_jupyter:
        return NotebookProgress()
    return RichProgress(console) if console.is_terminal else LogProgress()


@dataclass(frozen=True)
class _Now:
    """How far a run is: the share of its budget, 0 to 1, and what people read."""

    share: float
    rate: str
    left: str

    def line(self, cycle: int, phase: str) -> str:
        """All of it in one line."""
        parts = (f"cycle {cycle:>3}  {phase}", f"{self.share:.0%}", self.rate, self.left)
        return "  ·  ".join(part for part in parts if part)


class _Pace:
    """How fast a run goes, from its start or from where it was taken up again."""

    def __init__(self, budget: BudgetConfig) -> None:
        self.budget = budget
        self._started = time.monotonic()
        self._before: tuple[int, float] | None = None  # rollouts and share that there were then
        self._spent = 0.0, self._started  # seconds of the run, and when they were told
        self._acts: dict[str, float] = {}  # what a rollout does of what is limited

    def told(self, record: CycleRecord) -> None:
        """A cycle has ended, or had when the run was taken up again."""
        self._spent = sum(record.seconds.values()), time.monotonic()
        rollouts = max(1, record.total_rollouts.total)
        for counted in self.budget.env_limits():
            self._acts[counted] = getattr(record.turns, counted) / rollouts

    def at(self, cycle: int, counts: RolloutCounts) -> _Now:
        """Where the run is at the start of a phase of ``cycle``."""
        share = self._share(cycle, counts)
        rollouts, done = self._before = self._before or (counts.total, share)
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed, gained = (counts.total - rollouts) / seconds, share - done
        left = f"about {seconds * (1 - share) / gained:.0f} s left" if gained > 0.02 else ""
        return _Now(share, f"{counts.total:,} rollouts, {speed:.0f}/s", left)

    def _share(self, cycle: int, counts: RolloutCounts) -> float:
        budget = self.budget
        shares = [0.0]
        if budget.max_cycles is not None:
            # Cycles of prompts alone do not count, so there may be more; one is under way.
            shares.append(max(0, min(cycle, budget.max_cycles) - 1) / budget.max_cycles)
        if budget.max_rollouts is not None:
            shares.append(counts.total / budget.max_rollouts)
        for counted, limit in budget.env_limits().items():
            shares.append(counts.total * self._acts.get(counted, 0.0) / limit)
        if budget.max_seconds is not None:
            spent, told = self._spent
            shares.append((spent + time.monotonic() - told) / budget.max_seconds)
        return min(1.0, max(shares))


def _acted(turns: TurnCounts) -> str:
    """What agents did so far; nothing for other programs."""
    if not turns.turns:
        return ""
    invalid = f", {turns.invalid / turns.turns:.0%} of actions invalid" if turns.invalid else ""
    return f"  environment steps {turns.steps:,}{invalid}"


def cycle_line(record: CycleRecord) -> str:
    """One line that says how a cycle ended, and what failed."""
    failed = told_failures(record.failure_shares, record.failure_messages)
    told = [*(record.cold_start if record.cycle == 0 else ()), *filter(None, [record.decided])]
    held = "" if record.format_share is None else f"  format {record.format_share:.2f}"
    reward = "   —" if record.train_reward is None else f"{record.train_reward:.2f}"
    return (
        f"cycle {record.cycle:>3}  step {record.step:>4}  reward {reward}  "
        f"validation {record.val_score:.3f}  KL {record.kl_to_base:.4f}  "
        f"rollouts {record.total_rollouts.total:,}{_acted(record.turns)}{held}"
        + "".join(f"\n  {text}" for text in (*told, *failed))
    )
