"""Proposers of dspy.GEPA's kind, as ours: gepa's ``ProposalFn``, DSPy's objects and modules.

They are called as ``dspy.GEPA`` calls them: ``(candidate, reflective_dataset,
components_to_update)``, with predictors' names for keys, under the reflection LM if there is one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy
from gepa.core.adapter import ProposalFn

from fst_dspy.fast.proposers.protocol import FEEDBACK, TRAJECTORY, Record, shown
from fst_dspy.student.candidate import (
    INSTRUCTIONS,
    component_name,
    split_component,
    texts_in,
)

ARGUMENTS = ("candidate", "reflective_dataset", "components_to_update")
"""gepa's names of what a ``ProposalFn`` is given."""
SINGLE = (
    ("current_instruction", "reflective_dataset"),
    ("current_instruction", "examples_with_feedback"),
)
"""What a module for one component is given, such as DSPy's multimodal one."""
RECORD_KEYS = ("Inputs", "Generated Outputs", TRAJECTORY, FEEDBACK)
"""What is in dspy.GEPA's reflective examples, and all steps where they are asked for."""


class ProposalFnProposer:
    """Calls a proposer of dspy.GEPA's kind; implements ``Proposer``.

    Args:
        function: What is called.
        lm: The reflection LM, which ``dspy.settings.lm`` is meanwhile; ``None`` leaves it.
    """

    def __init__(self, function: Callable[..., Any], lm: dspy.BaseLM | None = None) -> None:
        self.function, self.lm = function, lm
        self.waits = lm is not None

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """What the function proposes for the instructions among ``names``.

        Raises:
            TypeError: It returned no texts by component.
        """
        wanted = [_short(name) for name in texts_in(names)]
        candidate = {_short(name): components[name] for name in texts_in(components)}
        dataset = {
            _short(name): [shown(record, RECORD_KEYS) for record in records[name]]
            for name in texts_in(names)
        }
        context = dspy.context(lm=self.lm) if self.lm is not None else contextlib.nullcontext()
        with context:
            texts = call_proposer(self.function, candidate, dataset, wanted)
        return {
            name if name in components else component_name(name, INSTRUCTIONS): text
            for name, text in texts.items()
        }


def _short(component: str) -> str:
    """An instruction's component goes by its predictor's name, as in dspy.GEPA."""
    predictor, kind = split_component(component)
    return predictor if kind == INSTRUCTIONS else component


def is_proposal_fn(function: Any) -> bool:
    """Whether something can be called in one of the ways of dspy.GEPA's proposers."""
    if not callable(function) or inspect.isclass(function) or isinstance(function, dspy.BaseLM):
        return False
    return _way(function) is not None


def is_proposer(value: Any) -> bool:
    """Whether something has our protocol's method."""
    propose = getattr(value, "propose", None)
    if not inspect.isroutine(propose) or inspect.isclass(value):
        return False
    if inspect.iscoroutinefunction(propose) or ProposalFn in type(value).__mro__:
        return False
    try:
        return _accepts(inspect.signature(propose), ("components", "records", "names"), ())
    except (TypeError, ValueError):
        return True


def call_proposer(
    function: Callable[..., Any],
    candidate: dict[str, str],
    dataset: dict[str, list[dict[str, Any]]],
    names: list[str],
) -> dict[str, str]:
    """New texts from a proposer of dspy.GEPA's kind, by the names it was given.

    Raises:
        TypeError: It returned something else.
    """
    way = _way(function)
    if way in ("keywords", ARGUMENTS):
        said = function(**dict(zip(ARGUMENTS, (candidate, dataset, names), strict=True)))
    elif way == "positions":
        said = function(candidate, dataset, names)
    else:
        said = {
            name: _text(function(**{way[0]: candidate[name], way[1]: dataset[name]}))
            for name in names
        }
    if isinstance(said, dspy.Prediction):
        inner = _text(said)
        said = inner if isinstance(inner, Mapping) else said.toDict()
    if not isinstance(said, Mapping):
        raise TypeError(
            f"instruction_proposer must return {{component: text}}, got {type(said).__name__}"
        )
    return dict(said)


def _text(said: Any) -> Any:
    """The text of a prediction with one output; anything else as it is."""
    if isinstance(said, dspy.Prediction):
        values = [said[name] for name in said.keys() if name != "reasoning"]  # noqa: SIM118
        return values[0] if len(values) == 1 else said
    return said


def _fields(module: Any) -> set[str] | None:
    """The inputs of a module that takes any keywords, where it is one predictor's."""
    takes = list(inspect.signature(type(module).forward).parameters.values())
    if len(takes) != 2 or takes[1].kind is not takes[1].VAR_KEYWORD:
        return None
    predictors = module.predictors()
    return set(predictors[0].signature.input_fields) if len(predictors) == 1 else None


def _way(function: Callable[..., Any]) -> Any:
    """How to call it: ``"keywords"``, ``"positions"``, the names of the inputs, or ``None``."""
    if isinstance(function, dspy.Module):
        kind: Any = type(function)  # asking the instance for forward makes DSPy warn
        if not hasattr(kind, "forward"):
            return None
        fields = _fields(function)
        if fields is not None:
            return next((way for way in (ARGUMENTS, *SINGLE) if set(way) == fields), None)
        target: Any = kind.forward.__get__(function)
    else:
        target = function
    called = target if inspect.isroutine(target) else getattr(target, "__call__", target)  # noqa: B004
    if inspect.iscoroutinefunction(called):
        return None
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return "positions"
    if _accepts(signature, (), ARGUMENTS):
        return "keywords"
    if _accepts(signature, ARGUMENTS, ()):
        return "positions"
    return next((keys for keys in SINGLE if _accepts(signature, (), keys)), None)


def _accepts(
    signature: inspect.Signature, positions: Sequence[str], keywords: Sequence[str]
) -> bool:
    try:
        signature.bind(*positions, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True
