"""The runs of a store that have ended, as the tables take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fst_dspy.experiments.jobs import Job, Outcome, read_outcome, read_records
from fst_dspy.experiments.runner import ExperimentStore
from fst_dspy.measures import (
    area_under_curve,
    mean_at_k,
    rollouts_to_score,
    score_curve,
    steps_to_score,
)
from fst_dspy.results.plots import Curve
from fst_dspy.types import CycleRecord

PAIR = "trained_evolved"
QUADRANTS = ("base_original", "base_evolved", "trained_original", PAIR)


@dataclass(frozen=True)
class Run:
    """A job that has ended, with its outcome and its cycles over all stages."""

    name: str
    job: Job
    outcome: Outcome
    records: tuple[CycleRecord, ...]

    @property
    def test(self) -> float:
        """Mean test score of the best pair."""
        return self.quadrant(PAIR)

    def quadrant(self, name: str) -> float:
        """Mean test score of one of ``QUADRANTS``."""
        return mean_at_k([self.outcome.test[name]]).mean

    @property
    def curve(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Validation score against rollouts of all channels: x, y."""
        found = score_curve(self.records)
        return found.x, found.y

    @property
    def budget(self) -> int:
        """Rollouts that it has run or, having ended of itself with nothing to gain, could have."""
        last = self.records[-1]
        return self.job.rollouts if last.ended else last.total_rollouts.total

    @property
    def held_curve(self) -> Curve:
        """Its curve to the whole of ``budget``; what ended of itself holds its last score to it."""
        x, y = self.curve
        if self.budget > x[-1]:
            x, y = (*x, float(self.budget)), (*y, y[-1])
        return Curve(self.name, x, y)

    @property
    def best(self) -> float:
        """Best validation score."""
        return max(record.val_score for record in self.records)

    def rollouts_to_best_of(self, other: Run) -> float | None:
        """Rollouts until another run's best validation score is reached; ``None`` if it is not."""
        return rollouts_to_score(self.records, other.best)

    def steps_to_best_of(self, other: Run) -> float | None:
        """Optimizer steps until it is."""
        return steps_to_score(self.records, other.best)

    @property
    def train_seconds(self) -> float:
        """Wall time without testing."""
        return sum(n for channel, n in self.outcome.seconds.items() if channel != "test")


def load_runs(store: ExperimentStore) -> list[Run]:
    """The runs of a store that have ended, in the order of their jobs; streams are not of them."""
    runs = []
    for name in store.status:
        if store.is_done(name) and not (job := store.job(name)).then:
            outcome = read_outcome(store.folder / name)
            records = tuple(read_records(store.folder / name, outcome.stages))
            runs.append(Run(name, job, outcome, records))
    return runs


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.job.label, []).append(run)
    return found


def scores_by_seed(runs: Sequence[Run]) -> dict[int, float]:
    """Test scores by seed."""
    return {run.job.seed: run.test for run in runs}


def shared_budget(runs: Sequence[Run]) -> int:
    """Rollouts that all runs have run, or could have: areas under curves are compared up to there.

    A run that has ended of itself, with nothing left to gain, holds its last score to the budget.
    """
    return min(run.budget for run in runs)


def areas(runs: Sequence[Run]) -> dict[str, dict[int, float]]:
    """The mean validation score, best so far, over the rollouts that all runs had; by label, seed.

    Args:
        runs: Of one family.
    """
    budget = shared_budget(runs)
    return {
        label: {
            run.job.seed: area_under_curve(*run.curve, budget, running_best=True) for run in group
        }
        for label, group in by_label(runs).items()
    }
