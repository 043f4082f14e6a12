"""Where the Pareto scores of a fast phase come from: validation examples, or a pool of rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import dspy

from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.pool import RolloutPool, score_table
from fst_dspy.fast.population import Row
from fst_dspy.types import Candidate, Population, Rollout

Objectives = tuple[tuple[Mapping[str, float], ...], ...]
"""Scores by objective in the places of scores; empty where the metric gives none."""


class Scores(Protocol):
    """Scores of the candidates that gepa draws a parent from."""

    def rows(self, members: Sequence[Candidate]) -> Sequence[Row]:
        """Scores of the members, a row each, on the same columns; ``None`` where none was seen."""
        ...

    def objectives(self, members: Sequence[Candidate]) -> Objectives:
        """Scores of the members by objective, likewise."""
        ...

    def add(self, child: Candidate) -> Sequence[Rollout]:
        """Score an accepted child; the rollouts on validation examples that this took."""
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
        self.adapter, self.valset, self.val_ids = adapter, valset, population.val_ids
        self.by_id: dict[str, Sequence[float]] = {
            candidate.id: score_V
            for candidate, score_V in zip(population.candidates, population.score_K_V, strict=True)
        }
        pairs = zip(population.candidates, population.objective_K_V, strict=False)
        self._objectives = {candidate.id: row for candidate, row in pairs}

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
        """K rows of V scores."""
        return tuple(tuple(self.by_id[member.id]) for member in members)

    def objectives(self, members: Sequence[Candidate]) -> Objectives:
        """K rows of V mappings, all with the same objectives."""
        rows = [self._objectives.get(member.id, ({},) * len(self.valset)) for member in members]
        names = sorted({name for row in rows for cell in row for name in cell})
        if not names:
            return ()
        return tuple(
            tuple(
                {name: cell.get(name, score) for name in names}
                for cell, score in zip(row, score_V, strict=True)
            )
            for row, score_V in zip(rows, self.rows(members), strict=True)
        )

    def add(self, child: Candidate) -> Sequence[Rollout]:
        """Run the child on the validation examples."""
        found = self.adapter.evaluate(self.valset, child.components)
        self.by_id[child.id] = found.scores
        if found.objective_scores is not None:
            self._objectives[child.id] = tuple(found.objective_scores)
        return found.outputs


class PooledScores:
    """Scores from rollouts that were run for another purpose.

    Attributes:
        pool: These rollouts.
    """

    def __init__(self) -> None:
        self.pool = RolloutPool()

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float | None, ...], ...]:
        """K rows of P scores; before the first rollout, all candidates are alike."""
        table = score_table(self.pool, members)
        if len(table.candidates) < len(members):
            return tuple((0.0,) for _ in members)
        return table.seen_K_P

    def objectives(self, members: Sequence[Candidate]) -> Objectives:
        """K rows of P mappings; none before there are scores of all."""
        table = score_table(self.pool, members)
        return table.objective_K_P if len(table.candidates) == len(members) else ()

    def add(self, child: Candidate) -> Sequence[Rollout]:
        """None: its minibatch is in the pool already."""
        return ()

    def keep(self, rollouts: Sequence[Rollout]) -> None:
        """Put rollouts into the pool."""
        self.pool = self.pool.plus(rollouts)
