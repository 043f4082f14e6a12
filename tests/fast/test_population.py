from collections import Counter

import pytest
from gepa.gepa_utils import remove_dominated_programs
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.errors import ConfigError
from fst_dspy.fast.decide import own_wins, worse
from fst_dspy.fast.population import (
    assign,
    best,
    blocks_of,
    choose,
    pareto_front,
    ranked,
)
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Candidate, Population


def candidates_named(count: int) -> list[Candidate]:
    return [make_candidate({"p.instructions": f"text {k}"}) for k in range(count)]


@st.composite
def score_tables(draw: st.DrawFn) -> list[list[float]]:
    width = draw(st.integers(1, 6))
    row = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=width, max_size=width)
    return draw(st.lists(row, min_size=1, max_size=7))


def population_of(scores: list[list[float]]) -> Population:
    val_ids = tuple(f"v{v}" for v in range(len(scores[0])))
    return Population(
        tuple(candidates_named(len(scores))), val_ids, tuple(tuple(row) for row in scores), 0
    )


def test_front_keeps_specialists_and_drops_the_dominated() -> None:
    scores = [[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert pareto_front(scores) == (0, 2)


def test_front_of_nothing_is_empty() -> None:
    assert pareto_front([]) == ()


@given(score_tables())
def test_front_covers_every_example_and_is_minimal(scores: list[list[float]]) -> None:
    front = pareto_front(scores)
    winners = [
        {k for k, row in enumerate(scores) if row[v] == max(r[v] for r in scores)}
        for v in range(len(scores[0]))
    ]
    assert all(set(front) & w for w in winners)
    for k in front:
        assert any(set(front) & w == {k} for w in winners), "a member that adds nothing"


@given(score_tables())
def test_front_agrees_with_gepa_where_means_are_distinct(scores: list[list[float]]) -> None:
    means = [sum(row) / len(row) for row in scores]
    if len(set(means)) < len(means):
        return
    fronts = {
        v: {k for k, row in enumerate(scores) if row[v] == max(r[v] for r in scores)}
        for v in range(len(scores[0]))
    }
    kept = set().union(*remove_dominated_programs(fronts, scores=means).values())
    assert pareto_front(scores) == tuple(sorted(kept))


def test_choose_takes_the_best_mean_then_what_it_misses() -> None:
    a, b, c, d = candidates_named(4)
    scores = [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    chosen = choose([a, b, c, d], scores, list("vwxyz"), 2, 9)
    assert chosen.candidates == (a, c)
    assert chosen.score_K_V == ((1, 1, 1, 0, 0), (0, 0, 0, 1, 1))
    assert (chosen.val_ids, chosen.policy_version) == (("v", "w", "x", "y", "z"), 9)
    # The front is {a, c}: the third place goes to the better mean of the others.
    assert choose([a, b, c, d], scores, list("vwxyz"), 3, 9).candidates == (a, c, b)


@given(score_tables(), st.integers(1, 8), st.randoms())
def test_choose_properties(scores: list[list[float]], k: int, rng) -> None:
    candidates = candidates_named(len(scores))
    val_ids = [f"v{v}" for v in range(len(scores[0]))]
    chosen = choose(candidates, scores, val_ids, k, 0)
    ids = [candidate.id for candidate in chosen.candidates]
    assert len(ids) == len(set(ids)) <= min(k, len(scores))
    table = {c.id: tuple(row) for c, row in zip(candidates, scores, strict=True)}
    assert [table[i] for i in ids] == list(chosen.score_K_V)
    assert sum(chosen.score_K_V[0]) == max(sum(row) for row in scores)
    # Of equals the front keeps the first: in the order that ``choose`` gives them.
    ordered = sorted(zip(candidates, scores, strict=True), key=lambda p: (-sum(p[1]), p[0].id))
    front = {ordered[i][0].id for i in pareto_front([row for _, row in ordered])}
    against = {i: blocks_of(row, table[ids[0]]) for i, row in table.items() if i not in ids}
    if len(ids) < min(k, len(scores)):
        assert all(worse(b) and not own_wins(b) for b in against.values())
    if k > len(front):  # the best mean need not be on the front, and is always kept
        assert all(worse(against[i]) for i in front - set(ids))
    order = list(range(len(scores)))
    rng.shuffle(order)
    again = choose([candidates[i] for i in order], [scores[i] for i in order], val_ids, k, 0)
    assert again == chosen


def test_a_lucky_guesser_does_not_stay_but_a_specialist_does() -> None:
    best_mean, guesser, specialist = candidates_named(3)
    good = [1.0] * 30 + [0.0] * 10
    guesses = [0.0] * 39 + [1.0]  # best where all others failed
    niche = [0.0] * 30 + [1.0] * 5 + [0.0] * 5
    val_ids = [str(v) for v in range(40)]
    scores = [good, guesses, niche]
    assert set(pareto_front(scores)) == {0, 1, 2}
    chosen = choose([best_mean, guesser, specialist], scores, val_ids, 4, 0)
    assert chosen.candidates == (best_mean, specialist)


def test_only_what_was_observed_of_both_keeps_or_sends_away() -> None:
    first, second, third = candidates_named(3)
    seen = [[1.0] * 40, [1.0] * 4 + [None] * 36]
    fitted = [[1.0] * 40, [1.0] * 4 + [0.2] * 36]
    lost, tied, won = ([([a], [b])] * 12 for a, b in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0)))

    def kept(members, scores, met, **more):
        found = choose(
            members,
            scores,
            [str(v) for v in range(40)],
            4,
            0,
            pairs=lambda a, b: met.get((a.id, b.id), []),
            **more,
        )
        return found.candidates

    pair, both = (first.id, second.id), [first, second]
    # All that is against the second is fitted; where it met the first, they tied.
    assert kept(both, fitted, {pair[::-1]: tied}, seen_K_V=seen) == (first, second)
    assert kept(both, fitted, {pair[::-1]: lost}, seen_K_V=seen) == (first,)
    assert kept(both, fitted, {pair[::-1]: lost}, seen_K_V=seen, level=0) == (first, second)
    assert kept(both, fitted, {}, seen_K_V=seen) == (first,), "nothing speaks for it"
    # The third never met the first, and goes by how it did against the second.
    rows = [*fitted, [1.0] * 4 + [0.1] * 36]
    met = {pair[::-1]: tied, (third.id, second.id): won}
    assert kept([first, second, third], rows, met) == (first, second, third)
    met[third.id, second.id] = lost
    assert kept([first, second, third], rows, met) == (first, second)


def test_an_example_counts_for_the_front_where_two_were_seen() -> None:
    seen = [[1.0] * 40, [1.0] * 4 + [None] * 36]
    assert pareto_front(seen) == (0,), "who ties has no win of its own"
    assert pareto_front([[None, 0.0, 1.0], [1.0, 1.0, 0.0]]) == (0, 1)
    assert pareto_front([[None, 0.0, None], [1.0, 1.0, 1.0]]) == (1,)


def test_choose_takes_equal_texts_once() -> None:
    a, b = candidates_named(2)
    chosen = choose([a, a, b], [[1.0], [1.0], [0.0]], ["v"], 3, 0)
    assert chosen.candidates == (a, b)


def test_choose_refuses_nothing() -> None:
    with pytest.raises(ConfigError):
        choose([], [], [], 1, 0)


@given(score_tables(), st.integers(1, 8), st.integers(1, 4))
def test_assign_spreads_evenly(scores: list[list[float]], k: int, times: int) -> None:
    population = population_of(scores)
    slots = assign(population, k * times, k)
    assert len(slots) == k * times
    used = min(k, len(scores))
    order = ranked(population)
    counts = Counter(candidate.id for candidate in slots)
    assert set(counts) == {candidate.id for candidate in order[:used]}
    by_rank = [counts[candidate.id] for candidate in order[:used]]
    assert by_rank == sorted(by_rank, reverse=True)
    assert max(by_rank) - min(by_rank) <= 1
    if len(scores) >= k:
        assert set(by_rank) == {times}


def test_assign_gives_the_remainder_to_the_best() -> None:
    population = population_of([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    low, high, middle = population.candidates
    counts = Counter(candidate.id for candidate in assign(population, 8, 4))
    assert counts == {high.id: 3, middle.id: 3, low.id: 2}


@pytest.mark.parametrize(("group_size", "k"), [(8, 3), (0, 4), (8, 0)])
def test_assign_refuses_uneven_groups(group_size: int, k: int) -> None:
    with pytest.raises(ConfigError, match="multiple"):
        assign(population_of([[1.0]]), group_size, k)


@given(score_tables())
def test_best_has_the_best_mean(scores: list[list[float]]) -> None:
    population = population_of(scores)
    index = best(population)
    assert sum(scores[index]) == max(sum(row) for row in scores)
    assert population.candidates[index] == ranked(population)[0]


def test_choose_prefers_the_front_to_a_good_second_everywhere() -> None:
    best_mean, second, *specialists = candidates_named(5)
    scores = [[1, 1, 1, 0, 0, 0], [0, 0, 0, 0.5, 0.5, 0.5]]
    scores += [[0, 0, 0, *(float(v == k) for v in range(3))] for k in range(3)]
    chosen = choose([best_mean, second, *specialists], scores, list("uvwxyz"), 4, 0)
    assert second not in chosen.candidates
    assert set(pareto_front(scores)) == {0, 2, 3, 4}
