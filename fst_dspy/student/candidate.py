"""Fast weights as text: from a DSPy program to a ``Candidate`` and back.

A candidate holds, for every predictor, ``"<predictor>.instructions"`` (plain text) and
``"<predictor>.demos"`` (a JSON list of demos), and where that is asked for, the descriptions of the
tools that a predictor chooses among, ``"<predictor>.tool:<name>"`` (``fst_dspy.student.tools``).
Its id is a hash of these texts, so the same texts have the same id in every run, process and
cycle.

What the package relies on of DSPy beyond what it documents, here and elsewhere; ran with 3.4.0 and
3.4.1, held by the test ``test_dspy_contract``:

- ``Example._input_keys``, a set of names or ``None``;
- ``Module._compiled``, by which a program keeps the parts of a module out of its
  ``named_parameters()``; ``Module.deepcopy()``, which falls back to copying attribute by attribute;
- ``Module.reset_copy()``, which takes predictors their LM; the attributes in which optimizers leave
  what they tried (``fst_dspy.student.modules.TRIED``);
- ``Module.dump_state()`` and ``load_state()``: by parameter, of a predictor ``traces``, ``train``,
  ``demos``, ``lm`` and ``signature``, this with ``instructions`` and ``fields``, each a ``prefix``
  and a ``description``; ``dspy.utils.saving.get_dependency_versions()``;
- ``Predict``'s attributes ``signature``, ``demos``, ``lm`` and ``callbacks``, and its argument
  ``lm``; its callbacks hear it besides those of the settings, also where an answer cannot be read,
  with the arguments as ``inputs["kwargs"]``;
- the text that ``ChatAdapter`` writes, on which the embedded model was trained; its
  ``use_json_adapter_fallback``; ``format_system_message``, which is looked up on the instance;
- ``AdapterParseError.signature``, ``LMError.code`` and ``retry_after``;
- ``LM``: ``engine`` and ``async_engine``, which ``copy`` replaces, as it does attributes, and puts
  all else into ``kwargs``; ``infer_provider``, asked once the engine is there; ``__copy__``,
  ``__setstate__`` and the engines' ``dump_state`` and ``load_state``; ``history``, with ``usage``
  and ``cost``; ``disable_history``;
- ``lm15``: the fields of ``Request`` and ``Config``, and that its errors of context length, model,
  feature and request are not retried; the logger ``dspy.clients.lm``, which tells of answers cut
  off; that settings live in context variables, and what they are at first, in
  ``dspy.dsp.utils.settings.DEFAULT_CONFIG``;
- ``dspy.clients.provider`` and ``dspy.clients.utils_finetune``: ``Provider``, ``TrainingJob``, a
  future, ``ReinforceJob``, ``GRPOStatus``, ``TrainDataFormat`` and ``TrainingStatus``;
- that ``Teleprompter`` lets callbacks hear a subclass's ``compile``; ``BetterTogether.STRAT_SEP``.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import dspy
from pydantic import BaseModel

from fst_dspy.errors import ConfigError
from fst_dspy.files import plain_json
from fst_dspy.student.contents import contents
from fst_dspy.student.modules import copy_program
from fst_dspy.student.tools import set_tool_texts, tool_texts
from fst_dspy.types import Candidate, Population

INSTRUCTIONS = "instructions"
DEMOS = "demos"
TAKEN_ID = "_fst_id"
"""The attribute of an example that holds the id it had when it was checked."""
TOOL = "tool:"
"""What the kind of a tool's component begins with; the tool's name follows."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; what JSON cannot hold is written as its ``repr``."""
    return _canonical(value, repr)


