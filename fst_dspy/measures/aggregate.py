"""Several families of tasks at once: one figure for an arm, with an interval over seeds.

After Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice":
interquartile means and probabilities of improvement, with bootstrap intervals stratified by family,
so that every resample has as many seeds of each family as there were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fst_dspy.errors import DataError
from fst_dspy.measures.statistics import Interval, check_confidence

RESAMPLES = 5000
Scores = Mapping[str, Sequence[float]]
"""For each family, one score a seed; families need not have the same number of seeds."""


def interquartile_mean(scores: Scores, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of the middle half of all scores of all families, and its bootstrap interval.

    A dead seed does not move it, as it would a mean, and neither does a lucky one.

    Args:
        scores: Of one arm, on a common scale.
        confidence: Level of the interval.
        seed: Of the resamples.

    Raises:
        DataError: There is no family, or one without scores, or a score is not finite.
    """
    samples = _checked(scores)

    def statistic(resampled: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.asarray(stats.trim_mean(np.concatenate(resampled, axis=-1), 0.25, axis=-1))

    return _bootstrapped(samples, statistic, confidence, seed)


def probability_of_improvement(
    first: Scores, second: Scores, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """How probable it is that one arm beats another on a family drawn at random; ties count half.

    Above one half with the whole interval, the first arm is better.

    Args:
        first, second: Scores of two arms on the same families.
        confidence, seed: As for ``interquartile_mean``.

    Raises:
        DataError: They have not the same families, or as ``interquartile_mean``.
    """
    if first.keys() != second.keys():
        raise DataError(f"the arms have other families: {sorted(first)} and {sorted(second)}")
    samples = [*_checked(first), *_checked({name: second[name] for name in first})]

    def statistic(resampled: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        half = len(resampled) // 2
        return np.mean(
            [
                np.sign(a[..., :, None] - b[..., None, :]).mean((-2, -1)) / 2 + 0.5
                for a, b in zip(resampled[:half], resampled[half:], strict=True)
            ],
            axis=0,
        )

    return _bootstrapped(samples, statistic, confidence, seed)


def mean_difference(differences: Scores, confidence: float = 0.95) -> Interval:
    """Mean over families of the mean differences of two arms, one a seed, with a t interval.

    The error is that of the seeds within each family, so it speaks of these families; the degrees
    of freedom are Satterthwaite's. A family of one seed has no error of its own, and then there is
    no interval.

    Args:
        differences: Of two arms on the same seeds, by family.
        confidence: Level of the interval, in (0, 1).

    Raises:
        DataError: As for ``interquartile_mean``.
        ConfigError: A confidence outside (0, 1).
    """
    samples = _checked(differences)
    check_confidence(confidence)
    value, n = float(np.mean([sample.mean() for sample in samples])), sum(map(len, samples))
    if any(len(sample) == 1 for sample in samples):
        return Interval(value, None, None, n, confidence)
    freedom = np.array([len(sample) - 1 for sample in samples])
    variance = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    total = float(variance.sum())
    if total == 0:
        return Interval(value, value, value, n, confidence)
    width = stats.t.ppf((1 + confidence) / 2, total**2 / (variance**2 / freedom).sum())
    width *= math.sqrt(total) / len(samples)
    return Interval(value, value - float(width), value + float(width), n, confidence)


def _checked(scores: Scores) -> list[NDArray[np.float64]]:
    samples = [np.asarray(values, dtype=np.float64) for values in scores.values()]
    if not samples or not all(len(s) and np.isfinite(s).all() for s in samples):
        raise DataError("each family needs at least one score, all of them finite")
    return samples


def _bootstrapped(
    samples: Sequence[NDArray[np.float64]],
    statistic: Callable[[Sequence[NDArray[np.float64]]], NDArray[np.float64]],
    confidence: float,
    seed: int,
) -> Interval:
    rng = np.random.default_rng(seed)
    value, n = float(statistic(samples)), sum(map(len, samples))
    if all(len(sample) == 1 for sample in samples):
        return Interval(value, None, None, n, confidence)
    resampled = [
        sample[rng.integers(0, len(sample), (RESAMPLES, len(sample)))] for sample in samples
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(resampled), [tail, 1 - tail])
    return Interval(value, float(low), float(high), n, confidence)
