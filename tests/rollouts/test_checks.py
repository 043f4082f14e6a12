"""Input is checked before any work: how the validation examples are chosen, and kept apart."""

import logging

import dspy
import pytest
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import LocalLM
from fst_dspy.errors import DataError
from fst_dspy.rollouts.checks import check_input
from fst_dspy.student.candidate import example_id


@pytest.fixture
def check(tiny_qwen3):
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        yield lambda train, val=None, **options: check_input(Echo(), vowels, train, val, **options)


def asked(examples):
    return [example.question for example in examples]


@pytest.mark.parametrize(
    ("count", "options", "held_out"),
    [
        (5000, {}, 48),
        (5000, {"val_size": 7}, 7),
        (100, {}, 20),
        (4, {}, 1),
        (2, {"val_size": 9}, 1),
    ],
)
def test_a_fifth_is_held_out_and_no_more_than_is_scored(check, count, options, held_out):
    found = check(questions(count), **options)
    assert (len(found.trainset), len(found.valset)) == (count - held_out, held_out)
    both = [*asked(found.trainset), *asked(found.valset)]
    assert sorted(both) == sorted(asked(questions(count)))


def test_the_split_is_drawn_with_the_seed_so_that_sorted_sets_are_mixed(check):
    examples = questions(200)
    found = check(examples)
    places = [asked(examples).index(question) for question in asked(found.valset)]
    assert places == sorted(places) and places[0] < 40 and places[-1] > 160
    assert asked(check(examples).valset) == asked(found.valset)
    assert asked(check(examples, seed=1).valset) != asked(found.valset)


def test_no_example_is_in_both_sets(check, caplog):
    twice = check(questions(10) * 2)
    assert not set(asked(twice.trainset)) & set(asked(twice.valset))
    assert (len(twice.trainset), len(twice.valset)) == (16, 2) and not caplog.records
    with caplog.at_level(logging.WARNING):
        found = check(questions(6), questions(4, 4))
    assert asked(found.trainset) == asked(questions(4))
    assert asked(found.valset) == asked(questions(4, 4))
    assert "2 of 6 training examples are in the valset too" in caplog.text
    ids = {example_id(example) for example in found.trainset}
    assert ids.isdisjoint(example_id(example) for example in found.valset)


def test_the_same_set_for_both_is_refused_with_what_to_do(check):
    examples = questions(6)
    for valset in (examples, questions(6), questions(8)):
        with pytest.raises(DataError, match="leave valset out"):
            check(examples, valset)
    with pytest.raises(DataError, match="cannot be split"):
        check(questions(1) * 3)
