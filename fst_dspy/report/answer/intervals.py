"""Means of scores and of paired gains, with 95 % intervals that fit the kind of score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
Z = 1.959964
"""The normal distribution's 97.5 % point."""
RESAMPLES = 5000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: Of n values.
        low, high: The 95 % interval; ``None`` where the values say nothing of their spread.
        n: Values.
        how: ``"Wilson"``, ``"Newcombe"`` (Wilson's of both, for pairs) or ``"bootstrap"``.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    how: str


def mean_of(scores: Sequence[float]) -> Estimate:
    """The mean of some scores, at least one: Wilson's interval of 0s and 1s, else the bootstrap."""
    if _are_binary(scores):
        low, high = wilson(sum(scores) / len(scores), len(scores))
        return Estimate(sum(scores) / len(scores), low, high, len(scores), "Wilson")
    return _bootstrapped(scores)


def gain_of(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean gain over the same examples, at least one, in the same order.

    Of 0s and 1s the interval is Newcombe's for pairs (1998, "Improved confidence intervals for the
    difference between binomial proportions based on paired data", method 10), which stays honest
    where no example or every one has changed; else the bootstrap's over the examples' gains.
    """
    if _are_binary(before) and _are_binary(after):
        low, high = _newcombe(before, after)
        mean = (sum(after) - sum(before)) / len(before)
        return Estimate(mean, low, high, len(before), "Newcombe")
    return _bootstrapped([b - a for a, b in zip(before, after, strict=True)])


def _are_binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) of the mean of n scores of 0 or 1.

    Of other scores between 0 and 1 it is rather too wide than too narrow: none vary more than zeros
    and ones of the same mean.
    """
    middle = mean + Z * Z / (2 * n)
    width = Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def _newcombe(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    n = len(before)
    pairs = list(zip(after, before, strict=True))
    both, gained = pairs.count((1, 1)), pairs.count((1, 0))
    lost, neither = pairs.count((0, 1)), pairs.count((0, 0))
    p, q = (both + gained) / n, (both + lost) / n
    (p_low, p_high), (q_low, q_high) = wilson(p, n), wilson(q, n)
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess: float = both * neither - gained * lost
    if excess > 0:
        excess = max(excess - n / 2, 0)
    phi = excess / math.sqrt(product) if product else 0.0

    def away(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    return p - q - away(p - p_low, q_high - q), p - q + away(p_high - p, q - q_low)


def _bootstrapped(values: Sequence[float]) -> Estimate:
    mean = sum(values) / len(values)
    if len(set(values)) < 2:
        return Estimate(mean, None, None, len(values), "bootstrap")
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high), len(values), "bootstrap")
