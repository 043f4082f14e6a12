"""Bad input is found here, before any expensive work, and answered with what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from fst_dspy.errors import DataError, MetricError, ProgramError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import find_local_lm
from fst_dspy.student.candidate import bind, example_id, predictor_names, seed_candidate
from fst_dspy.student.metric import call_metric, check_metric
from fst_dspy.types import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedInput:
    """What a compile works with, once it is known to make sense.

    Attributes:
        lm: The local model that the program's predictors call.
        trainset, valset: Non-empty, with inputs set and no example in both.
    """

    lm: LocalLM
    trainset: list[dspy.Example]
    valset: list[dspy.Example]


def check_input(
    student: dspy.Module,
    metric: Callable[..., Any],
    trainset: Sequence[dspy.Example] | None,
    valset: Sequence[dspy.Example] | None,
) -> CheckedInput:
    """Check everything that can be checked without running the model.

    Without a ``valset`` the last fifth of the training set (at least one example) becomes it.

    Raises:
        ProgramError: Not a module, no predictors, no LM, or one that cannot be trained.
        DataError: An empty set, things that are not examples, or no inputs set.
        MetricError: The metric cannot be called, or returns no finite number for a prediction
            made of an example's own labels.
    """
    check_metric(metric)
    if not isinstance(student, dspy.Module):
        raise ProgramError(f"the student must be a dspy.Module, got {type(student).__name__}")
    if not predictor_names(student):
        raise ProgramError(
            f"{type(student).__name__} has no predictors to tune; give it a dspy.Predict or "
            "dspy.ChainOfThought as an attribute"
        )
    lm = find_local_lm(student)
    train = _check_examples("trainset", trainset)
    if valset is None:
        cut = max(1, len(train) // 5)
        if len(train) < 2:
            raise DataError("a trainset of one example cannot be split; pass a valset as well")
        train, val = train[:-cut], train[-cut:]
    else:
        val = _check_examples("valset", valset)
    _check_metric_on(metric, train[0])
    bind(student, seed_candidate(student))
    return CheckedInput(lm=lm, trainset=train, valset=val)


def _check_examples(name: str, examples: Sequence[dspy.Example] | None) -> list[dspy.Example]:
    examples = list(examples or [])
    if not examples:
        raise DataError(f"the {name} is empty; FST needs at least one dspy.Example")
    for position, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise DataError(f"{name}[{position}] is a {type(example).__name__}, not a dspy.Example")
        if not example._input_keys:
            raise DataError(
                f"{name}[{position}] does not say which fields are inputs; "
                'call .with_inputs("field", ...) on it'
            )
        example_id(example)
    return examples


def _check_metric_on(metric: Callable[..., Any], example: dspy.Example) -> None:
    labels = example.labels().toDict()
    if not labels:
        return
    try:
        call_metric(metric, example, dspy.Prediction(**labels))
    except MetricError:
        raise
    except Exception:
        # It may need fields that only a real prediction has; then the first rollouts tell.
        logger.debug("the metric raised on an example's own labels", exc_info=True)


def check_first_rollouts(rollouts: Sequence[Rollout]) -> None:
    """Stop where the metric, or the program, fails on every one of the first rollouts.

    Raises:
        MetricError: The metric failed on all of them.
        ProgramError: The program failed on all of them, or never called the local model.
    """
    kinds = {rollout.failure.kind if rollout.failure else None for rollout in rollouts}
    message = next((r.failure.message for r in rollouts if r.failure), "")
    if kinds == {"metric"}:
        raise MetricError(f"the metric failed on every validation example: {message}")
    if kinds in ({"program"}, {"no_calls"}, {"timeout"}, {"infrastructure"}):
        raise ProgramError(f"the program failed on every validation example: {message}")
