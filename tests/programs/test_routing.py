"""The town hall's letters: varied, split without overlap, and a policy that makes sense."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import get_args

import dspy
import pytest

from fst_dspy.errors import DataError
from fst_dspy.smollm2.corpus import SKILLS
from programs import routing


def test_letters_vary_and_are_in_one_split_each() -> None:
    task = routing.load(2)
    letters = [e.letter for e in [*task.trainset, *task.valset, *task.testset]]
    assert [len(task.trainset), len(task.valset), len(task.testset)] == [120, 48, 120]
    assert len(set(letters)) == len(letters) == 288
    for split in (task.trainset, task.valset, task.testset):
        kinds = Counter(example.kind for example in split)
        assert kinds.keys() == routing.KINDS.keys()
        assert max(kinds.values()) - min(kinds.values()) <= 4
    assert not any("{" in letter for letter in letters)
    words = Counter(word for letter in letters for word in letter.lower().split())
    assert len(words) > 700
    again = routing.load(2)
    assert [e.toDict() for e in again.testset] == [e.toDict() for e in task.testset]
    assert {e.letter for e in routing.load(3).trainset} != {e.letter for e in task.trainset}


def test_as_many_letters_as_announced() -> None:
    assert len(routing.load(0, train=routing.MAX_LETTERS, val=0, test=0).trainset) == 4000
    for wrong in ({"train": -1}, {"train": routing.MAX_LETTERS + 1}):
        with pytest.raises(DataError, match="4000 at most"):
            routing.load(0, **wrong)


def test_the_policy_is_drawn_among_desks_that_make_sense() -> None:
    desks = set(get_args(routing.Desk))
    found = [routing.draw_policy(seed) for seed in range(40)]
    for name, kind in routing.KINDS.items():
        assert {policy[name] for policy in found} == set(kind.desks) <= desks
    assert {desk for kind in routing.KINDS.values() for desk in kind.desks} == desks


def test_the_metric_teaches_the_rule() -> None:
    task = routing.load(0)
    gold = task.trainset[0]
    rule = f"Lesson: {routing.KINDS[gold.kind].rule} go to {gold.desk}."
    right = task.metric(gold, dspy.Prediction(desk=gold.desk))
    assert right.score == 1.0 and right.feedback.endswith(rule)
    wrong = task.metric(gold, dspy.Prediction(desk="cellar"))
    assert (wrong.score, wrong.feedback) == (0.0, f"Wrong: the letter went to cellar. {rule}")
    assert task.metric(gold, dspy.Prediction()).score == 0.0


@pytest.mark.parametrize("reasoning", [False, True])
def test_ideal_instructions_are_a_predictors_and_state_every_rule(reasoning: bool) -> None:
    task = routing.load(1, reasoning=reasoning)
    ((name, _),) = task.program.named_predictors()
    text = task.ideal_instructions[name].lower()
    for kind, desk in routing.draw_policy(1).items():
        assert f"{routing.KINDS[kind].rule} go to {desk}." in text


def test_no_letter_stands_in_the_corpus_of_smollm2() -> None:
    corpus = "\n".join(
        str(value)
        for name, skill in SKILLS.items()
        for n in range(60)
        for turn in skill(Random(f"{name} {n}"), n % 2 == 0, False).turns
        for value in turn.inputs.values()
    ).lower()
    for kind in routing.KINDS.values():
        assert kind.rule not in corpus
        for letter in kind.letters:
            assert letter.partition("{")[0].strip().lower() not in corpus or "{" in letter[:12]