def content_hash(value: Any) -> str:
    """First 12 hex digits of the SHA-256 of ``value``'s canonical JSON.

    Where a ``repr`` may leave something out, as of arrays, their contents count in its place.
    """
    text = _canonical(value, lambda part: plain_value(contents(part)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _canonical(value: Any, other: Callable[[Any], Any]) -> str:
    return json.dumps(
        plain_value(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=other
    )


def predictor_names(program: dspy.Module) -> tuple[str, ...]:
    """Names of the program's predictors, in the order of ``program.named_predictors()``."""
    return tuple(name for name, _ in program.named_predictors())


def component_name(predictor: str, kind: str) -> str:
    """The component that holds ``kind`` of a predictor: ``"instructions"``, ``"demos"``, a tool."""
    return f"{predictor}.{kind}"


def split_component(component: str) -> tuple[str, str]:
    """The predictor's name and the kind of a component name.

    Raises:
        ConfigError: The name does not end in ``.instructions``, ``.demos`` or ``.tool:<name>``.
    """
    predictor, found, tool = component.partition(f".{TOOL}")
    if predictor and tool:
        return predictor, f"{TOOL}{tool}"
    predictor, _, kind = component.rpartition(".")
    if found or not predictor or kind not in (INSTRUCTIONS, DEMOS):
        raise ConfigError(
            f"component {component!r} is not '<predictor>.{INSTRUCTIONS}', '<predictor>.{DEMOS}' "
            f"or '<predictor>.{TOOL}<name>'"
        )
    return predictor, kind


def tool_in(component: str) -> str | None:
    """The name of the tool that a component describes; ``None`` for other components."""
    kind = split_component(component)[1]
    return kind.removeprefix(TOOL) if kind.startswith(TOOL) else None


def texts_in(components: Iterable[str]) -> list[str]:
    """Those of the component names that hold plain text, as all but demos do, in their order."""
    return [name for name in components if split_component(name)[1] != DEMOS]


def instructions_in(components: Iterable[str]) -> list[str]:
    """Those of the component names that hold instructions, in their order."""
    return [name for name in components if split_component(name)[1] == INSTRUCTIONS]


def example_id(example: dspy.Example) -> str:
    """Content hash of an example: all its fields (inputs and labels) and which are inputs.

    Fields that JSON cannot hold count by their ``repr``, arrays and the like by what they hold, and
    functions by their name and code; give classes a ``repr`` without memory addresses if ids are to
    agree between processes. One that was taken before (``with_id``) stays.
    """
    taken = vars(example).get(TAKEN_ID)
    if taken is not None:
        return taken
    inputs = sorted(example._input_keys or ())
    return content_hash({"fields": plain_fields(example), "inputs": inputs})


def with_id(example: dspy.Example) -> dspy.Example:
    """The example with the id that it has now, which nobody changes who writes into its values.

    It is another object with the same values; copies that are made to have others (``copy``) have
    an id of their own.
    """
    if TAKEN_ID in vars(example):
        return example
    own = copy.copy(example)
    own._store = dict(example._store)
    vars(own)[TAKEN_ID] = example_id(example)
    return own


def plain_fields(example: dspy.Example) -> dict[str, Any]:
    """An example's fields as ``toDict`` has them, but for those that DSPy keeps to itself.

    ``dspy.datasets`` gives each example a ``dspy_uuid``, which is another in every process.
    """
    fields = example.toDict()
    return {name: held for name, held in fields.items() if not str(name).startswith("dspy_")}


def encode_demos(demos: Iterable[Any]) -> str:
    """Demos as a JSON list of objects, in order; :func:`decode_demos` gives the same fields back.

    Raises:
        ConfigError: A demo holds a value that JSON cannot hold, such as an image.
    """
    rows = [plain_fields(demo) if hasattr(demo, "toDict") else dict(demo) for demo in demos]
    try:
        # Of a demo's fields the signature has the order; what is in them keeps its own.
        return json.dumps([dict(sorted(row.items())) for row in rows], ensure_ascii=False)
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
    return [dspy.Example(row) for row in rows]  # a field may be called base, or self


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


def seed_candidate(program: dspy.Module, tools: bool = False) -> Candidate:
    """The student's own instructions and demos, both for every predictor (demos may be ``[]``).

    Demos of typed values (dates, say) get no component, so they stay the student's own.

    Args:
        program: The student.
        tools: Its tools' descriptions too, as ``FastConfig.tool_descriptions`` has it.

    Raises:
        ConfigError: The program has no predictor, so there is nothing to learn; or demos that could
            not be saved with what is learned.
    """
    components: dict[str, str] = {}
    for name, predictor in program.named_predictors():
        _check_savable(name, predictor.demos)
        components[component_name(name, INSTRUCTIONS)] = predictor.signature.instructions
        with contextlib.suppress(ConfigError):
            components[component_name(name, DEMOS)] = encode_demos(predictor.demos)
    if not components:
        raise ConfigError(
            f"{type(program).__name__} has no predictors; a program to compile needs at least one "
            "dspy.Predict or dspy.ChainOfThought as an attribute"
        )
    if tools:
        for (predictor, tool), text in tool_texts(program).items():
            components[component_name(predictor, f"{TOOL}{tool}")] = text
    return make_candidate(components)


def _check_savable(predictor: str, demos: Sequence[Any]) -> None:
    for number, demo in enumerate(demos):
        for field, value in demo.items():
            try:
                plain_json(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"demo {number} of the predictor {predictor!r} holds {type(value).__name__} in "
                    f"{field!r}, with which the compiled program could not be saved ({error}); "
                    "give it as text, or as a pydantic model"
                ) from error


def bind(program: dspy.Module, candidate: Candidate) -> dspy.Module:
    """A copy of ``program`` with the candidate's texts put in.

    Modules and predictors are its own; all else it shares (``fst_dspy.student.modules``).

    Components the candidate lacks keep the program's own value; ``program`` is left as it was.

    Raises:
        ConfigError: A component names no predictor or tool of the program, or its demos do not
            parse.
    """
    bound = copy_program(program)
    predictors = dict(bound.named_predictors())
    tools = {}
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
        elif kind == INSTRUCTIONS:
            predictor.signature = predictor.signature.with_instructions(text)
        else:
            tools[name, kind.removeprefix(TOOL)] = text
    try:  # last, for some modules write their tools into the instructions
        set_tool_texts(bound, tools)
    except KeyError as error:
        raise ConfigError(
            f"candidate {candidate.id} describes what the program does not have: {error.args[0]}"
        ) from error
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
    objectives = [[dict(cell) for cell in row] for row in population.objective_K_V]
    return {
        "candidates": [candidate_to_json(candidate) for candidate in population.candidates],
        "val_ids": list(population.val_ids),
        "score_K_V": [list(score_V) for score_V in population.score_K_V],
        "policy_version": population.policy_version,
        **({"objective_K_V": objectives} if objectives else {}),
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
        objective_K_V=tuple(tuple(map(dict, row)) for row in data.get("objective_K_V", ())),
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


def plain_field(value: Any) -> Any:
    """A field's value as JSON would have it, and as DSPy reads it from a text.

    A member of an enum whose values are no texts is read by its name alone.

    Raises:
        TypeError, ValueError, RecursionError: JSON has no form of it.
    """
    if isinstance(value, enum.Enum) and not isinstance(value.value, str):
        return value.name
    return plain_json(value)


def value_text(value: Any) -> str:
    """A field's value as a text that an adapter would read: enums by value, models as JSON.

    Types of DSPy's own say themselves how they are shown, such as an image without its pixels.
    """
    if type(value) is str or isinstance(value, dspy.Type):
        return str(value)
    try:
        plain = plain_field(value)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return json.dumps(plain, ensure_ascii=False) if isinstance(plain, dict | list) else str(plain)
