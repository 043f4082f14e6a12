"""The programs that come with the package: data, labels, metrics and what feedback says."""

from __future__ import annotations

from typing import Any

import dspy
import pytest

from fst_dspy.embedded.corpus.list_program import OPERATIONS
from fst_dspy.errors import DataError
from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.stated import marked_lessons
from fst_dspy.student.candidate import example_id
from fst_dspy.tasks import load_task
from fst_dspy.types import Task

NAMES = ("triage", "star_graph", "list_program", "multihop")


@pytest.fixture(scope="module", params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, seed=3)


def oracle(gold: dspy.Example) -> dspy.Prediction:
    """The prediction that has every label right."""
    labels = dict(gold.labels())
    return dspy.Prediction(**labels, facts=[labels.get("fact", "")])


def spoilt(gold: dspy.Example) -> list[dspy.Prediction]:
    """Predictions with one label wrong, or none at all."""
    wrong = [dspy.Prediction()]
    for name in ("queue", "path", "output", "verdict", "facts"):
        right = oracle(gold).toDict()
        if name in right and right[name] != [""]:
            value: Any = ["nothing"] if name == "facts" else "nothing"
            wrong.append(dspy.Prediction(**{**right, name: value}))
    return wrong


def test_splits_are_disjoint_and_seeded(task: Task) -> None:
    splits = [task.trainset, task.valset, task.testset]
    ids = [{example_id(example) for example in split} for split in splits]
    train = 600 if task.name == "list_program" else 200
    assert [len(split) for split in ids] == [train, 64, 200]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    again, other = load_task(task.name, seed=3), load_task(task.name, seed=4)
    assert [e.toDict() for e in again.testset] == [e.toDict() for e in task.testset]
    assert [e.toDict() for e in other.testset] != [e.toDict() for e in task.testset]


def test_ideal_instructions_name_every_predictor(task: Task) -> None:
    assert set(task.ideal_instructions) == {name for name, _ in task.program.named_predictors()}


def test_the_metric_scores_right_and_wrong(task: Task) -> None:
    for gold in task.testset[:50]:
        assert task.metric(gold, oracle(gold)).score == 1.0
        for pred in spoilt(gold):
            assert task.metric(gold, pred).score == 0.0


def test_lessons_of_the_feedback_are_the_ideal_instructions(task: Task) -> None:
    """All that the ideal prompt adds to the bare one is said by somebody's feedback."""
    for name, predictor in task.program.named_predictors():
        said = {
            lesson
            for gold in task.trainset
            for pred in (oracle(gold), dspy.Prediction())
            for lesson in marked_lessons(task.metric(gold, pred, None, name, None).feedback)
        }
        ideal = task.ideal_instructions[name].split("\n")
        assert ideal[0] == predictor.signature.instructions
        assert said == set(ideal[1:])


def test_what_is_to_be_learned_is_no_copy_of_an_example(task: Task) -> None:
    guard = CopyGuard()
    guard.study(task.trainset)
    for name, predictor in task.program.named_predictors():
        bare = {f"{name}.instructions": predictor.signature.instructions}
        guard.check({f"{name}.instructions": task.ideal_instructions[name]}, bare)


def test_a_star_has_the_arms_and_steps_that_are_asked_for() -> None:
    for example in load_task("star_graph:degree=12,length=5", seed=1).trainset[:5]:
        assert len(example.path.split()) == 6 and example.graph.count(",") == 12 * 5 - 1
    with pytest.raises(DataError, match="of 100 arms of 5 steps cannot be drawn"):
        load_task("star_graph:degree=100,length=5", seed=1)


def test_star_graph_labels_are_the_only_path() -> None:
    for example in load_task("star_graph", seed=1).testset:
        edges = [tuple(edge.split()) for edge in example.graph.split(", ")]
        path = [example.goal]
        while path[0] != example.start:
            (before,) = [a for a, b in edges if b == path[0]]
            path.insert(0, before)
        assert " ".join(path) == example.path
        assert sum(a == example.start for a, _ in edges) == 8


def test_list_programs_never_end_empty_and_use_every_operation() -> None:
    task = load_task("list_program", seed=1)
    assert all(example.output for example in task.trainset)
    rules = dict(
        line[:-1].split(" means ") for line in task.ideal_instructions["predict"].split("\n")[1:]
    )
    assert set(rules.values()) == set(OPERATIONS)
    for example in task.trainset:
        items = tuple(example.words.split())
        for word in example.program.split(" then "):
            items = OPERATIONS[rules[word]](items)
        assert " ".join(items) == example.output


def test_multihop_needs_both_hops() -> None:
    """The first search finds where the person lives, never the fact that settles the claim by
    itself; a query of the right words finds it.
    """
    task = load_task("multihop", seed=1)
    search = task.program.search
    settled = 0
    for example in task.testset:
        first = search(example.claim, 2)
        assert " lives in " in first[0]
        settled += example.fact in first
        _, office, _, town, *_ = example.fact.split()
        assert search(f"{office} {town}", 1) == [example.fact]
    assert settled <= 0.05 * len(task.testset)
    assert search("", 2) == []


def test_multihop_runs_both_predictors_in_turn() -> None:
    task = load_task("multihop", seed=1)
    example = task.testset[0]
    _, office, _, town, *_ = example.fact.split()
    answers = [
        {"reasoning": "", "query": f"{office} {town}"},
        {"reasoning": "", "verdict": example.verdict},
    ]
    with dspy.context(lm=dspy.utils.DummyLM(answers)):
        pred = task.program(claim=example.claim)
    assert task.metric(example, pred).score == 1.0


@pytest.mark.parametrize(("name", "label"), [("star_graph", "path"), ("list_program", "output")])
def test_feedback_can_leave_the_lesson_to_be_seen_in_examples(name: str, label: str) -> None:
    told, shown = load_task(name, 3), load_task(f"{name}:tell=false", 3)
    assert [e.toDict() for e in shown.trainset] == [e.toDict() for e in told.trainset]
    gold = shown.trainset[0]
    for pred in (oracle(gold), spoilt(gold)[0]):
        assert marked_lessons(told.metric(gold, pred).feedback)
        assert not marked_lessons(shown.metric(gold, pred).feedback)
    assert gold[label] in shown.metric(gold, spoilt(gold)[0]).feedback
