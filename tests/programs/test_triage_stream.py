"""The stream of triage policies: the same tickets, other queues."""

from __future__ import annotations

import dspy
import pytest

from programs import triage


def tickets(split: list[dspy.Example]) -> list[str]:
    return [example.ticket for example in split]


def test_tasks_share_tickets_and_splits_but_not_queues() -> None:
    first, *others = triage.stream(4, tasks=4, train=60, val=24, test=36)
    assert len(others) == 3
    own = {example.topic: example.queue for example in first.trainset}
    assert len(own) == 12
    for task in others:
        for split in ("trainset", "valset", "testset"):
            assert tickets(getattr(task, split)) == tickets(getattr(first, split))
        queues = {example.topic: example.queue for example in task.trainset}
        assert queues.keys() == own.keys()
        assert sum(queues[topic] != own[topic] for topic in own) >= 9
        assert task.ideal_instructions != first.ideal_instructions


def test_each_task_has_a_name_and_disjoint_splits() -> None:
    tasks = triage.stream(0, train=60, val=24, test=36)
    assert [task.name for task in tasks] == ["triage", "triage-1", "triage-2"]
    for task in tasks:
        texts = [*tickets(task.trainset), *tickets(task.valset), *tickets(task.testset)]
        assert len(set(texts)) == len(texts) == 120


@pytest.mark.parametrize("policy", [0, 1, 2])
def test_a_task_of_the_stream_is_the_task_of_its_policy(policy: int) -> None:
    streamed, loaded = triage.stream(3, train=20)[policy], triage.load(3, policy, train=20)
    assert [e.toDict() for e in streamed.testset] == [e.toDict() for e in loaded.testset]
    assert streamed.ideal_instructions == loaded.ideal_instructions


def test_the_metric_of_a_task_knows_its_own_policy_only() -> None:
    first, second = triage.stream(4, tasks=2, train=60)
    for old, new in zip(first.trainset, second.trainset, strict=True):
        if old.queue != new.queue:
            assert second.metric(new, dspy.Prediction(queue=old.queue)).score == 0.0
        verdict = second.metric(new, dspy.Prediction(queue=new.queue))
        assert verdict.score == 1.0
        assert f"Lesson: {new.topic} tickets go to {new.queue}." in verdict.feedback
