"""A candidate on trial, and the slots it gets in the slow phase's groups."""

from __future__ import annotations

from dataclasses import dataclass

from fst_dspy.fast import population as populations
from fst_dspy.types import Candidate, Population


@dataclass(frozen=True)
class Trial:
    """A candidate that is being tried in the slow phase.

    Attributes:
        child: The candidate.
        parents: What it was made from: one candidate, or two for a merge.
        since: Optimizer steps taken when the trial began; earlier rollouts do not count.
        steps_left: Optimizer steps it still runs in.
    """

    child: Candidate
    parents: tuple[Candidate, ...]
    since: int
    steps_left: int


def lineup(population: Population, trial: Trial, group_size: int, k: int) -> tuple[Candidate, ...]:
    """The candidate of each of a group's G rollouts while one is on trial.

    It takes the slots of the candidate that covers the least of the front beside the others: the
    last that was chosen. The lowest mean would be that of a specialist, of which nothing recent
    were known after some trials. Its parents, with which it is compared, keep theirs, and so does
    the best, as long as there are enough slots.

    Args:
        population: As ``population.choose`` orders it, at least one candidate; of more than ``k``
            the best ``k`` are used.
        trial: Its parents belong to the population.
        group_size: G, at least 2.
        k: K, candidates to spread the group over.
    """
    order = list(populations.ranked(population)[:k])
    parents = {parent.id for parent in trial.parents}
    spare = [c for c in reversed(population.candidates) if c in order and c.id not in parents]
    least = next((c for c in spare if c.id != order[0].id or len(order) == group_size), None)
    if len(order) == k and least is not None:
        order.remove(least)
    order.append(trial.child)
    return tuple(order[slot % len(order)] for slot in range(group_size))
