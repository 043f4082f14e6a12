"""Intervals: the known ones of known counts, and none where the scores say nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.report.answer.intervals import gain_of, mean_of


def test_means_of_zeros_and_ones_have_wilsons_interval():
    found = mean_of([1.0] * 8 + [0.0] * 2)
    # Agresti and Coull 1998: z = 1.96, 8 of 10.
    assert (found.mean, found.how) == (0.8, "Wilson")
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    none = mean_of([0.0] * 24)
    assert none.low == 0 and none.high == pytest.approx(0.138, abs=1e-3)


def test_gains_of_zeros_and_ones_have_newcombes_interval():
    # 36 right both times, 12 only after, 2 only before: Newcombe 1998, method 10.
    before = [1] * 36 + [0] * 12 + [1] * 2
    after = [1] * 48 + [0] * 2
    found = gain_of(before, after)
    assert found.mean == pytest.approx(0.2) and found.how == "Newcombe"
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    # Four of four say something, and far from all.
    few = gain_of([0] * 4, [1] * 4)
    assert few.mean == 1 and 0.2 < few.low < 0.5 and few.high == pytest.approx(1)


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1))
def test_a_gain_lies_in_its_interval_and_turns_round_with_the_sides(pairs):
    before, after = zip(*pairs, strict=True)
    found, back = gain_of(before, after), gain_of(after, before)
    assert -1 - 1e-9 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high
    assert (-back.high, -back.low) == pytest.approx((found.low, found.high))


def test_other_scores_have_the_bootstraps_interval():
    scores = [n / 40 for n in range(41)]
    found = mean_of(scores)
    assert found.how == "bootstrap" and found == mean_of(scores)
    # Close to that of the normal approximation, 1.96 standard errors.
    assert (found.low, found.high) == pytest.approx((0.408, 0.592), abs=0.015)
    moved = gain_of(scores, [score + 0.1 * (n % 3) for n, score in enumerate(scores)])
    assert 0 < moved.low < moved.mean < moved.high
    alike = mean_of([0.5, 0.5])
    assert (alike.low, alike.high) == (None, None)
