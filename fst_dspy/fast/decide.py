"""Decisions on scores, at a stated rate of false ones; ``docs/decisions.md`` lists them all.

Two candidates are compared on what was observed of both: *blocks*, each with the rewards of the one
and of the other on one example, under the same weights. Were they equally good, it would be chance
which of a block's rewards went to which of them. So the rewards of every block are dealt out again
at random, and a difference counts if few such deals show as large a one: a permutation test, exact
at any number of rewards, for any of their distributions, and with more rollouts of the one than of
the other (Ernst, "Permutation Methods", 2004). ``scipy.stats.permutation_test`` has no blocks of
unequal parts.

Who looks again as blocks come in shares the rate out over the looks: :func:`share`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Rate of false decisions: how often chance alone would make one."""
LIKELY = 0.25
"""Rate where a true difference that is missed costs more than a false one: whether a later pair of
weights and prompt is returned (``docs/decisions.md``)."""
DEALS = 1999
"""Deals that are drawn; the p-value counts the observed one in, and so is exact."""
MANY = 5000
"""Ways to deal one block out, beyond which some are drawn."""

Block = tuple[Sequence[float], Sequence[float]]
"""The rewards of a candidate, and of another, on one example under the same weights."""


def chance(blocks: Iterable[Block]) -> float:
    """The p-value of the first's rewards being higher: 1 where there is nothing to compare.

    Args:
        blocks: Rewards in any range, at least one of each of the two in every block.
    """
    by_shape: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    for a, b in blocks:
        if len({*a, *b}) > 1:  # else every deal is alike
            by_shape[len(a), len(b)].append([*a, *b])
    rng = np.random.default_rng(0)
    observed, dealt = 0.0, np.zeros(DEALS)
    for (own, others), rows in sorted(by_shape.items()):
        rewards_BN = np.array(rows)
        observed += float((rewards_BN[:, :own].mean(1) - rewards_BN[:, own:].mean(1)).sum())
        gain_BW = rewards_BN @ _ways(own, others).T
        way_BD = rng.integers(gain_BW.shape[1], size=(len(rows), DEALS))
        dealt += np.take_along_axis(gain_BW, way_BD, 1).sum(0)
    if not by_shape:
        return 1.0
    return (1 + int((dealt >= observed - 1e-9 * max(1.0, abs(observed))).sum())) / (1 + DEALS)


def better(blocks: Sequence[Block], level: float = LEVEL) -> bool:
    """Whether the first's rewards are higher by more than chance.

    Args:
        level: How often that is said of equals, at most.
    """
    return chance(blocks) <= level


def worse(blocks: Sequence[Block], level: float = LEVEL) -> bool:
    """Whether the first's rewards are lower by more than chance; likewise."""
    return better([(b, a) for a, b in blocks], level)


def share(looks: float, level: float = LEVEL) -> float:
    """The level of each of several looks at growing data, so that all together keep ``level``."""
    return level / looks


def own_wins(blocks: Sequence[Block], level: float = LEVEL) -> bool:
    """Whether the first wins on problems of its own: oftener than if problems met at random.

    By chance it would beat the other on some. So the first's means are paired with the other's of
    other blocks, at random: where they are good at different problems, the true pairs have more
    wins than these; where both are good at the easy ones, fewer.

    Args:
        level: How often that is said where neither is good at what the other is not.
    """
    if len(blocks) < 2:
        return False
    own_B, other_B = (np.array([np.mean(pair[side]) for pair in blocks]) for side in (0, 1))
    order_DB = np.random.default_rng(0).permuted(
        np.tile(np.arange(len(blocks)), (DEALS, 1)), axis=1
    )
    wins, dealt_D = np.maximum(own_B - other_B, 0).sum(), np.maximum(own_B[order_DB] - other_B, 0)
    as_many = int((dealt_D.sum(1) >= wins - 1e-9).sum())
    return wins > 0 and (1 + as_many) / (1 + DEALS) <= level


@lru_cache
def _ways(own: int, others: int) -> NDArray[np.float64]:
    """Weights of a block's rewards by which it is dealt out, a row for each way."""
    total = own + others
    if math.comb(total, own) <= MANY:
        taken = [list(way) for way in combinations(range(total), own)]
    else:
        rng = np.random.default_rng(0)
        taken = [list(rng.permutation(total)[:own]) for _ in range(MANY)]
    ways = np.full((len(taken), total), -1.0 / others)
    for row, way in zip(ways, taken, strict=True):
        row[way] = 1.0 / own
    return ways
