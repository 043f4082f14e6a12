"""The user's metric: checked before any work, and read the same way everywhere.

A metric follows GEPA's protocol, ``metric(gold, pred, trace=None, pred_name=None,
pred_trace=None)``, and returns a number or ``dspy.Prediction(score=, feedback=)``, which may have
``objective_scores=`` too, a dict of numbers by the names of several objectives. The shorter
``metric(gold, pred, trace=None)`` of other DSPy optimizers and ``metric(gold, pred)`` of
``dspy.Evaluate`` work too. It may be anything that can be called: a function, a
``functools.partial``, an object with ``__call__``, a ``dspy.Module`` such as
``dspy.evaluate.SemanticF1``, a builtin.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dspy

from fst_dspy.config import MAX_SCORE
from fst_dspy.errors import MetricError
from fst_dspy.student.candidate import plain_value
from fst_dspy.student.copies import own_value

ARITIES = (5, 3, 2)
"""Numbers of arguments that a metric may take, the first one it accepts is used."""


@dataclass(frozen=True)
class Score:
    """What the metric said: a finite reward, a text (empty where it gave none), and objectives.

    Attributes:
        objectives: Finite scores by objective (``objective_scores``), where it gave some.
    """

    reward: float
    feedback: str
    objectives: Mapping[str, float] = field(default_factory=dict)


def check_metric(metric: Callable[..., Any] | None) -> None:
    """Check that a metric can be called the way FST calls it.

    Raises:
        MetricError: It is missing, not callable, ``async``, or takes none of 5, 3 and 2 arguments.
    """
    if metric is None:
        raise MetricError("FST needs a metric: FST(metric=...)")
    if not callable(metric):
        raise MetricError(f"the metric must be callable, got {type(metric).__name__}")
    target = _target(metric)
    if target is None or inspect.iscoroutinefunction(inspect.unwrap(target)):
        raise MetricError(
            "the metric must not be async: FST calls it from a thread of its own for each rollout; "
            "give it a plain function (asyncio.run(...) inside one will do)"
        )
    if _arity(metric) == 0:
        raise MetricError(
            "the metric must accept (gold, pred, trace=None, pred_name=None, pred_trace=None), "
            f"(gold, pred, trace=None) or (gold, pred); got {inspect.signature(target)}"
        )


def call_metric(metric: Callable[..., Any], gold: dspy.Example, pred: dspy.Prediction) -> Score:
    """Score one prediction; what the metric does to its arguments changes nothing outside.

    Raises:
        MetricError: The metric returned no number, or one that is not finite or is huge.
    """
    arguments = (own_copy(gold), own_copy(pred), None, None, None)
    arity = _arity(metric)
    if arity is not None:
        return read_score(metric(*arguments[: arity or 5]))
    for count in ARITIES[:-1]:  # a builtin that does not say what it takes
        try:
            return read_score(metric(*arguments[:count]))
        except MetricError:
            raise
        except TypeError:
            continue
    return read_score(metric(*arguments[: ARITIES[-1]]))


def ask_about_predictor(
    metric: Callable[..., Any],
    gold: dspy.Example,
    pred: dspy.Prediction,
    trace: list[Any],
    pred_name: str,
    pred_trace: list[Any],
) -> str | None:
    """What a metric says of one predictor's part in a prediction (dspy.GEPA's protocol).

    The score that it gives with that is checked, and not used.

    Args:
        metric: One that ``gives_predictor_feedback``.
        gold, pred: As for ``call_metric``; copies of them are passed on.
        trace, pred_trace: The program's and the predictor's calls: (predictor, inputs, outputs).
        pred_name: The predictor's name.

    Returns:
        Its feedback, which may be empty where there is nothing to say; ``None`` where it gave none.

    Raises:
        MetricError: As ``call_metric``.
    """
    result = metric(own_copy(gold), own_copy(pred), trace, pred_name, pred_trace)
    read_score(result)
    return _feedback_in(result)


def gives_predictor_feedback(metric: Callable[..., Any]) -> bool:
    """Whether a metric can be asked about one predictor (``pred_name``, ``pred_trace``)."""
    return _arity(metric) == 5


def own_copy(record: Any) -> Any:
    """A ``dspy.Example`` or ``Prediction`` that a metric may change without harm.

    What is copied of its values, ``fst_dspy.student.copies`` says; anything that is no example is
    the same object.
    """
    return own_value(record) if isinstance(record, dspy.Example) else record


def read_score(result: Any) -> Score:
    """Read a metric's return value: a number, a bool, or a prediction with score and feedback.

    Raises:
        MetricError: There is no number in it, or one that is not finite or is huge.
    """
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise MetricError("the metric must not be async: it returned something to be awaited")
    if isinstance(result, dspy.Prediction | dict):
        raw, objectives = result.get("score", None), result.get("objective_scores", None)
    else:
        raw, objectives = result, None
    wanted = "the metric must return a number or dspy.Prediction(score=, feedback=)"
    reward = _finite(raw, f"{wanted}, got {result!r:.200}")
    return Score(reward, _feedback_in(result) or "", _objectives(objectives))


def _feedback_in(result: Any) -> str | None:
    """The text that a metric returned; ``None`` where it returned none."""
    found = result.get("feedback", None) if isinstance(result, dspy.Prediction | dict) else None
    if found is None:
        return None
    try:
        return _as_text(found)
    except RecursionError:  # it holds itself
        return str(found)


def _as_text(said: Any) -> str:
    """Feedback as lines: the items of a list, the fields of a dict or of a judge's prediction.

    As Python writes these, lessons in them stand in quotation marks, and what is quoted is none.
    """
    value = plain_value(sorted(said, key=str) if isinstance(said, set | frozenset) else said)
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_as_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(_as_text, value))
    # ``wrong and "..."`` is False where nothing is wrong, an empty cell of a table is nan.
    is_none = value is None or (isinstance(value, int | float) and not abs(value) > 0)
    return "" if is_none else str(value)


def _objectives(given: Any) -> dict[str, float]:
    if given is not None and not isinstance(given, Mapping):
        raise MetricError(
            f"a metric's objective_scores must be a dict of numbers by name, got {given!r:.200}"
        )
    return {
        str(name): _finite(raw, f"objective_scores[{name!r}] must be a number, got {raw!r:.200}")
        for name, raw in (given or {}).items()
    }


def _finite(raw: Any, wanted: str) -> float:
    try:
        value = float(raw)
    except (TypeError, ValueError):
        raise MetricError(wanted) from None
    if not math.isfinite(value) or abs(value) > MAX_SCORE:
        raise MetricError(
            f"the metric must return a finite score of at most {MAX_SCORE:g}, got {raw}"
        )
    return value


def _arity(metric: Callable[..., Any]) -> int | None:
    """How many arguments to give a metric: the first of ``ARITIES`` it accepts, 0 for none of them.

    ``None`` stands for a builtin without a signature: only calling it can tell.
    """
    try:
        signature = inspect.signature(_target(metric) or metric)
    except (TypeError, ValueError):
        return None
    return next((count for count in ARITIES if _accepts(signature, count)), 0)


def _accepts(signature: inspect.Signature, count: int) -> bool:
    try:
        bound = signature.bind(*[None] * count)
    except TypeError:
        return False
    # What comes after the trace is about one predictor; an option of the metric's own, as in
    # (gold, pred, trace=None, frac=1.0, strict=True), is not.
    extra = [name for name in bound.arguments if name in signature.parameters][3:]
    defaults = [signature.parameters[name].default for name in extra]
    return all(default is None or default is inspect.Parameter.empty for default in defaults)


def _target(metric: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that a call ends in; ``None`` where that is a module with ``aforward`` alone.

    A ``dspy.Module`` and an object with ``__call__`` are called through another function, which
    takes anything.
    """
    if isinstance(metric, functools.partial):
        target = _target(metric.func)
        if target is None:
            return None
        return functools.partial(target, *metric.args, **metric.keywords)
    if isinstance(metric, dspy.Module):
        kind = type(metric)  # asking the instance for forward makes DSPy warn
        if not hasattr(kind, "forward"):
            return None
        return functools.partial(kind.forward, metric)
    if inspect.isroutine(metric) or inspect.isclass(metric):
        return metric
    return getattr(metric, "__call__", metric)  # noqa: B004  (its method, not whether it has one)
