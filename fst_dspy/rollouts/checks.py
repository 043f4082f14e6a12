"""Bad input is found here, before any expensive work, and answered with what to do about it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from fst_dspy.config import SamplingConfig
from fst_dspy.errors import DataError, MetricError, ProgramError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import find_local_lm
from fst_dspy.rollouts.health import no_objectives
from fst_dspy.rollouts.inputs import checked_examples
from fst_dspy.student.candidate import (
    bind,
    example_id,
    plain_fields,
    predictor_names,
    seed_candidate,
)
from fst_dspy.student.metric import call_metric, check_metric
from fst_dspy.student.modules import every_predictor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedInput:
    """What a compile works with, once it is known to make sense.

    Attributes:
        lm: The local model that the program's predictors call.
        trainset, valset: Non-empty, with inputs set and no example in both. Each keeps the id that
            it had then.
    """

    lm: LocalLM
    trainset: list[dspy.Example]
    valset: list[dspy.Example]


def check_input(
    student: dspy.Module,
    metric: Callable[..., Any],
    trainset: Sequence[dspy.Example] | None,
    valset: Sequence[dspy.Example] | None,
    *,
    seed: int = 0,
    val_size: int = SamplingConfig.val_size,
    frontier: str = "instance",
) -> CheckedInput:
    """Check everything that can be checked without running the model.

    Without a ``valset`` a fifth of the training set, drawn with the seed, becomes it: at least one
    example, and at most ``val_size``, as no more are scored. Training examples that are in the
    ``valset`` as well are left out, with a warning.

    Args:
        seed: Of the split.
        val_size: Validation examples that are scored each cycle, at least 1.
        frontier: gepa's ``frontier_type``; all but ``"instance"`` need a metric with objectives.

    Raises:
        ProgramError: Not a module, no predictors, no LM, or one that cannot be trained.
        DataError: An empty set, things that are not examples, no inputs set, or no training example
            that is not in the validation set.
        MetricError: The metric cannot be called, or returns no finite number, or no objectives
            where they are needed, for a prediction made of an example's own labels.
    """
    check_metric(metric)
    if not isinstance(student, dspy.Module):
        raise ProgramError(f"the student must be a dspy.Module, got {type(student).__name__}")
    try:
        names = predictor_names(student)
    except RecursionError:
        raise ProgramError(
            f"a module of {type(student).__name__} holds a module that it lies in, and DSPy cannot "
            "list the predictors of such a program; hold that one by a weakref.ref, or a function"
        ) from None
    unlisted = ", ".join(name for name in every_predictor(student) if name not in names)
    if not names and not unlisted:
        raise ProgramError(
            f"{type(student).__name__} has no predictors to tune; give it a dspy.Predict or "
            "dspy.ChainOfThought as an attribute"
        )
    why = (
        f"DSPy does not list {unlisted}, which lie in a module that was compiled before (set its "
        "_compiled to False to have them tuned), in a list within a list, or in an object that is "
        "no module"
    )
    if not names:
        raise ProgramError(f"{type(student).__name__} has no predictors to tune; {why}")
    if unlisted:
        logger.warning("some instructions stay as they are: %s", why)
    lm = find_local_lm(student)
    train = checked_examples("trainset", trainset)
    if valset is None:
        train, val = _split(train, seed, val_size)
    else:
        val = checked_examples("valset", valset)
        train = _without(train, val)
    _check_metric_on(metric, train[0], frontier)
    bind(student, seed_candidate(student))
    return CheckedInput(lm=lm, trainset=train, valset=val)


def _split(
    examples: Sequence[dspy.Example], seed: int, val_size: int
) -> tuple[list[dspy.Example], list[dspy.Example]]:
    """Training and validation examples, each in their order; equal ones go the same way."""
    ids = [example_id(example) for example in examples]
    distinct = list(dict.fromkeys(ids))
    if len(distinct) < 2:
        raise DataError(
            "a trainset of one example, once or many times, cannot be split; pass a valset as well"
        )
    cut = max(1, min(len(distinct) // 5, val_size))
    held_out = set(random.Random(seed).sample(distinct, cut))
    pairs = list(zip(ids, examples, strict=True))
    train = [example for own, example in pairs if own not in held_out]
    first = dict(reversed(pairs))
    return train, [first[own] for own in distinct if own in held_out]


def _without(train: Sequence[dspy.Example], val: Sequence[dspy.Example]) -> list[dspy.Example]:
    """The training examples that are not in the validation set too."""
    held_out = {example_id(example) for example in val}
    left = [example for example in train if example_id(example) not in held_out]
    if not left:
        raise DataError(
            "every example of the trainset is in the valset too, so that the scores would be those "
            "of memorised answers; leave valset out, and a part of the trainset is held out"
        )
    if len(left) < len(train):
        logger.warning(
            "%d of %d training examples are in the valset too; they are not trained on",
            len(train) - len(left), len(train),
        )  # fmt: skip
    return left


def _check_metric_on(metric: Callable[..., Any], example: dspy.Example, frontier: str) -> None:
    labels = plain_fields(example.labels())
    if not labels:
        return
    try:
        score = call_metric(metric, example, dspy.Prediction(**labels))
    except (MetricError, KeyboardInterrupt):
        raise
    except BaseException:  # SystemExit among them, which in a rollout ends that rollout alone
        # It may need fields that only a real prediction has; then the first rollouts tell.
        logger.debug("the metric raised on an example's own labels", exc_info=True)
        return
    if frontier != "instance" and not score.objectives:
        raise no_objectives(frontier)
