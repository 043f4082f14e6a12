"""95 % intervals of a mean score as bands."""

from __future__ import annotations

from collections.abc import Sequence

from fst_dspy.report.answer.intervals import mean_of

Bounds = tuple[float, float]


def interval(scores: Sequence[float]) -> Bounds | None:
    """Bounds of the mean: Wilson's where all scores are 0 or 1, else by the bootstrap.

    Args:
        scores: One an example, independent of one another; at least one.

    Returns:
        Low and high, or ``None`` where the scores say nothing of their spread.
    """
    found = mean_of(scores)
    return None if found.low is None or found.high is None else (found.low, found.high)
