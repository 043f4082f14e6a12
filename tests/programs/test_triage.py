"""The triage program: its data, its metric, and what the embedded model makes of it."""

from __future__ import annotations

from collections import Counter
from random import Random

import dspy
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_dspy import embedded
from fst_dspy.embedded.corpus import FAMILIES
from fst_dspy.embedded.corpus.base import Question
from fst_dspy.embedded.figures import Score, score
from programs import triage

pytestmark = pytest.mark.slow


def test_splits_share_no_ticket() -> None:
    task = triage.load(3)
    tickets = [e.ticket for e in [*task.trainset, *task.valset, *task.testset]]
    assert [len(task.trainset), len(task.valset), len(task.testset)] == [200, 64, 200]
    assert len(set(tickets)) == len(tickets)
    for split in (task.trainset, task.valset, task.testset):
        assert {example.topic for example in split} == set(triage.TOPICS)


def test_seed_and_policy_decide_the_mapping() -> None:
    assert triage.draw_policy(0) == triage.draw_policy(0)
    assert triage.draw_policy(0) != triage.draw_policy(1)
    first, second = triage.load(0, policy=0), triage.load(0, policy=1)
    assert [e.ticket for e in first.trainset] == [e.ticket for e in second.trainset]
    assert [e.queue for e in first.trainset] != [e.queue for e in second.trainset]


def test_no_ticket_stands_in_the_corpus() -> None:
    corpus = {
        text
        for i in range(300)
        for text in (message.content for message in FAMILIES[0].sample(Random(i), "polish"))
    }
    task = triage.load(0)
    tickets = [e.ticket for e in (*task.trainset, *task.valset, *task.testset)]
    assert not any(ticket in text for ticket in tickets for text in corpus)


def test_metric_teaches_a_lesson() -> None:
    task = triage.load(0)
    gold = task.trainset[0]
    lesson = f"Lesson: {gold.topic} tickets go to {gold.queue}."
    wrong = task.metric(gold, dspy.Prediction(queue="nowhere"))
    assert (wrong.score, wrong.feedback) == (0.0, f"Wrong: the ticket went to nowhere. {lesson}")
    right = task.metric(gold, dspy.Prediction(queue=f" {gold.queue} "), None, "predict", None)
    assert right.score == 1.0 and right.feedback.endswith(lesson)
    assert task.metric(gold, dspy.Prediction()).score == 0.0


def test_ideal_instructions_state_every_rule_for_a_predictor_of_the_program() -> None:
    task = triage.load(0)
    (name,) = [name for name, _ in task.program.named_predictors()]
    text = task.ideal_instructions[name]
    for example in task.testset:
        assert f"{example.topic} tickets go to {example.queue}." in text


def test_too_many_tickets_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 400 of each"):
        triage.draw_tickets(0, 5000)
    with pytest.raises(ValueError, match="topics must be 1 to"):
        triage.load(topics=1000)


def test_a_policy_may_have_more_rules_and_come_as_unevenly_as_words() -> None:
    task = triage.load(2, topics=40, skew=1.0)
    assert triage.draw_policy(2).items() <= triage.draw_policy(2, 0, 40).items()
    seen = Counter(example.topic for example in (*task.trainset, *task.valset, *task.testset))
    assert 20 < len(seen) <= 40 and seen.most_common(1)[0][1] > 60
    tickets = [e.ticket for e in [*task.trainset, *task.valset, *task.testset]]
    assert len(set(tickets)) == len(tickets)
    assert task.ideal_instructions["predict"].count("tickets go to") == 40


@pytest.fixture(scope="module")
def scores() -> dict[bool, Score]:
    """The embedded model's scores on 64 tickets, with the ideal (``True``) and the bare prompt."""
    model = AutoModelForCausalLM.from_pretrained(embedded.path())
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    task = triage.load(0)
    signature = task.program.predict.signature
    questions = [
        Question(
            signature, task.ideal_instructions["predict"], {"ticket": e.ticket}, "queue", e.queue
        )
        for e in task.valset
    ]
    return {ideal: score(model, tokenizer, questions, ideal, seed=0) for ideal in (True, False)}


def test_embedded_model_leaves_room_to_learn(scores: dict[bool, Score]) -> None:
    assert 0.45 <= scores[True].accuracy <= 0.95
    assert scores[False].accuracy < 0.2


def test_embedded_model_keeps_to_the_format(scores: dict[bool, Score]) -> None:
    assert scores[True].parsed >= 0.9 and scores[False].parsed >= 0.75
