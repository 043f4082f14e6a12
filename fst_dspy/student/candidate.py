"""Fast weights as text: from a DSPy program to a ``Candidate`` and back.

A candidate holds, for every predictor, ``"<predictor>.instructions"`` (plain text) and
``"<predictor>.demos"`` (a JSON list of demos). Its id is a hash of these texts, so the same texts
have the same id in every run, process and cycle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dspy
from pydantic import BaseModel

from fst_dspy.errors import ConfigError
from fst_dspy.student.modules import copy_program
from fst_dspy.types import Candidate, Population

INSTRUCTIONS = "instructions"
DEMOS = "demos"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; what JSON cannot hold is written as its ``repr``."""
    return json.dumps(
        plain_value(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=repr
    )


def content_hash(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of ``value``'s canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def predictor_names(program: dspy.Module) -> tuple[str, ...]:
    """Names of the program's predictors, in the order of ``program.named_predictors()``."""
    return tuple(name for name, _ in program.named_predictors())


def component_name(predictor: str, kind: str) -> str:
    """The component that holds ``kind`` (``"instructions"`` or ``"demos"``) of a predictor."""
    return f"{predictor}.{kind}"


def split_component(component: str) -> tuple[str, str]:
    """The predictor's name and the kind of a component name.

    Raises:
        ConfigError: The name does not end in ``.instructions`` or ``.demos``.
    """
    predictor, _, kind = component.rpartition(".")
    if not predictor or kind not in (INSTRUCTIONS, DEMOS):
        raise ConfigError(
            f"component {component!r} is not '<predictor>.{INSTRUCTIONS}' or '<predictor>.{DEMOS}'"
        )
    return predictor, kind


def example_id(example: dspy.Example) -> str:
    """Content hash of an example: all its fields (inputs and labels) and which are inputs.

    Fields that JSON cannot hold count by their ``repr``; give such classes a ``repr`` without
    memory addresses if ids are to agree between processes.
    """
    inputs = sorted(example._input_keys or ())
    return content_hash({"fields": example.toDict(), "inputs": inputs})


def encode_demos(demos: Iterable[Any]) -> str:
    """Demos as a JSON list of objects, in order; :func:`decode_demos` gives the same fields back.

    Raises:
        ConfigError: A demo holds a value that JSON cannot hold, such as an image.
    """
    rows = [demo.toDict() if hasattr(demo, "toDict") else dict(demo) for demo in demos]
    try:
        return json.dumps(rows, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"demos must be made of text, numbers and lists: {error}") from error


def decode_demos(text: str) -> list[dspy.Example]:
    """Demos from the text of a demos component.

    Raises:
        ConfigError: The text is not a JSON list of objects.
    """
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"demos {text[:80]!r} are not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"demos must be a JSON list of objects, got {text[:80]!r}")
    return [dspy.Example(**row) for row in rows]


def make_candidate(
    components: Mapping[str, str],
    parent_ids: Sequence[str] = (),
    cycle: int = 0,
    source: str = "seed",
) -> Candidate:
    """A candidate with the content hash of ``components`` as its id."""
    texts = dict(sorted(components.items()))
    return Candidate(
        id=content_hash(texts),
        components=texts,
        parent_ids=tuple(parent_ids),
        cycle=cycle,
        source=source,
    )


def seed_candidate(program: dspy.Module) -> Candidate:
    """The student's own instructions and demos, both for every predictor (demos may be ``[]``).

    Demos that JSON cannot hold (images, say) get no component, so they stay the student's own.

    Raises:
        ConfigError: The program has no predictor, so there is nothing to learn.
    """
    components: dict[str, str] = {}
    for name, predictor in program.named_predictors():
        components[component_name(name, INSTRUCTIONS)] = predictor.signature.instructions
        with contextlib.suppress(ConfigError):
            components[component_name(name, DEMOS)] = encode_demos(predictor.demos)
    if not components:
        raise ConfigError(
            f"{type(program).__name__} has no predictors; a program to compile needs at least one "
            "dspy.Predict or dspy.ChainOfThought as an attribute"
        )
    return make_candidate(components)


def bind(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """A copy of ``program`` with the candidate's instructions and demos put in.

    Modules and predictors are its own; all else it shares (``fst_dspy.student.modules``).

    Components the candidate lacks keep the program's own value; ``program`` is left as it was.

    Raises:
        ConfigError: A component names no predictor of the program, or its demos do not parse.
    """
    bound = copy_program(program)
    predictors = dict(bound.named_predictors())
    for component, text in candidate.components.items():
        name, kind = split_component(component)
        if name not in predictors:
            raise ConfigError(
                f"candidate {candidate.id} has component {component!r}, but the program's "
                f"predictors are {sorted(predictors)}; it was made for another program"
            )
        predictor = predictors[name]
        if kind == DEMOS:
            predictor.demos = decode_demos(text)
        else:
            predictor.signature = predictor.signature.with_instructions(text)
    return bound


def candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a plain dict that ``json`` can write."""
    return {
        "id": candidate.id,
        "components": dict(candidate.components),
        "parent_ids": list(candidate.parent_ids),
        "cycle": candidate.cycle,
        "source": candidate.source,
    }


def candidate_from_json(data: Mapping[str, Any]) -> Candidate:
    """The inverse of :func:`candidate_to_json`.

    Raises:
        ConfigError: The stored id is not the hash of the stored texts.
    """
    candidate = make_candidate(
        data["components"], data["parent_ids"], int(data["cycle"]), data["source"]
    )
    if candidate.id != data["id"]:
        raise ConfigError(
            f"stored candidate {data['id']} does not match its texts (their hash is "
            f"{candidate.id}); the run folder was edited or is damaged"
        )
    return candidate


def population_to_json(population: Population) -> dict[str, Any]:
    """A population as a plain dict that ``json`` can write."""
    return {
        "candidates": [candidate_to_json(candidate) for candidate in population.candidates],
        "val_ids": list(population.val_ids),
        "score_K_V": [list(score_V) for score_V in population.score_K_V],
        "policy_version": population.policy_version,
    }


def population_from_json(data: Mapping[str, Any]) -> Population:
    """The inverse of :func:`population_to_json`.

    Raises:
        ConfigError: A candidate does not match its id.
    """
    return Population(
        candidates=tuple(candidate_from_json(row) for row in data["candidates"]),
        val_ids=tuple(data["val_ids"]),
        score_K_V=tuple(tuple(float(s) for s in score_V) for score_V in data["score_K_V"]),
        policy_version=int(data["policy_version"]),
    )


def plain_value(value: Any) -> Any:
    """A field's value as JSON would have it, as far as it can; what JSON cannot hold stays.

    Pydantic models and examples become dicts of their fields, as ``dspy.Example.toDict`` makes
    them.
    """
    # Mixed key types cannot be sorted, and sets have no order: both would make the hash unstable.
    if isinstance(value, BaseModel):
        value = value.model_dump()
    elif isinstance(value, dspy.Example):
        value = value.toDict()
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(canonical_json(item) for item in value)
    return value
