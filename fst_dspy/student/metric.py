"""The user's metric: checked before any work, and read the same way everywhere.

A metric follows GEPA's protocol, ``metric(gold, pred, trace=None, pred_name=None,
pred_trace=None)``, and returns a number or ``dspy.Prediction(score=, feedback=)``. The shorter
``metric(gold, pred, trace=None)`` of other DSPy optimizers works too; it gives no text feedback.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dspy

from fst_dspy.errors import MetricError

MAX_SCORE = 1e6
"""Scores beyond this magnitude are taken for a mistake in the metric."""


@dataclass(frozen=True)
class Score:
    """What the metric said: a finite reward and a text, empty where it gave none."""

    reward: float
    feedback: str


def check_metric(metric: Callable[..., Any] | None) -> None:
    """Check that a metric can be called the way FST calls it.

    Raises:
        MetricError: It is missing, not callable, or takes neither 5 nor 3 arguments.
    """
    if metric is None:
        raise MetricError("FST needs a metric: FST(metric=...)")
    if not callable(metric):
        raise MetricError(f"the metric must be callable, got {type(metric).__name__}")
    if not any(_accepts(metric, count) for count in (5, 3)):
        raise MetricError(
            "the metric must accept (gold, pred, trace=None, pred_name=None, pred_trace=None), "
            f"or (gold, pred, trace=None); got {inspect.signature(metric)}"
        )


def call_metric(metric: Callable[..., Any], gold: dspy.Example, pred: dspy.Prediction) -> Score:
    """Score one prediction.

    Raises:
        MetricError: The metric returned no number, or one that is not finite or is huge.
    """
    arguments = (gold, pred, None, None, None) if _accepts(metric, 5) else (gold, pred, None)
    return read_score(metric(*arguments))


def gives_predictor_feedback(metric: Callable[..., Any]) -> bool:
    """Whether a metric can be asked about one predictor (``pred_name``, ``pred_trace``)."""
    return _accepts(metric, 5)


def read_score(result: Any) -> Score:
    """Read a metric's return value: a number, a bool, or a prediction with score and feedback.

    Raises:
        MetricError: There is no number in it, or one that is not finite or is huge.
    """
    if isinstance(result, dspy.Prediction):
        raw, feedback = result.get("score", None), result.get("feedback", "")
    elif isinstance(result, dict):
        raw, feedback = result.get("score"), result.get("feedback", "")
    else:
        raw, feedback = result, ""
    try:
        reward = float(raw)
    except (TypeError, ValueError):
        raise MetricError(
            f"the metric must return a number or dspy.Prediction(score=, feedback=), got {result!r}"
        ) from None
    if not math.isfinite(reward) or abs(reward) > MAX_SCORE:
        raise MetricError(
            f"the metric must return a finite score of at most {MAX_SCORE:g}, got {raw}"
        )
    return Score(reward=reward, feedback=str(feedback or ""))


def _accepts(metric: Callable[..., Any], count: int) -> bool:
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):
        return True  # a builtin without a signature: only calling it can tell
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True
