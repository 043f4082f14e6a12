"""Figures over several families and seeds."""

import numpy as np
import pytest

from fst_dspy.errors import DataError
from fst_dspy.measures import (
    interquartile_mean,
    mean_difference,
    paired_difference,
    probability_of_improvement,
)


def test_a_dead_and_a_lucky_seed_do_not_move_the_interquartile_mean():
    found = interquartile_mean({"a": [0.5, 0.52, 0.0, 0.48], "b": [0.5, 1.0, 0.49, 0.51]})
    assert found.mean == pytest.approx(0.5, abs=0.01) and found.n == 8
    assert found.low < 0.5 < found.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        scores = {name: rng.normal(mean, 0.1, 10) for name, mean in (("a", 0.0), ("b", 0.0))}
        found = interquartile_mean(scores, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 0.85 <= covered / 200 <= 0.99


def test_every_resample_has_each_familys_own_seeds():
    # With the families mixed up, some resamples would be of one family alone.
    found = probability_of_improvement({"a": [1.0, 1.0], "b": [0.0, 0.0]}, {"a": [0.0], "b": [1.0]})
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_probability_of_improvement_of_known_scores():
    better = probability_of_improvement({"a": [2.0, 3.0]}, {"a": [1.0, 1.5]})
    assert (better.mean, better.low, better.high) == (1.0, 1.0, 1.0)
    assert probability_of_improvement({"a": [1.0, 3.0]}, {"a": [2.0, 2.0]}).mean == 0.5
    assert probability_of_improvement({"a": [1.0]}, {"a": [1.0]}).mean == 0.5


def test_differences_of_one_family_have_the_paired_interval():
    alone = mean_difference({"a": [0.1, 0.3, 0.2]})
    paired = paired_difference({0: 0.1, 1: 0.3, 2: 0.2}, {0: 0.0, 1: 0.0, 2: 0.0}).difference
    assert (alone.mean, alone.low, alone.high) == pytest.approx(
        (paired.mean, paired.low, paired.high)
    )


def test_the_interval_of_differences_covers_their_mean_as_often_as_it_says():
    # Families differ in their means and in their spread; what is asked about is the mean of these.
    rng, covered = np.random.default_rng(0), 0
    families = (("a", 0.5, 0.01, 3), ("b", -0.2, 0.3, 5), ("c", 0.0, 0.1, 4))
    for _ in range(1000):
        found = mean_difference({f: rng.normal(mean, sd, n) for f, mean, sd, n in families})
        covered += found.low <= 0.1 <= found.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_a_single_seed_has_no_interval():
    assert mean_difference({"a": [1.0, 0.5], "b": [0.0]}).low is None
    assert mean_difference({"a": [0.5, 0.5]}).low == 0.5
    assert interquartile_mean({"a": [1.0], "b": [0.0]}).low is None


@pytest.mark.parametrize(
    "work",
    [
        lambda: interquartile_mean({}),
        lambda: interquartile_mean({"a": []}),
        lambda: interquartile_mean({"a": [float("nan")]}),
        lambda: probability_of_improvement({"a": [1.0]}, {"b": [1.0]}),
    ],
)
def test_what_says_nothing_is_refused(work):
    with pytest.raises(DataError):
        work()
