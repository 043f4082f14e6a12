"""95 % intervals of a mean score, and of the difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964
"""The normal distribution's 97.5 % point."""
RESAMPLES = 2000


def interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Bounds of the mean: Wilson's where all scores are 0 or 1, else by the bootstrap.

    Args:
        scores: One an example, independent of one another.

    Returns:
        Low and high, or ``None`` below two scores.
    """
    if len(scores) < 2:
        return None
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(sum(scores) / len(scores), len(scores))
    return _bootstrap(np.asarray(scores, float))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927).

    For other scores between 0 and 1 it is too wide rather than too narrow: none vary more than
    zeros and ones of the same mean.

    Args:
        share: 0 to 1.
        count: How many were looked at, at least 1.
    """
    middle = share + Z * Z / (2 * count)
    width = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    low, high = (middle - width) / scale, (middle + width) / scale
    return (low if share > 0 else 0.0), (high if share < 1 else 1.0)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """Bounds of the mean of ``ours - theirs``, scores of the same examples in the same order."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    return _bootstrap(np.asarray(ours, float) - np.asarray(theirs, float))


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The percentile bootstrap of the mean, the same for the same values."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)
