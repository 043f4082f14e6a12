"""One trial of a study: a compile with the trial's settings, within the study's rollout budget.

What is measured. The score is the best validation score of the cycles that *ended within the
budget*, so that settings with large cycles gain nothing by overshooting it; a run is stopped as
soon as no further cycle can. ``kl_to_base`` and ``rollouts`` are those of that best cycle. It is a
maximum over noisy scores: test the settings you choose on other examples.

Pruning. After each cycle the best score so far is reported, with the share of the budget spent as
the step (in percent, by fives), so that trials with large and small cycles are compared at equal
rollouts. Optuna has no pruning for several objectives. There a trial is pruned by our own rule,
after ``MedianPruner``: when it is behind the median of the completed trials at the same step *in
every objective*, so that one that leads in any of them is kept. What it leads in does not help a
trial below a lower limit (a run that has not learned anything yet has a KL of 0): it is pruned
where most of the others had come above it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import TrialState

from fst_dspy.config import BudgetConfig
from fst_dspy.errors import ConfigError
from fst_dspy.files import read_jsonl
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.run.records import cycle_record
from fst_dspy.types import CycleRecord, RolloutCounts

Direction = Literal["maximize", "minimize"]
DIRECTIONS: dict[str, Direction] = {
    "score": "maximize",
    "kl_to_base": "minimize",
    "rollouts": "minimize",
}
"""What can be optimised or bounded, and which way is better."""

STEP_PERCENT = 5
WARMUP_PERCENT = 20
STARTUP_TRIALS = 4
PRUNERS = ("median", "asha", "hyperband", "none")


@dataclass(frozen=True)
class Objective:
    """What a study looks for.

    Attributes:
        measures: One or several of ``score``, ``kl_to_base`` and ``rollouts``; with several, the
            study has a Pareto front.
        rollouts: The budget of one trial, over all channels.
        at_most: Upper limits on measures, such as ``{"kl_to_base": 0.1}``. A trial above one is
            infeasible: never the best, and steered away from.
        at_least: Lower limits, such as ``{"score": 0.5}``. With several measures the student as it
            came, which costs no KL and next to no rollouts, is otherwise always on the front.
        pruner: ``"median"``, ``"asha"`` (successive halving), ``"hyperband"`` or ``"none"``.

    Raises:
        ConfigError: An unknown measure or pruner, or successive halving with several objectives.
    """

    measures: tuple[str, ...] = ("score",)
    rollouts: int = 3000
    at_most: Mapping[str, float] | None = None
    pruner: str = "median"
    at_least: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in (*self.measures, *(self.at_most or {}), *(self.at_least or {})):
            if name not in DIRECTIONS:
                raise ConfigError(f"unknown measure {name!r}; known: {', '.join(DIRECTIONS)}")
        if not self.measures or len(set(self.measures)) < len(self.measures):
            raise ConfigError("give each measure once, and at least one")
        if self.rollouts < 1:
            raise ConfigError(f"the rollout budget must be at least 1, got {self.rollouts}")
        if self.pruner not in PRUNERS:
            raise ConfigError(f"pruner must be one of {', '.join(PRUNERS)}, not {self.pruner!r}")
        if len(self.measures) > 1 and self.pruner not in ("median", "none"):
            raise ConfigError(
                f"Optuna cannot prune with several objectives, so not {self.pruner!r} either; "
                "'median' then means our own rule (see fst_dspy.study.objective)"
            )

    @property
    def directions(self) -> list[Direction]:
        """Optuna's direction of each measure."""
        return [DIRECTIONS[name] for name in self.measures]

    def excesses(self, measured: Measured) -> dict[str, float]:
        """By how much each limit is broken, as Optuna's constraints: above 0 is infeasible."""
        above = {
            f"{name} <= {limit}": getattr(measured, name) - limit
            for name, limit in (self.at_most or {}).items()
        }
        below = {
            f"{name} >= {limit}": limit - getattr(measured, name)
            for name, limit in (self.at_least or {}).items()
        }
        return {**above, **below}

    def is_short(self, measured: Measured) -> bool:
        """Whether a measure is below its lower limit."""
        return any(getattr(measured, n) < limit for n, limit in (self.at_least or {}).items())

    def make_pruner(self) -> optuna.pruners.BasePruner:
        """Optuna's pruner, in steps of percent of the budget."""
        if self.pruner == "median" and len(self.measures) == 1:
            return optuna.pruners.MedianPruner(STARTUP_TRIALS, WARMUP_PERCENT)
        if self.pruner == "asha":
            return optuna.pruners.SuccessiveHalvingPruner(WARMUP_PERCENT, reduction_factor=2)
        if self.pruner == "hyperband":
            return optuna.pruners.HyperbandPruner(WARMUP_PERCENT, 100, reduction_factor=2)
        return optuna.pruners.NopPruner()


@dataclass(frozen=True)
class Measured:
    """The best cycle of a trial within its budget."""

    score: float
    kl_to_base: float
    rollouts: int

    def values(self, measures: Sequence[str]) -> list[float]:
        """The measures asked for, in that order."""
        return [float(getattr(self, name)) for name in measures]


