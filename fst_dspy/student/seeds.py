"""Seed candidates that a user gives: other texts for the program to begin with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from fst_dspy.errors import ConfigError
from fst_dspy.student.candidate import (
    INSTRUCTIONS,
    bind,
    component_name,
    make_candidate,
    seed_candidate,
    tool_in,
)
from fst_dspy.types import Candidate


def read_seeds(student: dspy.Module, given: Any, tools: bool = False) -> tuple[Candidate, ...]:
    """The candidates of a first population: the student's own, then those given.

    Args:
        student: The program.
        given: For each candidate a dict of instructions by predictor, as gepa's
            ``seed_candidate`` (a component's name, ``"<predictor>.demos"``, does too), or a program
            of the student's shape. What a dict does not name is as the student has it. ``None``
            for no candidates.
        tools: As for ``seed_candidate``.

    Returns:
        Candidates that differ, each with all components; empty for ``None``.

    Raises:
        ConfigError: It is no list of such, or a predictor or a field is not the student's.
    """
    if given is None:
        return ()
    if isinstance(given, Mapping | str) or not isinstance(given, Sequence) or not given:
        raise ConfigError(
            "seed_candidates must be a list of {predictor: instruction} or of programs, got "
            f"{given if not given else type(given).__name__}"
        )
    own = seed_candidate(student, tools)
    found = {own.id: own}
    for number, one in enumerate(given):
        candidate = _read(student, own, one, f"seed_candidates[{number}]")
        found.setdefault(candidate.id, candidate)
    return tuple(found.values())


def _read(student: dspy.Module, own: Candidate, given: Any, who: str) -> Candidate:
    if isinstance(given, dspy.Module):
        if _shape(given) != _shape(student):
            raise ConfigError(
                f"{who} is another program: its predictors and fields are {_shape(given)}, the "
                f"student's {_shape(student)}"
            )
        described = any(map(tool_in, own.components))
        return make_candidate({**own.components, **seed_candidate(given, described).components})
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"{who} must be {{predictor: instruction}} or a program, got {given!r}")
    components = dict(own.components)
    for name, text in given.items():
        full = name if name in components else component_name(str(name), INSTRUCTIONS)
        if full not in components:
            raise ConfigError(f"{who} names {name!r}; the predictors are {sorted(_shape(student))}")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{who}[{name!r}] must be a text that is not empty, got {text!r}")
        components[full] = text
    candidate = make_candidate(components)
    bind(student, candidate)
    return candidate


def _shape(program: dspy.Module) -> dict[str, tuple[list[str], list[str]]]:
    """The names of each predictor's inputs and outputs."""
    return {
        name: (list(p.signature.input_fields), list(p.signature.output_fields))
        for name, p in program.named_predictors()
    }
