"""Measures on curves, seeds and examples, each on a case whose answer is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from records import make_cycle
from scipy import stats

import fst_dspy
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.measures import (
    area_under_curve,
    asymptote,
    fit_sigmoid,
    kl_at_matched_score,
    kl_at_score,
    mean_at_k,
    mean_curve,
    mean_interval,
    paired_difference,
    rollouts_to_score,
    score_curve,
    sigmoid,
    steps_to_score,
    x_to_score,
)
from fst_dspy.results.plots import Curve
from fst_dspy.types import RolloutCounts

X, Y = (48.0, 200.0, 400.0, 600.0), (0.1, 0.5, 0.4, 0.8)

fewer = settings(max_examples=60)

scores = st.integers(0, 64).map(lambda n: n / 64)
points = st.lists(st.tuples(st.integers(0, 1000), scores), min_size=1, max_size=12)
curves = points.map(lambda pairs: tuple(zip(*sorted(pairs, key=lambda p: p[0]), strict=True)))


def record(cycle, score, kl=0.0):
    """A cycle that ran 100 rollouts to learn and 10 to validate, and took 6 steps."""
    counts = RolloutCounts(fast=60 * cycle, slow=40 * cycle, eval=10 * (cycle + 1), reused=7)
    return make_cycle(cycle, score, counts, step=6 * cycle, kl_to_base=kl)


def run(*pairs):
    return [record(cycle, score, kl) for cycle, (score, kl) in enumerate(pairs)]


def test_measures_are_public():
    assert fst_dspy.measures.x_to_score is x_to_score


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "options", "expected"),
    [
        (0.05, {}, 48),
        (0.3, {}, 200),
        (0.5, {}, 200),
        (0.6, {}, 600),
        (0.9, {}, None),
        (0.3, {"interpolation": "linear"}, 124),
        (0.05, {"interpolation": "linear"}, 48),
        (0.65, {"interpolation": "linear"}, 500),
        (0.6, {"interpolation": "linear", "running_best": False}, 500),
        (0.9, {"interpolation": "linear"}, None),
    ],
)
def test_x_to_score(score, options, expected):
    found = x_to_score(X, Y, score, **options)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_rollouts_of_all_channels_and_steps_to_a_score():
    records = run((0.1, 0), (0.4, 0), (0.7, 0))
    assert rollouts_to_score(records, 0.7) == 230  # 200 to learn, 30 to validate, none reused
    assert rollouts_to_score(records, 0.25, interpolation="linear") == pytest.approx(65)
    assert steps_to_score(records, 0.4) == 6
    assert steps_to_score(records, 0.8) is None
    assert score_curve(records).x == (10, 120, 230)
    assert score_curve(records, "steps").x == (0, 6, 12)


def test_what_is_known_within_a_cycle_counts_from_then_on():
    first, *others = run((0.1, 0), (0.4, 0), (0.7, 0))
    second = replace(others[0], early_scores=((40, 0.3), (80, 0.4)))
    records = (first, second, *others[1:])
    assert score_curve(records).x == (10, 40, 80, 120, 230)
    assert score_curve(records).y == (0.1, 0.3, 0.4, 0.4, 0.7)
    assert score_curve(records, "steps").x == (0, 0, 0, 6, 12)
    assert rollouts_to_score(records, 0.3) == 40 and steps_to_score(records, 0.3) == 0


@pytest.mark.parametrize(
    ("budget", "options", "expected"),
    [
        (600, {}, (0.1 * 200 + 0.5 * 200 + 0.4 * 200) / 600),
        (600, {"running_best": True}, (0.1 * 200 + 0.5 * 400) / 600),
        (300, {}, (0.1 * 200 + 0.5 * 100) / 300),
        (1000, {}, (0.1 * 200 + 0.5 * 200 + 0.4 * 200 + 0.8 * 400) / 1000),
        (40, {}, 0.1),
        (600, {"interpolation": "linear"}, (4.8 + 0.3 * 152 + 0.45 * 200 + 0.6 * 200) / 600),
        (300, {"interpolation": "linear"}, (4.8 + 0.3 * 152 + 0.475 * 100) / 300),
    ],
)
def test_area_under_curve(budget, options, expected):
    assert area_under_curve(X, Y, budget, **options) == pytest.approx(expected)


def test_the_mean_curve_holds_each_score_until_the_next_one():
    one, two = Curve("a", (0, 10, 20, 40), (0.0, 0.4, 0.2, 0.8)), Curve("b", (5, 20, 30), (0, 1, 0))
    mean = mean_curve([one, two], "both")
    assert (mean.label, mean.x) == ("both", (5, 10, 20, 30)), (
        "from where both are to where one ends"
    )
    assert mean.y == pytest.approx((0.0, 0.2, 0.6, 0.1))
    assert mean_curve([one]).y == pytest.approx(one.y)
    with pytest.raises(DataError, match="begins at 50"):
        mean_curve([one, Curve("late", (50, 60), (1, 1))])
    with pytest.raises(DataError, match="at least one"):
        mean_curve([])


@fewer
@given(curves, scores)
def test_reaching_depends_on_the_order_of_scores_alone(curve, score):
    x, y = curve
    found = x_to_score(x, y, score)
    assert found == x_to_score(x, [v**3 - 2 for v in y], score**3 - 2)
    assert found == x_to_score(x, y, score, running_best=False)
    assert (found is None) == (max(y) < score)
    linear = x_to_score(x, y, score, interpolation="linear")
    assert linear is None if found is None else x[0] <= linear <= found


@fewer
@given(curves, scores, scores)
def test_a_better_score_is_not_reached_earlier(curve, low, high):
    assume(low <= high)
    for interpolation in ("step", "linear"):
        first, then = (x_to_score(*curve, s, interpolation=interpolation) for s in (low, high))
        assert then is None or first <= then


@fewer
@given(curves, st.integers(1, 1500), st.booleans(), st.sampled_from(["step", "linear"]))
def test_area_is_a_mean_of_scores_in_any_unit(curve, budget, running_best, interpolation):
    x, y = curve
    options = {"running_best": running_best, "interpolation": interpolation}
    area = area_under_curve(x, y, budget, **options)
    assert min(y) - 1e-12 <= area <= max(y) + 1e-12
    assert area == pytest.approx(area_under_curve([8 * v for v in x], y, 8 * budget, **options))
    better = [min(1, v + 0.25) for v in y]
    assert area_under_curve(x, better, budget, **options) >= area - 1e-12


@fewer
@given(curves, st.integers(1, 1500))
def test_area_is_the_budget_left_once_a_score_is_reached(curve, budget):
    x, y = (0, *curve[0]), (0.0, *curve[1])
    left = 0.0
    for n in range(1, 65):
        at = x_to_score(x, y, n / 64)
        left += 0 if at is None else max(0.0, 1 - at / budget)
    assert area_under_curve(x, y, budget, running_best=True) == pytest.approx(left / 64)


def test_kl_at_matched_score():
    ours = run((0.1, 0), (0.6, 0.02), (0.9, 0.05), (0.92, 0.03))
    theirs = run((0.1, 0), (0.5, 0.3), (0.6, 0.2), (0.55, 0.5))
    assert kl_at_score(ours, 0.7) == 0.03  # it came back towards the base
    assert kl_at_score(theirs, 0.7) is None
    matched = kl_at_matched_score(ours, theirs)
    assert (matched.score, matched.kl, matched.reference_kl) == (0.6, 0.02, 0.2)
    assert matched.reduction == pytest.approx(0.9)
    assert kl_at_matched_score(theirs, ours).reduction == pytest.approx(-9)
    unreached = kl_at_matched_score(ours, theirs, score=0.7)
    assert (unreached.kl, unreached.reference_kl, unreached.reduction) == (0.03, None, None)
    assert kl_at_matched_score(ours, theirs, score=0.1).reduction is None  # no drift to reduce
    for order in ((math.nan, 0.2, 0.3), (0.3, math.nan, 0.2)):  # one that is no number is none
        odd = run(*((0.6, kl) for kl in order))
        assert kl_at_score(odd, 0.6) == 0.2
        assert kl_at_matched_score(odd, theirs, score=0.6).reduction == pytest.approx(0)
    assert kl_at_score(run((0.6, math.nan)), 0.6) is None
    assert kl_at_matched_score(run((0.6, math.inf)), theirs, score=0.6).reduction is None


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ((), (), "at least one"),
        ((1, 2), (0.1,), "as many"),
        ((2, 1), (0.1, 0.2), "go back"),
        ((1, 2), (0.1, math.nan), "finite"),
    ],
)
def test_malformed_curves(x, y, said):
    for measure in (x_to_score, area_under_curve):
        with pytest.raises(DataError, match=said):
            measure(x, y, 0.5)
    with pytest.raises(DataError, match=said):
        asymptote([(x, y)])


def test_bad_arguments():
    with pytest.raises(ConfigError, match="interpolation"):
        x_to_score(X, Y, 0.5, interpolation="cubic")
    with pytest.raises(ConfigError, match="budget"):
        area_under_curve(X, Y, 0)
    with pytest.raises(DataError, match="at least 0"):
        area_under_curve((-1, 2), (0, 1), 2)
    with pytest.raises(DataError, match="at least one cycle"):
        kl_at_matched_score([], run((0.1, 0)))


# --- asymptote ------------------------------------------------------------------------------------

ROLLOUTS = np.linspace(0, 3000, 16)


def risen(x, end=0.8, start=0.05, mid=700.0, exponent=2.0):
    with np.errstate(divide="ignore"):
        return start + (end - start) / (1 + (mid / np.asarray(x, dtype=float)) ** exponent)


def noisy(seed, end=0.8, noise=0.03):
    rng = np.random.default_rng(seed)
    return ROLLOUTS, np.clip(risen(ROLLOUTS, end) + rng.normal(0, noise, 16), 0, 1)


@settings(max_examples=25)
@given(
    st.floats(0.3, 1), st.floats(0, 0.2), st.floats(300, 1500), st.floats(1, 6), st.floats(0.1, 50)
)
def test_the_parameters_are_found_in_any_unit(end, start, mid, exponent, unit):
    y = risen(ROLLOUTS, end, start, mid, exponent)
    fit = fit_sigmoid(ROLLOUTS * unit, y * 40 - 10, score_range=(-10, 30))
    assert fit.asymptote == pytest.approx(end * 40 - 10, abs=0.02)
    assert fit.start == pytest.approx(start * 40 - 10, abs=0.02)
    assert fit.midpoint == pytest.approx(mid * unit, rel=1e-2)
    assert fit.exponent == pytest.approx(exponent, rel=1e-2)
    assert fit.rmse < 1e-2
    assert fit.rise_seen == pytest.approx(risen(3000, 1, 0, mid, exponent), abs=1e-2)
    assert fit.scores(ROLLOUTS * unit) == pytest.approx(y * 40 - 10, abs=0.02)


def test_asymptote_of_one_run_resamples_residuals():
    found = asymptote([noisy(1)], resamples=40)
    assert found.problem is None and found.resampled == "residuals"
    assert found.low <= found.fit.asymptote <= found.high
    assert found == asymptote([noisy(1)], resamples=40)
    exact = asymptote([(ROLLOUTS, risen(ROLLOUTS))], resamples=20)
    assert (exact.low, exact.high) == pytest.approx((0.8, 0.8), abs=1e-3)


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (5, 0.05)])
def test_the_interval_of_the_asymptote_covers_the_truth(seeds, spread):
    hits = 0
    for trial in range(12):
        rng = np.random.default_rng(trial)
        runs = [noisy(100 * trial + n, 0.8 + spread * rng.normal()) for n in range(seeds)]
        found = asymptote(runs, resamples=60)
        assert found.high - found.low < 0.4
        hits += found.low < 0.8 < found.high
    assert hits >= 9  # 95 % of 12, but for chance


def test_asymptote_over_seeds_resamples_whole_runs():
    runs = [(ROLLOUTS, risen(ROLLOUTS, end)) for end in (0.6, 0.7, 0.8)]
    found = asymptote(runs, resamples=100)
    assert found.resampled == "seeds"
    assert found.fit.asymptote == pytest.approx(0.7, abs=1e-3)
    assert (found.low, found.high) == pytest.approx((0.6, 0.8), abs=0.02)


def test_the_interval_over_few_seeds_is_widened():
    """Two runs: a quarter of the draws see the low one alone, and plain 30 % tails miss them."""
    runs = [(ROLLOUTS, risen(ROLLOUTS, end)) for end in (0.6, 0.8)]
    found = asymptote(runs, resamples=100, confidence=0.4)
    assert (found.low, found.high) == pytest.approx((0.6, 0.8), abs=1e-3)


def test_an_asymptote_that_was_not_seen_is_marked():
    x = ROLLOUTS[:8]
    seen, unseen = (fit_sigmoid(x, risen(x, mid=mid, exponent=3)) for mid in (200, 5000))
    assert seen.rise_seen > 0.95
    assert unseen.rise_seen < 0.3


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (ROLLOUTS, np.full(16, 0.3), "0.3 throughout"),
        ((0, 10, 20, 30), (0, 0.1, 0.2, 0.3), "4 different x"),
    ],
)
def test_a_curve_that_no_sigmoid_fits_is_a_result(x, y, said):
    found = asymptote([(x, y)])
    assert found.fit is None and found.low is None and said in found.problem
    with pytest.raises(DataError, match=said):
        fit_sigmoid(x, y)


def test_a_fit_without_an_interval_says_why(monkeypatch):
    four = asymptote([((1, 10, 100, 1000), (0, 0.1, 0.6, 0.7))])
    assert four.fit is not None and four.high is None and "residuals" in four.problem
    flat = [(ROLLOUTS, risen(ROLLOUTS)), (ROLLOUTS, np.full(16, 0.05))]
    half = asymptote(flat, resamples=40)  # a quarter of the draws take the flat one twice
    assert half.fit is not None and half.low is None
    assert 4 < half.failed < 20 and f"{half.failed} of 40" in half.problem
    monkeypatch.setattr(sigmoid, "MAX_EVALUATIONS", 1)
    assert "no sigmoid fits" in asymptote([noisy(0)]).problem


def test_asymptote_refuses_bad_input():
    for bad, said in (([], "at least one"), ([((0, 1), (0.5, 1.5))], "leave the range")):
        with pytest.raises(DataError, match=said):
            asymptote(bad)
    with pytest.raises(DataError, match="negative"):
        asymptote([((-1, 1), (0, 1))])
    for options in ({"score_range": (1, 1)}, {"resamples": 0}, {"confidence": 1}):
        with pytest.raises(ConfigError):
            asymptote([noisy(0)], **options)


# --- seeds and examples ---------------------------------------------------------------------------


def test_mean_interval():
    found = mean_interval([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3, 5)
    width = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.low, found.high) == pytest.approx((3 - width, 3 + width))
    assert (mean_interval([0.4]).mean, mean_interval([0.4]).low) == (0.4, None)
    for bad in ([], [0.1, math.nan]):
        with pytest.raises(DataError):
            mean_interval(bad)
    with pytest.raises(ConfigError):
        mean_interval([1, 2], confidence=95)


def test_paired_difference_leaves_out_what_the_seeds_share():
    first = {0: 0.9, 1: 0.5, 2: 0.1, 5: 1.0}
    second = {2: 0.0, 0: 0.8, 1: 0.4, 3: 0.7}
    found = paired_difference(first, second)
    assert found.seeds == (0, 1, 2) and found.left_out == (3, 5)
    difference = found.difference
    assert (difference.low, difference.mean, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    with pytest.raises(DataError, match="share no seed"):
        paired_difference({0: 1.0}, {1: 1.0})


@fewer
@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=8))
def test_paired_difference_has_the_interval_of_the_paired_t_test(pairs):
    first, second = zip(*pairs, strict=True)
    assume(len({a - b for a, b in pairs}) > 1)
    found = paired_difference(dict(enumerate(first)), dict(enumerate(second))).difference
    expected = stats.ttest_rel(first, second).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_mean_at_4_of_one_seed():
    found = mean_at_k([{"x": (1, 1, 0, 0), "y": (1, 1, 1, 1)}])
    assert (found.mean, found.k, found.examples, found.seeds) == (0.75, 4, 2, 1)
    assert found.se_examples == pytest.approx(0.25)
    assert found.se_seeds is None
    assert mean_at_k([{"x": (1, 0)}]).se_examples is None


def test_mean_at_k_tells_shared_examples_from_own_ones():
    shared = mean_at_k([{"x": (0,), "y": (1,)}, {"x": (0,), "y": (1,)}])
    assert (shared.mean, shared.examples) == (0.5, 2)
    assert (shared.se_examples, shared.se_seeds) == pytest.approx((0.5, 0))
    own = mean_at_k([{"a": (0,), "b": (1,)}, {"c": (0,), "d": (1,)}])
    assert (own.se_examples, own.examples) == (pytest.approx(0.5 / math.sqrt(2)), 4)
    apart = mean_at_k([{"x": (1,), "y": (1,)}, {"x": (0,), "y": (0,)}])
    assert (apart.se_examples, apart.se_seeds) == pytest.approx((0, 0.5))


def test_an_example_that_is_there_twice_counts_twice():
    found = mean_at_k([{"x": (1,) * 8, "y": (0,) * 4}])
    assert (found.mean, found.k) == (pytest.approx(2 / 3), 4)


@fewer
@given(st.lists(st.lists(scores, min_size=3, max_size=3), min_size=2, max_size=10))
def test_error_over_examples_is_that_of_the_examples_means(samples):
    found = mean_at_k([{str(n): row for n, row in enumerate(samples)}])
    assert found.se_examples == pytest.approx(stats.sem(np.mean(samples, axis=1)))
    assert found.mean == pytest.approx(np.mean(samples))


@pytest.mark.parametrize(
    "bad", [[], [{}], [{"x": ()}], [{"x": (1,)}, {}], [{"x": (1, 1), "y": (1, 1, 1)}]]
)
def test_mean_at_k_refuses(bad):
    with pytest.raises(DataError, match="mean@k needs"):
        mean_at_k(bad)
    with pytest.raises(DataError, match="not finite"):
        mean_at_k([{"x": (math.nan,)}])
