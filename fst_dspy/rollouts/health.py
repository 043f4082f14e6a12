"""What became of many rollouts: failures by kind with the first cause, and whether rewards differ.

A rollout that fails is data, and so a run whose rollouts all fail ends like any other unless
somebody looks. This is what looks: after the first validation and after every cycle.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import dspy

from fst_dspy.display import visible
from fst_dspy.errors import MetricError, ProgramError
from fst_dspy.lm.templates import cut_thought_advice
from fst_dspy.student.mixins import plain_class
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Rollout

logger = logging.getLogger(__name__)

TOLD_SHARE = 0.05
"""Share of rollouts that fail in one way, from which on it is told."""

NOT_ANSWERED = ("parse", "truncated", "empty")
"""Kinds of failure that are the model's: its answer could not be read."""

ADVICE: Mapping[str, str] = {
    "parse": "the model does not answer in the adapter's format: hold it to it where it is not "
    "(structured=True), show it demos, try another adapter (dspy.configure(adapter=...)) or fewer "
    "output fields, or a larger model",
    "truncated": "answers are cut off: raise max_tokens, or ask for shorter ones",
    "too_long": "prompts leave no room for answers: shorten instructions, demos or inputs, or take "
    "a model with a longer context",
    "empty": "the model ends its answer at once: check its chat template and stop strings",
    "timeout": "raise rollout_timeout, or make what the program waits for faster",
    "metric": "the metric fails on real predictions: run it on one",
    "program": "the program fails: run it once on a training example",
    "infrastructure": "what the program runs on fails: a connection, a pool or a service; such "
    "rollouts are not trained on",
    "no_calls": "the program does not call the local model: check its LM with "
    "program.named_predictors()",
}
"""What to do about a kind of failure."""

IN_THOUGHT = "in the middle of its thought"
AT_THE_END = "at the end of the context window"
"""Of an answer that was cut off, where, if not just at ``max_tokens``."""


