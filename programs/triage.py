"""Ticket routing under a hidden policy: which queue each of 12 topics goes to.

The policy is drawn from the seed, so no model can know it: it has to be learned from feedback, and
it fits in 12 lines of instruction. ``policy`` changes the mapping alone, for streams of tasks.

With more ``topics`` than the instruction may hold (``instruction_tokens``; a rule takes some 10),
prompts and weights must share the policy. With a ``skew`` besides, topics come as often as words do
in a language: the rules that are worth a line at first are not those that are worth it once the
weights know the frequent ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import dspy

from fst_dspy.embedded.corpus.words import ENGLISH
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


def topic_names(count: int) -> tuple[str, ...]:
    """The first ``count`` topics: those above, then ordinary words.

    Raises:
        DataError: More than there are words for, or none.
    """
    used = {word for text in (*_OPENINGS, *_BODIES, *_CLOSINGS) for word in text.lower().split()}
    others = [word for word in ENGLISH if word not in {*TOPICS, *QUEUES, *used}]
    if not 0 < count <= len(TOPICS) + len(others):
        raise DataError(f"topics must be 1 to {len(TOPICS) + len(others)}, got {count}")
    Random("triage topics").shuffle(others)
    return (*TOPICS, *others)[:count]


def draw_policy(seed: int, policy: int = 0, topics: int = 12) -> dict[str, str]:
    """The hidden mapping from topic to queue; the first 12 have different queues out of 16."""
    rng = Random(f"triage {seed} {policy}")
    queues = rng.sample(QUEUES, len(TOPICS))
    queues += rng.choices(QUEUES, k=max(0, topics - len(TOPICS)))
    return dict(zip(topic_names(topics), queues, strict=False))


def draw_tickets(
    seed: int, count: int, topics: int = 12, skew: float = 0.0
) -> list[tuple[str, str]]:
    """``count`` different tickets with their topics.

    Args:
        topics: How many topics there are.
        skew: 0: topics come as evenly as can be. Else the k-th of them, in an order that the seed
            draws, comes in proportion to ``k ** -skew``.

    Raises:
        DataError: More are asked for than can be written (400 of a topic), or a negative skew.
    """
    if skew < 0:
        raise DataError(f"skew must not be negative, got {skew}")
    names = topic_names(topics)
    texts = {
        topic: [
            " ".join(part for part in (opening, body.format(topic) + ".", closing) if part)
            for opening in _OPENINGS
            for body in _BODIES
            for closing in _CLOSINGS
        ]
        for topic in names
    }
    rng = Random(f"triage tickets {seed}")
    for lines in texts.values():
        rng.shuffle(lines)
    drawn = [names[i % topics] for i in range(count)]
    if skew:
        ranked, weights = rng.sample(names, topics), [(k + 1) ** -skew for k in range(topics)]
        drawn = rng.choices(ranked, weights, k=count)
    most = max((drawn.count(topic) for topic in names), default=0)
    if most > len(texts[names[0]]):
        raise DataError(
            f"{count} different tickets asked for, {most} of one topic; there are "
            f"{len(texts[names[0]])} of each"
        )
    tickets = [(texts[topic].pop(0), topic) for topic in drawn]
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


def load(
    seed: int = 0,
    policy: int = 0,
    train: int = 200,
    val: int = 64,
    test: int = 200,
    topics: int = 12,
    skew: float = 0.0,
) -> Task:
    """The task: ``seed`` draws tickets and policies, ``policy`` picks one of the seed's policies.

    Tasks of one seed and different ``policy`` have the same tickets in the same splits, with other
    right queues. No ticket is in two splits. ``topics`` and ``skew`` are those of ``draw_tickets``.

    Raises:
        DataError: More tickets or topics than there are, or a negative number.
    """
    if min(train, val, test) < 0:
        raise DataError(f"a split cannot have fewer than 0 tickets: {train}, {val}, {test}")
    mapping = draw_policy(seed, policy, topics)
    examples = [
        dspy.Example(ticket=text, queue=mapping[topic], topic=topic).with_inputs("ticket")
        for text, topic in draw_tickets(seed, train + val + test, topics, skew)
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
