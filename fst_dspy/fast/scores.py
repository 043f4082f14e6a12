"""Where the Pareto scores of a fast phase come from: validation examples, or a pool of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import dspy

from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.pool import RolloutPool, score_table
from fst_dspy.types import Candidate, Population, Rollout


class Scores(Protocol):
    """Scores of the candidates that gepa draws a parent from."""

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
        """Scores of the members, a row each, on the same columns."""
        ...

    def add(self, child: Candidate) -> None:
        """Score an accepted child, where that takes rollouts."""
        ...


class ValidationScores:
    """Scores on the validation examples, measured with rollouts of channel ``fast``.

    Args:
        population: Scored on ``valset``.
        adapter: Runs the rollouts of a child.
        valset: Length V, in the order of ``population.val_ids``.
    """

    def __init__(
        self, population: Population, adapter: GepaAdapter, valset: Sequence[dspy.Example]
    ) -> None:
        self.adapter, self.valset = adapter, valset
        self.by_id: dict[str, Sequence[float]] = {
            candidate.id: score_V
            for candidate, score_V in zip(population.candidates, population.score_K_V, strict=True)
        }

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
        """K rows of V scores."""
        return tuple(tuple(self.by_id[member.id]) for member in members)

    def add(self, child: Candidate) -> None:
        """Run the child on the validation examples."""
        self.by_id[child.id] = self.adapter.evaluate(self.valset, child.components).scores


class PooledScores:
    """Scores from rollouts that were run for another purpose.

    Attributes:
        pool: These rollouts.
    """

    def __init__(self) -> None:
        self.pool = RolloutPool()

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
        """K rows of P scores; before the first rollout, all candidates are alike."""
        table = score_table(self.pool, members)
        if len(table.candidates) < len(members):
            return tuple((0.0,) for _ in members)
        return table.score_K_P

    def add(self, child: Candidate) -> None:
        """Its minibatch is in the pool already."""

    def keep(self, rollouts: Sequence[Rollout]) -> None:
        """Put rollouts into the pool."""
        self.pool = self.pool.plus(rollouts)
