"""The population: a per-example Pareto front over candidates, and how it is spread over a group.

Pure functions. The front is GEPA's: a candidate is on it if it is best on at least one validation
example, less those whose every win is shared with a better candidate that stays (gepa,
``gepa_utils.remove_dominated_programs``). The K kept are chosen greedily to cover the front.

In one thing it departs from GEPA's: a candidate that is clearly worse than the best, and best on
few examples, does not stay. Scores are single samples, so a bare prompt that guesses one answer in
ten is soon on the front; in the slow phase it would take its share of every group, and teach the
weights to do without the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb

from fst_dspy.errors import ConfigError
from fst_dspy.types import Candidate, Population

CLEARLY = 0.05
"""Level of the sign test by which a candidate is clearly worse than the best."""
NICHE = 0.1
"""Share of the examples on which a candidate must beat all others to stay nevertheless."""


def mean(values: Sequence[float]) -> float:
    """The mean, 0 for none."""
    return sum(values) / len(values) if values else 0.0


def pareto_front(score_K_V: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Indices of the candidates on the per-example front, ascending.

    Args:
        score_K_V: K candidates on V examples; higher is better. Empty gives an empty front.
    """
    if not score_K_V:
        return ()
    winners_V = [
        {k for k, score in enumerate(score_K) if score == max(score_K)}
        for score_K in zip(*score_K_V, strict=True)
    ]
    front = set().union(*winners_V) if winners_V else set()
    for k in sorted(front, key=lambda k: (mean(score_K_V[k]), -k)):
        if all((winners & front) - {k} for winners in winners_V if k in winners):
            front.discard(k)
    return tuple(sorted(front))


