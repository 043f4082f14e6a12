"""Means with their uncertainty: over seeds, over examples, and between arms on the same seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fst_dspy.errors import ConfigError, DataError
from fst_dspy.types import Rollout


@dataclass(frozen=True)
class Interval:
    """A mean with its Student t interval.

    Attributes:
        mean: Of n values.
        low, high: The interval; ``None`` with a single value, which says nothing of its spread.
        n: Values, such as seeds.
        confidence: Level of the interval, such as 0.95.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    confidence: float


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms on the same seeds.

    Attributes:
        difference: Mean of first minus second with its interval: without 0 in it, the arms differ.
        seeds: The seeds that both arms have, sorted.
        left_out: Seeds that only one of them has.
    """

    difference: Interval
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class MeanAtK:
    """mean@k: k sampled answers an example, averaged over answers, examples and seeds.

    Attributes:
        mean: Mean of the seeds' means.
        se_examples: Standard error from the draw of examples, the seeds being as they are; ``None``
            with a single example. It holds the noise of sampling too.
        se_seeds: Standard error from the draw of seeds; ``None`` with a single seed. Where every
            seed has examples of its own, it holds their draw too. Where all have the same ones, it
            does not, and the two are to be read side by side.
        k: Samples an example.
        examples: Different examples over all seeds.
        seeds: Runs behind the mean.
    """

    mean: float
    se_examples: float | None
    se_seeds: float | None
    k: int
    examples: int
    seeds: int


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """The mean of some values, one a seed, with its Student t interval.

    Raises:
        DataError: There are no values, or one is not finite.
        ConfigError: A confidence outside (0, 1).
    """
    found = np.asarray(list(values), dtype=float)
    if not len(found) or not np.isfinite(found).all():
        raise DataError("a mean needs at least one value, and all of them finite")
    check_confidence(confidence)
    mean, n = float(found.mean()), len(found)
    error = _standard_error(found)
    if error is None:
        return Interval(mean, None, None, n, confidence)
    width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(mean, mean - width, mean + width, n, confidence)


def check_confidence(confidence: float) -> None:
    """Refuse a level that no interval has.

    Raises:
        ConfigError: It is outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be between 0 and 1, got {confidence}")


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> PairedDifference:
    """Compare two arms by their differences on the same seeds (the paired t test's interval).

    Args:
        first, second: Values by seed.
        confidence: Level of the interval, in (0, 1).

    Raises:
        DataError: They share no seed, or a value is not finite.
        ConfigError: A confidence outside (0, 1).
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise DataError("the arms share no seed, so there is nothing to pair")
    return PairedDifference(
        difference=mean_interval((first[seed] - second[seed] for seed in shared), confidence),
        seeds=tuple(shared),
        left_out=tuple(sorted(first.keys() ^ second.keys())),
    )


def scores_by_example(rollouts: Iterable[Rollout]) -> dict[str, tuple[float, ...]]:
    """The rewards of some rollouts by example id, as ``mean_at_k`` takes them.

    Use it on ``evaluate(runner, [candidate], examples, samples=4).rollouts_K[0]``.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        found[rollout.example_id].append(rollout.reward)
    return {example: tuple(scores) for example, scores in found.items()}


def mean_at_k(runs: Sequence[Mapping[str, Sequence[float]]]) -> MeanAtK:
    """mean@k over seeds and examples, with the standard error of each (paper, section 4: k = 4).

    The errors are those of clustered samples (Miller 2024, "Adding Error Bars to Evals"): an
    example's samples, in all the seeds that have it, are one cluster; a seed's examples are one.

    Args:
        runs: For each seed, the k scores of each example by its id; see ``scores_by_example``.
            Seeds may have the same examples or different ones. An example that is in a test set m
            times has m * k scores, and counts m times.

    Raises:
        DataError: A run is empty, examples differ in their samples, or a score is not finite.
    """
    counts = sorted({len(scores) for run in runs for scores in run.values()})
    if not runs or not all(runs) or counts[0] == 0 or any(n % counts[0] for n in counts):
        raise DataError(
            "mean@k needs at least one run, an example or more in each, and the same number of "
            f"samples of every example; got {len(runs)} runs with {counts} samples"
        )
    seed_means = np.array([np.mean([s for scores in run.values() for s in scores]) for run in runs])
    if not np.isfinite(seed_means).all():
        raise DataError("a score is not finite")
    return MeanAtK(
        mean=float(seed_means.mean()),
        se_examples=_clustered_error(runs, seed_means.tolist()),
        se_seeds=_standard_error(seed_means),
        k=counts[0],
        examples=len({example for run in runs for example in run}),
        seeds=len(runs),
    )


def _clustered_error(
    runs: Sequence[Mapping[str, Sequence[float]]], seed_means: Sequence[float]
) -> float | None:
    """Standard error of the mean of seeds' means over examples that several seeds may share."""
    if min(len(run) for run in runs) < 2:
        return None
    parts: dict[str, float] = defaultdict(float)
    for run, seed_mean in zip(runs, seed_means, strict=True):
        samples = sum(len(scores) for scores in run.values())
        weight = math.sqrt(len(run) / (len(run) - 1)) / (len(runs) * samples)
        for example, scores in run.items():
            parts[example] += weight * sum(score - seed_mean for score in scores)
    return math.sqrt(sum(part**2 for part in parts.values()))


def _standard_error(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(stats.sem(values))
