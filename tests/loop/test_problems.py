"""Which problems the next step gets."""

import dspy
import pytest
from helpers import questions
from hypothesis import given
from hypothesis import strategies as st
from records import make_group

from fst_dspy.loop import problems
from fst_dspy.loop.problems import LEAST, ProblemStream
from fst_dspy.student.candidate import example_id


def asked(picked):
    return [example.question for example in picked]


def group(example, *rewards):
    return make_group(rewards, example_id=example_id(example))


def steps(stream, train, count, number, revisit=1.0, seed=0):
    seen = []
    for _ in range(number):
        picked, stream = stream.pick(train, count, seed, revisit)
        seen += picked
    return seen, stream


def test_problems_come_in_whole_shuffled_epochs():
    train = questions(5)
    seen = asked(steps(ProblemStream(), train, 2, 5)[0])
    assert sorted(seen[:5]) == sorted(seen[5:]) == sorted(asked(train))
    assert seen[:5] != seen[5:]


@given(
    size=st.integers(1, 12),
    count=st.integers(1, 12),
    revisit=st.floats(0.01, 1.0),
    streaks=st.lists(st.integers(0, 30), min_size=12, max_size=12),
    seed=st.integers(0, 1000),
)
def test_a_step_gets_its_number_of_problems_each_once_where_there_are_enough(
    size, count, revisit, streaks, seed
):
    train = questions(size)
    constant = {example_id(e): n for e, n in zip(train, streaks, strict=False) if n}
    stream = ProblemStream(constant=constant)
    picked, behind = stream.pick(train, count, seed, revisit)
    assert len(picked) == count
    assert len(set(asked(picked))) == min(size, count)
    assert behind.position > stream.position and behind.constant == constant
    assert (picked, behind) == stream.pick(train, count, seed, revisit)


def test_constant_groups_in_a_row_are_counted_until_one_varies():
    first, second = questions(2)
    stream = ProblemStream().after([group(first, 1.0, 1.0), group(second, 0.0, 1.0)])
    assert stream.constant == {example_id(first): 1}
    stream = stream.after([group(first, 0.0, 0.0), group(second, 0.0, 0.0)])
    assert stream.constant == {example_id(first): 2, example_id(second): 1}
    # One group a candidate: the problem has said something if one of them has.
    stream = stream.after([group(first, 1.0, 1.0), group(first, 0.0, 1.0)])
    assert stream.constant == {example_id(second): 1}


@pytest.mark.parametrize(("streak", "share"), [(1, 0.5), (2, 0.25), (9, LEAST)])
def test_settled_problems_are_picked_as_often_as_they_should(streak, share):
    train = questions(40)
    settled = {example_id(e): streak for e in train[:20]}
    epochs = 400
    stream, picked = ProblemStream(constant=settled), []
    while stream.position < epochs * len(train):
        some, stream = stream.pick(train, 4, 0, 0.5)
        picked += some
    count = sum(example_id(e) in settled for e in picked)
    open_ = len(picked) - count
    assert open_ == pytest.approx(epochs * 20, rel=0.01)
    assert count == pytest.approx(share * epochs * 20, rel=0.1)


def test_without_a_preference_every_turn_is_taken():
    train = questions(6)
    stream = ProblemStream(constant={example_id(e): 5 for e in train[:3]})
    seen = steps(stream, train, 3, 2, revisit=1.0)[0]
    assert sorted(asked(seen)) == sorted(asked(train))


def test_equal_examples_are_problems_of_their_own():
    twins = [dspy.Example(question="same").with_inputs("question") for _ in range(3)]
    assert len(ProblemStream().pick(twins, 3, 0, 1.0)[0]) == 3


def test_an_epoch_is_put_in_order_once():
    """Of many problems that takes a while, and a step takes few of them."""
    problems._epoch.cache_clear()
    steps(ProblemStream(), questions(20), 2, 5)
    assert problems._epoch.cache_info().misses == 1