def columns(
    frontier: str,
    score_K_V: Sequence[Sequence[float]],
    objective_K_V: Sequence[Sequence[Mapping[str, float]]],
) -> Sequence[Sequence[float]]:
    """What the front is made over, a row a candidate, for one of gepa's ``frontier_type``.

    Args:
        frontier: ``"instance"``, an example a column; ``"objective"``, an objective's mean over the
            examples; ``"hybrid"``, both, with equal weight; ``"cartesian"``, an objective on an
            example.
        score_K_V: Scores.
        objective_K_V: Scores by objective, all with the same ones; where it is empty, the front is
            over examples.
    """
    if frontier == "instance" or not objective_K_V or not objective_K_V[0]:
        return score_K_V
    names = sorted(objective_K_V[0][0])
    if frontier == "cartesian":
        return [[cell[name] for cell in row for name in names] for row in objective_K_V]
    means = [[mean([cell[name] for cell in row]) for name in names] for row in objective_K_V]
    if frontier == "objective":
        return means
    # As many columns as there are examples: among these, a few objectives would count for nothing.
    times = max(1, len(score_K_V[0]) // len(names))
    return [[*scores, *own * times] for scores, own in zip(score_K_V, means, strict=True)]


def choose(
    candidates: Sequence[Candidate],
    score_K_V: Sequence[Sequence[float]],
    val_ids: Sequence[str],
    k: int,
    policy_version: int,
    *,
    objective_K_V: Sequence[Sequence[Mapping[str, float]]] = (),
    frontier: str = "instance",
) -> Population:
    """The ``k`` candidates that cover the front.

    First the best mean; then, again and again, the one on the front with the most examples (or
    other :func:`columns`) on which it beats all those chosen (ties: higher mean, then id). Where
    the front holds fewer than ``k``, the best means of the others follow. One that is clearly worse
    than the best is only taken for a niche of its own, so that there may be fewer than ``k``. The
    result depends on no order of the arguments.

    Args:
        candidates: At least one; of equal ids the first is taken.
        score_K_V: Their scores, a row each.
        val_ids: Length V.
        k: Candidates to keep, at least 1.
        policy_version: Optimizer steps taken when the scores were measured.
        objective_K_V, frontier: As for :func:`columns`.

    Raises:
        ConfigError: No candidates, or ``k`` below 1.
    """
    if not candidates or k < 1:
        raise ConfigError(f"cannot choose {k} of {len(candidates)} candidates")
    row_of: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        row_of.setdefault(candidate.id, index)
    scores = {i: tuple(score_K_V[row]) for i, row in row_of.items()}
    column_rows = columns(frontier, score_K_V, objective_K_V)
    fronts = {i: column_rows[row] for i, row in row_of.items()}
    ids = sorted(row_of, key=lambda i: (-mean(scores[i]), i))
    front = {ids[index] for index in pareto_front([fronts[i] for i in ids])}
    chosen = [ids[0]]
    rest = ids[1:]
    while rest and len(chosen) < k:
        best_C = [max(column) for column in zip(*(fronts[i] for i in chosen), strict=True)]
        gain = {
            i: sum(s > b for s, b in zip(fronts[i], best_C, strict=True)) if i in front else -1
            for i in rest
        }
        pick = max(rest, key=lambda i: gain[i])  # the first of equals: rest is sorted by mean, id
        rest.remove(pick)
        if gain[pick] >= NICHE * len(best_C) or not worse_by_sign_test(
            scores[pick], scores[ids[0]]
        ):
            chosen.append(pick)
    rows = [row_of[i] for i in chosen]
    return Population(
        candidates=tuple(candidates[row] for row in rows),
        val_ids=tuple(val_ids),
        score_K_V=tuple(scores[i] for i in chosen),
        policy_version=policy_version,
        objective_K_V=tuple(tuple(objective_K_V[row]) for row in rows) if objective_K_V else (),
    )


def worse_by_sign_test(score_V: Sequence[float], best_V: Sequence[float]) -> bool:
    """Whether scores are lower than others on the same examples, by a one-sided sign test.

    Args:
        score_V, best_V: Length V; examples on which they are equal do not count.
    """
    wins = sum(s > b for s, b in zip(score_V, best_V, strict=True))
    losses = sum(s < b for s, b in zip(score_V, best_V, strict=True))
    unequal = wins + losses
    return sum(comb(unequal, n) for n in range(wins + 1)) < CLEARLY * 2**unequal


def better_by_two_errors(score_V: Sequence[float], other_V: Sequence[float]) -> bool:
    """Whether scores on the same V examples are higher by two standard errors, and at all.

    Args:
        score_V, other_V: Length V, at least 1.
    """
    count = len(score_V)
    gain_V = [a - b for a, b in zip(score_V, other_V, strict=True)]
    variance = sum((gain - mean(gain_V)) ** 2 for gain in gain_V) / max(1, count - 1)
    return mean(gain_V) > 0 and mean(gain_V) >= 2 * (variance / count) ** 0.5


def ranked(population: Population) -> tuple[Candidate, ...]:
    """The candidates by mean score, best first; ties by id."""
    order = sorted(
        zip(population.candidates, population.score_K_V, strict=True),
        key=lambda pair: (-mean(pair[1]), pair[0].id),
    )
    return tuple(candidate for candidate, _ in order)


def best(population: Population) -> int:
    """Index of the candidate with the best mean score; ties by id."""
    return population.candidates.index(ranked(population)[0])


def assign(population: Population, group_size: int, k: int) -> tuple[Candidate, ...]:
    """The candidate of each of a group's G rollouts (paper, section 3: G/K for each of K).

    A population smaller than ``k`` is cycled evenly and its best candidates get the remainder.

    Args:
        population: At least one candidate; of more than ``k`` the best ``k`` are used.
        group_size: G, rollouts in the group.
        k: K, candidates to spread them over; G must be a multiple of it.

    Raises:
        ConfigError: G is not a positive multiple of ``k``.
    """
    if k < 1 or group_size < 1 or group_size % k:
        raise ConfigError(f"group_size ({group_size}) must be a multiple of k ({k})")
    order = ranked(population)[:k]
    return tuple(order[slot % len(order)] for slot in range(group_size))
