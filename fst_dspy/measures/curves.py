"""Score curves of runs: what it takes to reach a score, the area under them, KL at matched score.

A curve is a score y measured at points x (rollouts, optimizer steps) that never go back. Nothing is
known between two measurements. ``interpolation="step"``, the default, lets a score count from the
point at which it was measured until the next one: nothing is credited before it was seen.
``"linear"`` joins the measurements by straight lines, as figures do; a run whose score jumps within
one cycle is then credited with a share of the jump before it had run the cycle's rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fst_dspy.errors import ConfigError, DataError
from fst_dspy.results.plots import Curve, score_curves
from fst_dspy.types import CycleRecord

Interpolation = Literal["step", "linear"]


@dataclass(frozen=True)
class MatchedKL:
    """The KL to the base of two runs at one score.

    Attributes:
        score: The score that both are taken at.
        kl, reference_kl: Nats a token; ``None`` for a run that never measured that score.
        reduction: ``1 - kl / reference_kl``: 0.7 means 70 % less drift, below 0 means more.
            ``None`` where a run never got there or the reference has not moved.
    """

    score: float
    kl: float | None
    reference_kl: float | None
    reduction: float | None


def score_curve(
    records: Sequence[CycleRecord], against: Literal["rollouts", "steps"] = "rollouts"
) -> Curve:
    """A run's validation score against the rollouts of all channels, or the optimizer steps.

    Args:
        records: The cycles of one run, in order.
        against: Rollouts count both channels and validation; steps are the slow channel's alone,
            as in the paper.
    """
    (curve,) = score_curves({"validation score": records})
    if against == "rollouts":
        return curve
    steps, taken = [], 0
    for record in records:  # what is known early is known before the weights move
        steps += [float(taken)] * len(record.early_scores) + [float(record.step)]
        taken = record.step
    return Curve(curve.label, tuple(steps), curve.y)


def x_to_score(
    x: Sequence[float],
    y: Sequence[float],
    score: float,
    *,
    running_best: bool = True,
    interpolation: Interpolation = "step",
) -> float | None:
    """The least x at which a curve has reached a score.

    Args:
        x: Where the scores were measured, in order; equal values are allowed.
        y: The scores, as many.
        score: What is to be reached.
        running_best: Take the best score so far at each point, as the paper does for "RL's running
            peak"; otherwise the raw curve. With ``"step"`` the answer is the same.
        interpolation: See the module; ``"linear"`` gives the crossing between two measurements.

    Returns:
        A value between the first and the last x; ``None`` when the score is never reached.

    Raises:
        DataError: The curve is empty, x goes back, or a value is not finite.
        ConfigError: An unknown interpolation.
    """
    x_N, y_N = _curve(x, y, running_best, interpolation)
    reached = np.flatnonzero(y_N >= score)
    if not len(reached):
        return None
    n = reached[0]
    if interpolation == "step" or n == 0:
        return float(x_N[n])
    share = (score - y_N[n - 1]) / (y_N[n] - y_N[n - 1])
    return float(x_N[n - 1] + share * (x_N[n] - x_N[n - 1]))


def rollouts_to_score(
    records: Sequence[CycleRecord],
    score: float,
    *,
    running_best: bool = True,
    interpolation: Interpolation = "step",
) -> float | None:
    """Rollouts of all channels, validation included, until a run has reached a validation score.

    The arguments, the result and the errors are those of ``x_to_score``. The paper (section 4)
    counts RL steps alone, which leaves out what the fast channel runs; see ``steps_to_score``.
    """
    curve = score_curve(records)
    return x_to_score(
        curve.x, curve.y, score, running_best=running_best, interpolation=interpolation
    )


def steps_to_score(
    records: Sequence[CycleRecord],
    score: float,
    *,
    running_best: bool = True,
    interpolation: Interpolation = "step",
) -> float | None:
    """Optimizer steps until a run has reached a validation score; see ``rollouts_to_score``."""
    curve = score_curve(records, "steps")
    return x_to_score(
        curve.x, curve.y, score, running_best=running_best, interpolation=interpolation
    )


def area_under_curve(
    x: Sequence[float],
    y: Sequence[float],
    budget: float,
    *,
    running_best: bool = False,
    interpolation: Interpolation = "step",
) -> float:
    """Area under a score curve from 0 to a budget, divided by the budget: the mean score over it.

    Before its first measurement a curve has its first score, after the last one its last. So give
    runs that are compared the same budget, and none beyond what the shortest of them ran, unless
    holding its last score is what is meant.

    Args:
        x, y, running_best, interpolation: As for ``x_to_score``; x is not negative.
        budget: In units of x, above 0.

    Returns:
        Between the least and the greatest score. For a curve that starts at 0, with ``"step"``, the
        running best and scores in [0, 1], it is the mean over all scores s of the share of the
        budget that is left once s is reached.

    Raises:
        DataError: As for ``x_to_score``, or a negative x.
        ConfigError: An unknown interpolation, or a budget that is not positive and finite.
    """
    x_N, y_N = _curve(x, y, running_best, interpolation)
    if x_N[0] < 0:
        raise DataError(f"an area from 0 needs x of at least 0, got {x_N[0]:g}")
    if not (budget > 0 and math.isfinite(budget)):
        raise ConfigError(f"budget must be positive and finite, got {budget}")
    inside = x_N < budget
    edges = np.concatenate([[0.0], x_N[inside], [budget]])
    score = np.concatenate([y_N[:1], y_N[inside]])
    if interpolation == "step":
        return float(np.diff(edges) @ score / budget)
    last = np.interp(budget, x_N, y_N)
    return float(np.trapezoid(np.append(score, last), edges) / budget)


def mean_curve(curves: Sequence[Curve], label: str = "mean") -> Curve:
    """The mean of several runs' curves, as figures with an average over seeds have it.

    The best of many noisy scores of one run is luck as often as skill; of the mean curve it is so
    by the root of the number of runs less.

    Args:
        curves: One a run. A score counts from where it was measured until the run's next one.
        label: The result's.

    Returns:
        A point wherever any run was measured, from where all have begun to where the first ends.

    Raises:
        DataError: There are no curves, one is none, or they have no part in common.
    """
    if not curves:
        raise DataError("a mean needs at least one curve")
    checked = [checked_curve(curve.x, curve.y) for curve in curves]
    begin, end = max(x_N[0] for x_N, _ in checked), min(x_N[-1] for x_N, _ in checked)
    x_N = np.unique(np.concatenate([x_N for x_N, _ in checked]))
    x_N = x_N[(begin <= x_N) & (x_N <= end)]
    if not len(x_N):
        raise DataError(f"one curve begins at {begin:g}, where another has ended, at {end:g}")
    y_N = np.mean([y[np.searchsorted(x, x_N, side="right") - 1] for x, y in checked], axis=0)
    return Curve(label, tuple(x_N.tolist()), tuple(y_N.tolist()))


def kl_at_score(records: Sequence[CycleRecord], score: float) -> float | None:
    """The smallest KL to the base at which a run has measured a validation score or a better one.

    Over all cycles, not only the first that got there: a run may come closer to the base again.
    Nothing is interpolated, for KL need not grow along a run. One that is no number counts for
    none.

    Returns:
        Nats a token; ``None`` when the score is never reached.
    """
    reached = (record.kl_to_base for record in records if record.val_score >= score)
    return min((kl for kl in reached if not math.isnan(kl)), default=None)


def kl_at_matched_score(
    records: Sequence[CycleRecord],
    reference: Sequence[CycleRecord],
    score: float | None = None,
) -> MatchedKL:
    """Compare the drift of two runs at one score (paper, section 4: KL at matched reward).

    Args:
        records: The run in question.
        reference: The run it is compared with, such as ``rl_only``.
        score: Where to compare; by default the best score that both reach, which is the
            reference's best where the reference is the worse of the two.

    Raises:
        DataError: A run has no records.
    """
    if not records or not reference:
        raise DataError("both runs need at least one cycle record")
    if score is None:
        score = min(max(record.val_score for record in run) for run in (records, reference))
    kl, reference_kl = kl_at_score(records, score), kl_at_score(reference, score)
    reduction = None
    if kl is not None and reference_kl is not None and max(kl, reference_kl) < math.inf:
        reduction = 1 - kl / reference_kl if reference_kl > 0 else None
    return MatchedKL(score, kl, reference_kl, reduction)


def checked_curve(x: Sequence[float], y: Sequence[float]) -> tuple[Any, Any]:
    """A curve as two float arrays of equal length.

    Raises:
        DataError: The curve is empty, x goes back, or a value is not finite.
    """
    x_N, y_N = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x_N.shape != y_N.shape or x_N.ndim != 1 or not len(x_N):
        raise DataError(
            f"a curve needs as many scores as points, at least one; got {x_N.shape}, {y_N.shape}"
        )
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        raise DataError("a curve must be finite; leave out the points that were not measured")
    if (np.diff(x_N) < 0).any():
        raise DataError("the points of a curve must not go back; sort them by x")
    return x_N, y_N


def _curve(
    x: Sequence[float], y: Sequence[float], running_best: bool, interpolation: str
) -> tuple[Any, Any]:
    if interpolation not in ("step", "linear"):
        raise ConfigError(f"interpolation must be 'step' or 'linear', got {interpolation!r}")
    x_N, y_N = checked_curve(x, y)
    return x_N, np.maximum.accumulate(y_N) if running_best else y_N
