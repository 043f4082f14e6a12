"""The one rule by which scores decide: exact, at its rate, and with the power to be of use."""

import random

import pytest
from scipy.stats import binomtest, permutation_test

from fst_dspy.fast.decide import LEVEL, LIKELY, better, chance, own_wins, share, worse


def single(wins, losses, ties=3):
    return [([1], [0])] * wins + [([0], [1])] * losses + [([1], [1])] * ties


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (4, 0), (5, 0), (6, 1), (7, 1), (3, 9)])
def test_of_single_samples_it_is_the_sign_test(wins, losses):
    exact = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1
    assert chance(single(wins, losses)) == pytest.approx(exact, abs=0.02)
    assert worse(single(losses, wins)) is better(single(wins, losses))


def test_of_pairs_it_is_scipys_permutation_test():
    rng = random.Random(0)
    own, other = ([rng.gauss(mean, 1) for _ in range(14)] for mean in (0.5, 0))
    scipys = permutation_test(
        (own, other),
        lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
    )
    ours = chance([([a], [b]) for a, b in zip(own, other, strict=True)])
    assert ours == pytest.approx(scipys.pvalue, abs=0.02)


def blocks(own, other, count, rng, gain=0.0):
    """Rewards of 0 or 1 on problems from easy to hard, so many of the one and of the other."""
    found = []
    for _ in range(count):
        right = rng.random()
        found.append(
            (
                [float(rng.random() < min(1, right + gain)) for _ in range(own)],
                [float(rng.random() < right) for _ in range(other)],
            )
        )
    return found


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 2, 24), (2, 6, 24)])
@pytest.mark.parametrize("level", [LEVEL, LIKELY])
def test_equals_are_told_apart_at_the_rate_at_most(shape, level):
    rng, times = random.Random(1), 300
    said = sum(better(blocks(*shape, rng), level) for _ in range(times))
    assert binomtest(said, times, level, alternative="greater").pvalue > 0.01
    assert said > 0.25 * level * times, "or the test would be too timid to be of use"


def test_looks_share_the_rate_and_a_true_gain_is_found():
    rng, times, said, found = random.Random(2), 150, 0, 0
    for _ in range(times):
        equal, gained = blocks(2, 2, 48, rng), blocks(2, 2, 48, rng, gain=0.25)
        said += any(better(equal[:n], share(4)) for n in (12, 24, 36, 48))
        found += any(better(gained[:n], share(4)) for n in (12, 24, 36, 48))
    assert binomtest(said, times, LEVEL, alternative="greater").pvalue > 0.01
    assert found > 0.6 * times


def test_rewards_in_any_range_and_unequal_numbers():
    lower = [([0.1, 0.2], [0.5, 0.4, 0.6])] * 6
    assert worse(lower) and not better(lower)
    scaled = [([1e6 * r - 5 for r in a], [1e6 * r - 5 for r in b]) for a, b in lower]
    assert chance(scaled) == chance(lower)
    assert chance([]) == chance([([1.0], [1.0])] * 9) == 1.0


def test_wins_of_its_own_are_more_than_chance():
    specialist = single(5, 30, 5)
    assert worse(specialist) and own_wins(specialist)
    assert not own_wins(single(1, 20, 10))
    rng = random.Random(3)
    guesses = [
        [([float(rng.random() < 0.1)], [float(rng.random() < 0.7)]) for _ in range(48)]
        for _ in range(100)
    ]
    assert sum(map(own_wins, guesses)) <= 10
