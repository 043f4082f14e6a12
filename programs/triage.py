"""Ticket routing under a hidden policy: which queue each of 12 topics goes to.

The policy is drawn from the seed, so no model can know it: it has to be learned from feedback, and
it fits in 12 lines of instruction. ``policy`` changes the mapping alone, for streams of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import dspy

from fst_dspy.errors import DataError
from fst_dspy.types import Task

TOPICS = (
    "visa", "refund", "baggage", "parking", "catering", "wifi",
    "insurance", "passport", "shuttle", "loyalty", "upgrade", "delay",
)  # fmt: skip
QUEUES = (
    "amber", "silver", "cobalt", "ivory", "crimson", "jade", "onyx", "coral",
    "indigo", "violet", "bronze", "pearl", "topaz", "ochre", "teal", "maroon",
)  # fmt: skip
INSTRUCTIONS = "Route the support ticket to the right queue."

_OPENINGS = (
    "Hello,", "Hi,", "Dear team,", "Good morning,", "Please note:", "One question:", "Sorry,", "",
)  # fmt: skip
_BODIES = (
    "my {} was refused at the desk",
    "I have waited two weeks for an answer about {}",
    "the {} page does not load on my phone",
    "who can explain the {} to me",
    "we need help with the {} for our group",
    "your agent gave me the wrong {} form",
    "I do not understand the {} charge on my bill",
    "how long does {} take",
    "they lost the papers for my {}",
    "can I still change my {} today",
)
_CLOSINGS = ("Please help.", "Thank you.", "It is urgent.", "Any news?", "Best wishes.")


class RouteTicket(dspy.Signature):
    """Route the support ticket to the right queue."""

    ticket: str = dspy.InputField()
    queue: str = dspy.OutputField(desc=f"one of: {', '.join(QUEUES)}")


def draw_policy(seed: int, policy: int = 0) -> dict[str, str]:
    """The hidden mapping from topic to queue: 12 different queues out of 16."""
    return dict(zip(TOPICS, Random(f"triage {seed} {policy}").sample(QUEUES, 12), strict=True))


def draw_tickets(seed: int, count: int) -> list[tuple[str, str]]:
    """``count`` different tickets with their topics, the topics as even as can be.

    Raises:
        DataError: More are asked for than can be written (4,800).
    """
    texts = {
        topic: [
            " ".join(part for part in (opening, body.format(topic) + ".", closing) if part)
            for opening in _OPENINGS
            for body in _BODIES
            for closing in _CLOSINGS
        ]
        for topic in TOPICS
    }
    limit = sum(map(len, texts.values()))
    if count > limit:
        raise DataError(f"{count} different tickets asked for; there are {limit}")
    rng = Random(f"triage tickets {seed}")
    for lines in texts.values():
        rng.shuffle(lines)
    tickets = [(texts[TOPICS[i % 12]][i // 12], TOPICS[i % 12]) for i in range(count)]
    rng.shuffle(tickets)
    return tickets


def make_metric(policy: Mapping[str, str]) -> Callable[..., dspy.Prediction]:
    """The metric, in GEPA's form: 1 for the right queue, and what a human reviewer would say."""

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        answer = str(getattr(pred, "queue", "")).strip()
        right = answer == gold.queue
        lesson = f"Lesson: {gold.topic} tickets go to {policy[gold.topic]}."
        verdict = "Right" if right else "Wrong"
        return dspy.Prediction(
            score=float(right),
            feedback=f"{verdict}: the ticket went to {answer or 'no queue'}. {lesson}",
        )

    return metric


def load(seed: int = 0, policy: int = 0, train: int = 200, val: int = 64, test: int = 200) -> Task:
    """The task: ``seed`` draws tickets and policies, ``policy`` picks one of the seed's policies.

    Tasks of one seed and different ``policy`` have the same tickets in the same splits, with other
    right queues. No ticket is in two splits.

    Raises:
        DataError: More tickets than there are, or a negative number.
    """
    if min(train, val, test) < 0:
        raise DataError(f"a split cannot have fewer than 0 tickets: {train}, {val}, {test}")
    mapping = draw_policy(seed, policy)
    examples = [
        dspy.Example(ticket=text, queue=mapping[topic], topic=topic).with_inputs("ticket")
        for text, topic in draw_tickets(seed, train + val + test)
    ]
    rules = "\n".join(f"{topic} tickets go to {queue}." for topic, queue in mapping.items())
    return Task(
        name="triage" if policy == 0 else f"triage-{policy}",
        program=dspy.ChainOfThought(RouteTicket),
        metric=make_metric(mapping),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        ideal_instructions={"predict": f"{INSTRUCTIONS}\n{rules}"},
    )


def stream(
    seed: int = 0, tasks: int = 3, train: int = 200, val: int = 64, test: int = 200
) -> list[Task]:
    """A policy that changes ``tasks - 1`` times: the tasks of policies 0, 1, ... of one seed.

    The tickets and their splits stay, so that an earlier task's rules are wrong for the next. A
    topic may keep its queue by chance, on average less than one of 12.

    Raises:
        DataError: As for ``load``.
    """
    return [load(seed, policy, train, val, test) for policy in range(tasks)]
