"""The population: a per-example Pareto front over candidates, and how it is spread over a group.

Pure functions. The front is GEPA's: a candidate is on it if it is best on at least one validation
example, less those whose every win is shared with a better candidate that stays (gepa,
``gepa_utils.remove_dominated_programs``). The K kept are chosen greedily to cover the front.

In one thing it departs from GEPA's: to stay beside the best costs a share of every group's rollouts
in the slow phase, and teaches the weights a context that is not returned. So it takes evidence: who
ranks lower stays if it has met one that ranks above it, and either was not worse there at the level
of the test, or won on problems of its own by more than chance. Wins and tests are of scores that
were observed of both; where there are gaps, only the order is of fitted means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fst_dspy.errors import ConfigError
from fst_dspy.fast.decide import LEVEL, Block, better, own_wins, share, worse
from fst_dspy.types import Candidate, Population

Row = Sequence[float | None]
"""Scores of a candidate, ``None`` where none was observed."""
Pairs = Callable[[Candidate, Candidate], Sequence[Block]]
"""What was observed of two candidates at once."""


def mean(values: Sequence[float]) -> float:
    """The mean, 0 for none."""
    return sum(values) / len(values) if values else 0.0


def pareto_front(score_K_V: Sequence[Row]) -> tuple[int, ...]:
    """Indices of the candidates on the per-example front, ascending.

    Args:
        score_K_V: K candidates on V examples; higher is better. Empty gives an empty front. An
            example counts where it has scores of two candidates, if there are two.
    """
    winners_V = []
    for score_K in zip(*score_K_V, strict=True):
        seen = {k: score for k, score in enumerate(score_K) if score is not None}
        if len(seen) >= min(2, len(score_K_V)):
            top = max(seen.values())
            winners_V.append({k for k, score in seen.items() if score == top})
    front: set[int] = set().union(*winners_V)
    for k in sorted(front, key=lambda k: (mean(_seen(score_K_V[k])), -k)):
        if all((winners & front) - {k} for winners in winners_V if k in winners):
            front.discard(k)
    return tuple(sorted(front))


def _seen(row: Row) -> list[float]:
    return [score for score in row if score is not None]


def columns(
    frontier: str,
    score_K_V: Sequence[Row],
    objective_K_V: Sequence[Sequence[Mapping[str, float]]],
) -> Sequence[Row]:
    """What the front is made over, a row a candidate, for one of gepa's ``frontier_type``.

    Args:
        frontier: ``"instance"``, an example a column; ``"objective"``, an objective's mean over the
            examples; ``"hybrid"``, both, with equal weight; ``"cartesian"``, an objective on an
            example.
        score_K_V: Scores, those that were observed.
        objective_K_V: Scores by objective, all with the same ones; where it is empty, the front is
            over examples.
    """
    if frontier == "instance" or not objective_K_V or not objective_K_V[0]:
        return score_K_V
    names = sorted(objective_K_V[0][0])
    if frontier == "cartesian":
        return [
            [None if score is None else cell[name] for score, cell in cells for name in names]
            for cells in (
                list(zip(score_V, row, strict=True))
                for score_V, row in zip(score_K_V, objective_K_V, strict=True)
            )
        ]
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
    seen_K_V: Sequence[Row] | None = None,
    pairs: Pairs | None = None,
    level: float = LEVEL,
) -> Population:
    """The ``k`` candidates that cover the front.

    First the best mean; then, again and again, the one on the front with the most examples (or
    other :func:`columns`) on which it beats all those chosen (ties: higher mean, then id). Where
    the front holds fewer than ``k``, the best means of the others follow. Beside the best stays
    only who has met one that ranks above it. It is compared with the highest of these, and leaves
    if it was worse, unless it won on problems of its own by more than chance or is better in one
    of the objectives that ``frontier`` names. So there may be fewer than ``k``. The result depends
    on no order of the arguments.

    Args:
        candidates: At least one; of equal ids the first is taken.
        score_K_V: Their scores, a row each, gaps filled: for the order alone.
        val_ids: Length V.
        k: Candidates to keep, at least 1.
        policy_version: Optimizer steps taken when the scores were measured.
        objective_K_V, frontier: As for :func:`columns`.
        seen_K_V: The scores that were observed, on which wins count; ``None``: all were.
        pairs: What was observed of two candidates at once; ``None``: the scores, an example each.
        level: Rate at which an equal candidate is called worse; 0: none is.

    Raises:
        ConfigError: No candidates, or ``k`` below 1.
    """
    if not candidates or k < 1:
        raise ConfigError(f"cannot choose {k} of {len(candidates)} candidates")
    row_of: dict[str, int] = {}
    for index, candidate in enumerate(candidates):
        row_of.setdefault(candidate.id, index)
    scores = {i: tuple(score_K_V[row]) for i, row in row_of.items()}
    seen_K_V = score_K_V if seen_K_V is None else seen_K_V
    column_rows = columns(frontier, seen_K_V, objective_K_V)
    by_objective = frontier != "instance" and objective_K_V and objective_K_V[0]
    names = sorted(objective_K_V[0][0]) if by_objective else []
    fronts = {i: column_rows[row] for i, row in row_of.items()}
    ids = sorted(row_of, key=lambda i: (-mean(scores[i]), i))
    front = {ids[index] for index in pareto_front([fronts[i] for i in ids])}

    def of_objective(row: int, name: str) -> list[float | None]:
        cells = zip(seen_K_V[row], objective_K_V[row], strict=True)
        return [None if score is None else cell[name] for score, cell in cells]

    def good_for_more(own: int, other: int) -> bool:
        """Whether it is better in an objective; also where these were not compared."""
        rows = [blocks_of(of_objective(own, n), of_objective(other, n)) for n in names]
        return any(not blocks or better(blocks, share(len(names))) for blocks in rows)

    def earns_its_place(i: str) -> bool:
        own = row_of[i]
        for other in (row_of[above] for above in ids[: ids.index(i)]):
            if pairs is None:
                blocks: Sequence[Block] = blocks_of(score_K_V[own], score_K_V[other])
            else:
                blocks = pairs(candidates[own], candidates[other])
            if blocks:  # not every two have met
                lost = level > 0 and worse(blocks, level)
                return not lost or own_wins(blocks) or good_for_more(own, other)
        return False

    chosen = [ids[0]]
    rest = ids[1:]
    while rest and len(chosen) < k:
        columns_C = zip(*(fronts[i] for i in chosen), strict=True)
        best_C = [max(_seen(column), default=None) for column in columns_C]
        gain = {i: _wins(fronts[i], best_C) if i in front else -1 for i in rest}
        pick = max(rest, key=lambda i: gain[i])  # the first of equals: rest is sorted by mean, id
        rest.remove(pick)
        if earns_its_place(pick):
            chosen.append(pick)
    rows = [row_of[i] for i in chosen]
    return Population(
        candidates=tuple(candidates[row] for row in rows),
        val_ids=tuple(val_ids),
        score_K_V=tuple(scores[i] for i in chosen),
        policy_version=policy_version,
        objective_K_V=tuple(tuple(objective_K_V[row]) for row in rows) if objective_K_V else (),
    )


def _wins(row: Row, other: Row) -> int:
    pairs = zip(row, other, strict=True)
    return sum(s is not None and o is not None and s > o for s, o in pairs)


def blocks_of(score_V: Row, other_V: Row) -> list[Block]:
    """Scores of two candidates on V examples as blocks, those that were observed of both."""
    pairs = zip(score_V, other_V, strict=True)
    return [([s], [o]) for s, o in pairs if s is not None and o is not None]


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
