"""95 % intervals of a mean score, for bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fst_dspy.report.answer.intervals import mean_of

Bounds = tuple[float, float]

Z = 1.959964
"""The normal distribution's 97.5 % point."""


def interval(scores: Sequence[float]) -> Bounds | None:
    """Bounds of the mean: Wilson's where all scores are 0 or 1, else by the bootstrap.

    Args:
        scores: One an example, independent of one another.

    Returns:
        Low and high, or ``None`` where the scores say nothing of their spread.
    """
    found = mean_of(scores)
    return None if found.low is None or found.high is None else (found.low, found.high)


def wilson(mean: float, count: int) -> Bounds:
    """Wilson's interval (1927) for scores between 0 and 1 of which only the mean is known.

    It is rather too wide than too narrow: none vary more than zeros and ones of the same mean.

    Args:
        mean: 0 to 1.
        count: How many scores, at least 1.
    """
    middle = mean + Z * Z / (2 * count)
    width = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)
