"""Input is checked before any work: how the validation examples are chosen, and kept apart."""

import logging

import dspy
import numpy as np
import pytest
from helpers import Echo, RawAdapter, questions, vowels

from fst_dspy import FST, FSTDistill, LocalLM
from fst_dspy.errors import ConfigError, DataError, ProgramError
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


def test_examples_may_say_that_they_have_no_inputs(tiny_qwen3):
    """Of a program that is asked for nothing, such as another joke each time."""
    blank = [dspy.Example(number=number).with_inputs() for number in range(4)]
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        found = check_input(dspy.Predict(dspy.Signature("-> answer")), vowels, blank, None)
    assert len(found.trainset) + len(found.valset) == 4


class Around(dspy.Module):
    """A program around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, question):
        return self.inner(question=question)


def test_predictors_that_dspy_does_not_list_are_told_of(tiny_qwen3, caplog):
    inner = Echo()
    program = Around(inner)
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        check_input(program, vowels, questions(4), None)
        assert not caplog.records
        inner._compiled = True
        with pytest.raises(ProgramError, match=r"does not list inner\.say, .*_compiled to False"):
            check_input(program, vowels, questions(4), None)
        program.last = Echo()
        check_input(program, vowels, questions(4), None)
        assert "stay as they are: DSPy does not list inner.say, " in caplog.text


def test_the_same_set_for_both_is_refused_with_what_to_do(check):
    examples = questions(6)
    for valset in (examples, questions(6), questions(8)):
        with pytest.raises(DataError, match="leave valset out"):
            check(examples, valset)
    with pytest.raises(DataError, match="one example, once or many times, cannot be split"):
        check(questions(1) * 3)


def test_sets_may_be_anything_that_is_gone_through(check):
    train, val = np.empty(4, dtype=object), iter(questions(2, 4))
    for place, example in enumerate(questions(4)):  # whole, it would be an array of field names
        train[place] = example
    found = check(train, val)
    assert (len(found.trainset), len(found.valset)) == (4, 2)
    with pytest.raises(DataError, match="Example, got int"):
        check(3)
    endless = dspy.Example(question="a", answer="b").with_inputs("question")
    endless.links = {"me": endless}
    with pytest.raises(DataError, match=r"trainset\[1\] holds a value that holds itself"):
        check([questions(1)[0], endless])


def test_an_example_keeps_the_id_it_had_whatever_is_written_into_it(check):
    examples = [
        dspy.Example(question=f"number {n}", answer="", seen=[]).with_inputs("question")
        for n in range(4)
    ]
    ids = set(map(example_id, examples))
    found = check(examples)
    for example in examples:
        example.seen.append("something")
    assert {example_id(one) for one in (*found.trainset, *found.valset)} == ids


def test_an_iterator_of_examples_is_gone_through_once(tiny_qwen3):
    for fst in (FST(vowels), FSTDistill(vowels)):
        with (
            dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()),
            pytest.raises(ConfigError, match="unheard"),
        ):
            seeds = [{"unheard": "Do."}]
            fst.compile(Echo(), trainset=iter(questions(4)), seed_candidates=seeds)


def test_a_metric_that_exits_on_labels_does_not_end_the_process(tiny_qwen3):
    def metric(gold, pred, trace=None):
        raise SystemExit(0)

    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        check_input(Echo(), metric, questions(4), None)


def test_a_module_that_holds_the_one_around_it_is_refused_in_words(tiny_qwen3):
    outer, inner = Echo(), Echo()
    outer.inner, inner.outer = inner, outer
    with (
        dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()),
        pytest.raises(ProgramError, match="holds a module that it lies in"),
    ):
        check_input(outer, vowels, questions(4), None)