@dataclass(frozen=True)
class Tally:
    """Rollouts, by what became of them.

    Attributes:
        rollouts: How many.
        failures: How many failed, by kind.
        messages: The first message of each kind.
        told: Those that are learned from and of which the metric said something in words.
        low, high: The lowest and highest reward of rollouts that are learned from; ``None`` before
            there is one.
    """

    rollouts: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, str] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    told: int = 0

    def plus(self, rollouts: Sequence[Rollout], *, learned_from: bool) -> Tally:
        """With some more rollouts; those of validation are not learned from."""
        failures, messages = dict(self.failures), dict(self.messages)
        for rollout in rollouts:
            if rollout.failure is not None:
                kind = rollout.failure.kind
                failures[kind] = failures.get(kind, 0) + 1
                messages.setdefault(kind, rollout.failure.message)
        rewards = [rollout.reward for rollout in rollouts] if learned_from else []
        rewards += [value for value in (self.low, self.high) if value is not None]
        return Tally(
            self.rollouts + len(rollouts),
            failures,
            messages,
            min(rewards, default=None),
            max(rewards, default=None),
            self.told + (sum(map(_is_told, rollouts)) if learned_from else 0),
        )

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rollouts that failed, by kind, 0 to 1."""
        return {kind: n / self.rollouts for kind, n in sorted(self.failures.items())}


def _is_told(rollout: Rollout) -> bool:
    said = (rollout.feedback, *rollout.feedback_by_predictor.values())
    return rollout.failure is None and any(text.strip() for text in said)


def is_unread(rollout: Rollout) -> bool:
    """Whether an answer could not be read, also where the program went on without it."""
    if rollout.failure is not None and rollout.failure.kind in NOT_ANSWERED:
        return True
    return any(trace.outputs is None and trace.text for trace in rollout.traces)


def unread_share(rollouts: Sequence[Rollout]) -> float:
    """Share of the rollouts in which an answer could not be read, 0 to 1."""
    return sum(map(is_unread, rollouts)) / len(rollouts) if rollouts else 0.0


def told_failures(
    shares: Mapping[str, float], messages: Mapping[str, str], tokenizer: Any = None
) -> list[str]:
    """What to tell of failures: a text for every kind that is more than a few, the largest first.

    Args:
        shares: Of rollouts, by kind, 0 to 1.
        messages: The first message of each kind.
        tokenizer: Of the model that answered, to say what to do about it, too.
    """
    texts = []
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        if share >= TOLD_SHARE:
            message = messages.get(kind, "")
            text = f"{kind} {share:.0%}: {visible(_first_line(message))}"
            what_to_do = None if tokenizer is None else _advice(kind, message, tokenizer)
            texts.append(f"{text} ({what_to_do})" if what_to_do else text)
    return texts


def _advice(kind: str, message: str, tokenizer: Any) -> str | None:
    if IN_THOUGHT in message:
        return f"the answer is cut off {cut_thought_advice(tokenizer)}"
    if AT_THE_END in message:
        return ADVICE["too_long"]
    return ADVICE.get(kind)


def check_first_rollouts(rollouts: Sequence[Rollout], program: dspy.Module) -> None:
    """Stop where the program, or the metric, fails on all that the model has answered.

    Answers that cannot be read are the model's, and may be learned away: they hide nothing here.
    Where other predictors run than those whose texts are tuned, that is told.

    Args:
        rollouts: Those of the first validation.
        program: What was run in them.

    Raises:
        MetricError: The metric failed on every prediction that it was given.
        ProgramError: The program failed, or never called the local model, on every example whose
            answers could be read; or one of its predictors was never given anything.
    """
    _check_inputs(rollouts, program)
    _tell_untuned(rollouts, program)
    failures = [rollout.failure for rollout in rollouts]
    kinds = {f.kind if f is not None else None for f in failures} - set(NOT_ANSWERED)
    if not kinds or None in kinds:
        return
    messages = [
        f"{f.kind}: {_first_line(f.message)}" for f in failures if f and f.kind not in NOT_ANSWERED
    ]
    if "metric" in kinds:
        raise MetricError(
            f"the metric failed on every validation example: {_most(messages)}; {ADVICE['metric']}"
        )
    kind = kinds.pop() if len(kinds) == 1 else None
    raise ProgramError(
        f"the program failed on every validation example: {_most(messages)}; "
        f"{ADVICE[kind or 'program']}"
    )


def _check_inputs(rollouts: Sequence[Rollout], program: dspy.Module) -> None:
    """Stop where a predictor was asked without any of its inputs, of which DSPy warns alone.

    Raises:
        ProgramError: So one was, whenever it was run.
    """
    for name, predictor in every_predictor(program).items():
        if plain_class(type(predictor)) is not dspy.Predict:
            continue  # another class may be given them in its own way
        fields = predictor.signature.input_fields
        needed = [
            f for f, i in fields.items() if i.is_required() and not _allows_none(i.annotation)
        ]
        runs = [
            trace for rollout in rollouts for trace in rollout.traces if trace.predictor == name
        ]
        if needed and runs and not any(trace.inputs for trace in runs):
            raise ProgramError(
                f"the predictor {name!r} was given none of its inputs ({', '.join(needed)}) on any "
                "validation example; name the examples' inputs as the program takes them: "
                'dspy.Example(...).with_inputs("field", ...)'
            )


def _tell_untuned(rollouts: Sequence[Rollout], program: dspy.Module) -> None:
    """Say so where rollouts ended well in which none of the predictors that are tuned was run."""
    tuned = [name for name, _ in program.named_predictors()]
    ran = {t.predictor for r in rollouts if r.failure is None for t in r.traces}
    if ran and ran.isdisjoint(tuned):
        logger.warning(
            "of the predictors whose instructions are tuned (%s) none was run on a validation "
            "example, but others were (%s): predictors that the program makes as it runs, or that "
            "it holds in a way that DSPy does not look into",
            ", ".join(tuned),
            ", ".join(sorted(ran)),
        )


def _allows_none(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def check_objectives(rollouts: Sequence[Rollout], frontier: str) -> None:
    """Stop where a front over objectives is asked for, and the metric gives none.

    Raises:
        MetricError: It has scored predictions, none of them by objective.
    """
    scored = [rollout for rollout in rollouts if rollout.failure is None]
    if scored and not any(rollout.objective_scores for rollout in scored):
        raise no_objectives(frontier)


def no_objectives(frontier: str) -> MetricError:
    """The error of a metric without the objectives that a front is to be made over."""
    return MetricError(
        f"frontier_type={frontier!r} needs the metric's objective_scores: return "
        "dspy.Prediction(score=, feedback=, objective_scores={name: number}), or leave "
        "frontier_type at 'instance'"
    )


def _most(messages: Iterable[str]) -> str:
    """The message that occurs most often, of equals the first."""
    counts: dict[str, int] = {}
    for message in messages:
        counts[message] = counts.get(message, 0) + 1
    return max(counts, key=lambda message: counts[message])


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