def measure(records: Sequence[CycleRecord], rollouts: int) -> Measured:
    """The best of the cycles that ended within the budget; of equals the earliest.

    The student as it came, cycle 0, counts in any case. A KL that is not finite is infinite here:
    Optuna takes no others for limits and objectives.
    """
    inside = [r for r in records if r.cycle == 0 or r.total_rollouts.total <= rollouts]
    best = max(inside, key=lambda record: record.val_score)
    kl = best.kl_to_base if math.isfinite(best.kl_to_base) else math.inf
    return Measured(best.val_score, kl, best.total_rollouts.total)


class BudgetSpentError(Exception):
    """No further cycle can end within the trial's budget."""


class TrialListener(SilentProgress):
    """Hears a trial's run: reports its cycles to Optuna, prunes it, and ends it on its budget.

    Args:
        trial: The trial.
        objective: What is measured, and when to prune.
        folder: The trial's run folder; what a resumed run did before is read from there.
    """

    def __init__(self, trial: optuna.Trial, objective: Objective, folder: Path) -> None:
        self.trial, self.objective, self.folder = trial, objective, folder
        self.records: list[CycleRecord] = []
        self.reports: list[dict[str, Any]] = []
        self.spent = 0

    def begin(self, budget: BudgetConfig) -> None:
        """Take up the cycles that an earlier worker ran."""
        for row in read_jsonl(self.folder / "cycles.jsonl"):
            self._take(cycle_record(row))

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        """End the run where the cycle under way is beyond the budget.

        Raises:
            BudgetSpentError: It is.
        """
        self.spent = counts.total
        if cycle > 0 and counts.total > self.objective.rollouts:
            raise BudgetSpentError

    def cycle_done(self, record: CycleRecord) -> None:
        """Report the cycle.

        Raises:
            optuna.TrialPruned: The trial is not worth going on with.
        """
        self._take(record)
        if self._should_prune():
            share = self.reports[-1]["step"]
            raise optuna.TrialPruned(f"after cycle {record.cycle}, {share} % of the budget")

    def _take(self, record: CycleRecord) -> None:
        """Report a cycle at its step, and what was known before at the steps it jumped over."""
        if self.records and record.cycle <= self.records[-1].cycle:
            return
        self.spent = record.total_rollouts.total
        before = self.measured() if self.records else None
        self.records.append(record)
        step = budget_step(self.spent, self.objective.rollouts)
        if before is not None:
            self._report_up_to(step - STEP_PERCENT, before)
        self._report_up_to(step, self.measured())

    def measured(self) -> Measured:
        """The best cycle so far."""
        return measure(self.records, self.objective.rollouts)

    def finish(self) -> Measured:
        """Report the outcome for what is left of the budget, and return it."""
        self._report_up_to(100, self.measured())
        return self.measured()

    def _report_up_to(self, step: int, measured: Measured) -> None:
        """Report at every step that has not been reported yet, up to this one."""
        values, short = measured.values(self.objective.measures), self.objective.is_short(measured)
        first = self.reports[-1]["step"] + STEP_PERCENT if self.reports else 0
        for at in range(first, step + 1, STEP_PERCENT):
            self.reports.append({"step": at, "values": values, "short": short})
            if len(values) == 1:
                self.trial.report(values[0], at)
        self.trial.set_user_attr("reports", self.reports)

    def _should_prune(self) -> bool:
        if self.objective.pruner == "none" or self.spent >= self.objective.rollouts:
            return False
        if len(self.objective.measures) == 1:
            return self.trial.should_prune()
        complete = self.trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = [trial.user_attrs.get("reports", []) for trial in complete]
        return behind_median(self.reports, others, self.objective.directions)


def budget_step(spent: int, budget: int) -> int:
    """The share of the budget spent, in percent, rounded down to the step, at most 100."""
    return min(100, 100 * spent // budget // STEP_PERCENT * STEP_PERCENT)


def behind_median(
    reports: Sequence[Mapping[str, Any]],
    others: Sequence[Sequence[Mapping[str, Any]]],
    directions: Sequence[str],
) -> bool:
    """Whether a trial is behind the median of others, at its last step, in every objective.

    Args:
        reports: The trial's reports, ``{"step": percent, "values": one an objective, "short":
            whether it is below a lower limit}``; one that is, is behind where most are not.
        others: The reports of completed trials. Never true with fewer than four of them at that
            step, nor in the first fifth of the budget.
        directions: ``"maximize"`` or ``"minimize"``, one an objective.
    """
    step, own = reports[-1]["step"], reports[-1]["values"]
    rivals = [row for rows in others for row in rows if row["step"] == step]
    if step < WARMUP_PERCENT or len(rivals) < STARTUP_TRIALS:
        return False
    if reports[-1]["short"]:
        return sum(row["short"] for row in rivals) < len(rivals) / 2
    columns = zip(*(row["values"] for row in rivals), strict=True)
    medians = [statistics.median(column) for column in columns]
    return all(
        value < median if direction == "maximize" else value > median
        for value, median, direction in zip(own, medians, directions, strict=True)
    )
