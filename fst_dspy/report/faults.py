"""What goes wrong in a run's rollouts and steps, kept apart by what it means.

An answer in the wrong format, an answer in the right format that is wrong, and an answer that is
given whatever the question was, look alike in a mean reward and call for different remedies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fst_dspy.report.rollouts import Outcome

FORMAT = ("parse", "empty", "truncated")
"""Failures of the model to write what the adapter asked for; the others are the program's."""

STOCK_ANSWERS = 3
"""So many of the most frequent answers count as stock answers ..."""

STOCK_EXAMPLES = 3
"""... if each was given on this many different examples or more."""


@dataclass(frozen=True)
class Answer:
    """One of the most frequent answers.

    Attributes:
        text: The answer.
        share: Share of the parsed answers that are it, 0 to 1.
        examples: Different examples it was given on.
        reward: Its mean reward.
    """

    text: str
    share: float
    examples: int
    reward: float


@dataclass(frozen=True)
class Faults:
    """Shares are of all rollouts, 0 to 1, unless they say otherwise.

    Attributes:
        rollouts: How many there are.
        by_kind: Share by kind of failure.
        format_share: Failures of format: ``FORMAT``.
        other_share: Every other failure: program, metric, timeout, no call.
        wrong_share: Scored without failure, and no better than a failure.
        rewarded_share: Scored without failure, and better than a failure.
        cut_share: Share of the model's calls that ended at the token limit.
        stock_share: Wrong, and one of the stock answers: the format is filled, no more.
        answers: The most frequent answers, stock or not.
        tokens: Median completion tokens of the rewarded, wrong and misformatted rollouts.
        stock: Whether each rollout, in order, counts in ``stock_share``.
    """

    rollouts: int
    by_kind: Mapping[str, float]
    format_share: float
    other_share: float
    wrong_share: float
    rewarded_share: float
    cut_share: float
    stock_share: float
    answers: tuple[Answer, ...]
    tokens: Mapping[str, float]
    stock: tuple[bool, ...]


def find_faults(outcomes: Sequence[Outcome], failure_score: float) -> Faults:
    """Sort the rollouts by what became of them.

    Args:
        outcomes: Any number.
        failure_score: The reward of a rollout that could not be scored.
    """
    count = max(1, len(outcomes))
    kinds = Counter(o.failure for o in outcomes if o.failure is not None)
    states = [state(o, failure_score) for o in outcomes]
    shares = {name: n / count for name, n in Counter(states).items()}
    answers = frequent_answers(outcomes)
    top = {a.text for a in answers[:STOCK_ANSWERS] if a.examples >= STOCK_EXAMPLES}
    stock = [s == "wrong" and o.answer in top for s, o in zip(states, outcomes, strict=True)]
    lengths = defaultdict(list)
    for name, outcome in zip(states, outcomes, strict=True):
        lengths[name].append(outcome.tokens)
    return Faults(
        rollouts=len(outcomes),
        by_kind={kind: n / count for kind, n in kinds.most_common()},
        format_share=shares.get("format", 0.0),
        other_share=shares.get("other", 0.0),
        wrong_share=shares.get("wrong", 0.0),
        rewarded_share=shares.get("rewarded", 0.0),
        cut_share=sum(o.cut for o in outcomes) / max(1, sum(o.calls for o in outcomes)),
        stock_share=sum(stock) / count,
        answers=tuple(answers),
        tokens={name: float(median(values)) for name, values in sorted(lengths.items())},
        stock=tuple(stock),
    )


def state(outcome: Outcome, failure_score: float) -> str:
    """``"format"``, ``"other"``, ``"wrong"`` or ``"rewarded"``."""
    if outcome.failure is not None:
        return "format" if outcome.failure in FORMAT else "other"
    return "wrong" if outcome.reward <= failure_score else "rewarded"


def frequent_answers(outcomes: Sequence[Outcome], limit: int = 8) -> list[Answer]:
    """The most frequent of the answers that were parsed and scored, most frequent first."""
    parsed = [o for o in outcomes if o.answer is not None and o.failure is None]
    counts = Counter(o.answer for o in parsed)
    top = sorted(counts, key=lambda text: (-counts[text], text or ""))[:limit]
    by_answer: dict[str, list[Outcome]] = {text: [] for text in top if text is not None}
    for outcome in parsed:
        if outcome.answer in by_answer:
            by_answer[outcome.answer].append(outcome)
    return [
        Answer(
            text=text,
            share=len(given) / len(parsed),
            examples=len({o.example_id for o in given}),
            reward=sum(o.reward for o in given) / len(given),
        )
        for text, given in by_answer.items()
    ]


def faults_by_cycle(
    outcomes: Sequence[Outcome], failure_score: float
) -> list[tuple[int, dict[str, float]]]:
    """For each cycle the shares of wrong formats, wrong answers and the most frequent answer."""
    cycles: dict[int, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        cycles[outcome.cycle].append(outcome)
    rows = []
    for cycle, own in sorted(cycles.items()):
        faults = find_faults(own, failure_score)
        rows.append(
            (
                cycle,
                {
                    "wrong format": faults.format_share,
                    "wrong answer": faults.wrong_share,
                    "most frequent answer": faults.answers[0].share if faults.answers else 0.0,
                },
            )
        )
    return rows


def skipped_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Optimizer steps that were not taken, by reason."""
    reasons = Counter(step["stats"]["skipped"] for step in steps if step["stats"]["skipped"])
    return dict(reasons.most_common())
