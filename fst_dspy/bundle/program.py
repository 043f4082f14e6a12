"""The state of a bundle's program, its predictors' texts and settings."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import dspy
from dspy.utils.saving import get_dependency_versions

from fst_dspy.bundle.manifest import TOOLS, Manifest, PredictorRecord, check_lm_settings
from fst_dspy.errors import ProgramError, StoreError
from fst_dspy.files import plain_json
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.student.modules import copy_program, every_predictor
from fst_dspy.student.tools import set_tool_texts, tool_texts

_METADATA, _VERSIONS = "metadata", "dependency_versions"  # beside the parameters of a state
_PREDICT_STATE = {"traces", "train", "demos", "signature", "lm", "fields"}
# A program's class may save and load itself; these are DSPy's own ways.
_DSPYS_DUMP = (dspy.Module.dump_state, dspy.Predict.dump_state)
_DSPYS_LOAD = (dspy.Module.load_state, dspy.Predict.load_state)


def predictor_record(predictor: dspy.Predict) -> PredictorRecord:
    """What a manifest says of a predictor.

    Raises:
        ProgramError: Its LM has settings that a bundle does not hold.
    """
    settings = None
    if isinstance(predictor.lm, LocalLM):
        settings = {**predictor.lm.kwargs, "cache": predictor.lm.cache}
        try:
            check_lm_settings(settings)
        except (StoreError, TypeError) as error:
            raise ProgramError(f"the settings of its LM cannot be saved: {error}") from error
    return PredictorRecord(tuple(predictor.signature.fields), settings)


def dump_state(program: dspy.Module) -> dict[str, Any]:
    """What ``program.save("x.json")`` would write, but for the language models.

    And the states of the predictors that DSPy leaves out (``every_predictor``), unless the
    program's class saves itself.

    Raises:
        ProgramError: The state holds what JSON cannot.
    """
    try:
        if _saves_itself(program):
            state = _dump_without_lms(program)
        else:
            states = {
                name: _without_lm(parameter).dump_state()
                for name, parameter in _parameters(program).items()
            }
            state = states["self"] if set(states) == {"self"} else states
        if _METADATA not in state:  # a predictor of that name; DSPy would write over it
            state = {**state, _METADATA: {_VERSIONS: get_dependency_versions()}}
        return plain_json(state)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProgramError(f"the program's state is not plain JSON: {error}") from error


def _parameters(program: dspy.Module) -> dict[str, Any]:
    return dict(program.named_parameters()) | every_predictor(program)


def _saves_itself(program: dspy.Module) -> bool:
    kind = type(program)
    return kind.dump_state not in _DSPYS_DUMP or kind.load_state not in _DSPYS_LOAD


def _without_lm(parameter: Any) -> Any:
    if not isinstance(parameter, dspy.Predict):
        return parameter
    bare = copy.copy(parameter)
    bare.lm = None
    return bare


def _dump_without_lms(program: dspy.Module) -> dict[str, Any]:
    """The state by the program's own ``dump_state``, which has to find predictors without LMs."""
    bare = copy_program(program)
    for predictor in every_predictor(bare).values():
        predictor.lm = None
    return bare.dump_state()


def dump_tools(program: dspy.Module) -> dict[str, dict[str, str]]:
    """What is read of the program's tools, by predictor: DSPy's state does not have all of it."""
    found: dict[str, dict[str, str]] = {}
    for (predictor, tool), text in tool_texts(program).items():
        found.setdefault(predictor, {})[tool] = text
    return found


def load_tools(program: dspy.Module, found: dict[str, dict[str, str]]) -> None:
    """Put what is read of tools into a program; of those that it has, which are the caller's.

    Raises:
        StoreError: It is not what :func:`dump_tools` gives.
    """
    own = tool_texts(program)
    said = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(t, dict) and all(isinstance(x, str) for x in t.values()) for t in said):
        raise StoreError(f"{TOOLS} does not hold the descriptions of tools")
    texts = {(name, tool): text for name, said in found.items() for tool, text in said.items()}
    set_tool_texts(program, {key: text for key, text in texts.items() if key in own})


def new_instance(class_path: str) -> dspy.Module:
    """A program of a class that this process has imported; nothing is imported for the folder."""
    hint = "pass program=<an instance of its class>"
    module, _, qualname = class_path.partition(":")
    found: Any = sys.modules.get(module)
    if found is None:
        raise ProgramError(
            f"the bundle holds a program of the class {class_path!r}, whose module has not been "
            f"imported; import it first, or {hint}"
        )
    for part in qualname.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    if not (isinstance(found, type) and issubclass(found, dspy.Module)):
        raise ProgramError(f"{class_path!r} is not a class of DSPy programs here; {hint}")
    try:
        return found()
    except Exception as error:
        raise ProgramError(f"{class_path!r} cannot be made without arguments; {hint}") from error


def copy_of(program: dspy.Module) -> dspy.Module:
    """A copy of the program that a caller gave, which must be one; made as a compile's are."""
    if not isinstance(program, dspy.Module):
        raise ProgramError(f"program must be an instance of the program's class, got {program!r}")
    return copy_program(program)


def load_state(program: dspy.Module, manifest: Manifest, state: dict[str, Any]) -> None:
    """Put a bundle's state into a program, in place; its language models stay as they are.

    A class with a ``dump_state`` or ``load_state`` of its own loads itself, as it would from DSPy.

    Raises:
        ProgramError: The program is of another shape than the one that was saved.
        StoreError: A predictor's state is not one that DSPy writes.
    """
    if not isinstance(state, dict):
        raise StoreError("program.json does not hold the state of a program")
    own = dict(state)
    if isinstance(beside := own.get(_METADATA), dict) and _VERSIONS in beside:
        del own[_METADATA]
    lms = {name: predictor.lm for name, predictor in every_predictor(program).items()}
    if _saves_itself(program):
        _check_predictors(program, own)
        program.load_state(own)
        _check_fields(program, manifest)
    else:
        _load_parameters(program, manifest, own)
    for name, predictor in every_predictor(program).items():
        predictor.lm = lms.get(name)


def _load_parameters(program: dspy.Module, manifest: Manifest, state: dict[str, Any]) -> None:
    parameters = _parameters(program)
    if set(parameters) == {"self"}:  # a bare predictor's state is flat
        state = {"self": state}
    if set(state) != set(parameters):
        raise ProgramError(
            f"the bundle's program has the parameters {sorted(state)}, but "
            f"{type(program).__name__} has {sorted(parameters)}; pass the program that was compiled"
        )
    _check_fields(program, manifest)
    _check_predictors(program, state)
    for name, parameter in parameters.items():
        parameter.load_state(state[name])


def _check_fields(program: dspy.Module, manifest: Manifest) -> None:
    predictors = every_predictor(program)
    if set(manifest.predictors) != set(predictors):
        raise ProgramError(
            f"the bundle's program has the predictors {sorted(manifest.predictors)}, but "
            f"{type(program).__name__} has {sorted(predictors)}; pass the program that was compiled"
        )
    for name, predictor in predictors.items():
        fields = tuple(predictor.signature.fields)
        if manifest.predictors[name].fields != fields:
            raise ProgramError(
                f"the predictor {name!r} of the bundle's program has the fields "
                f"{manifest.predictors[name].fields}, but here it has {fields}"
            )


def _check_predictors(program: dspy.Module, state: dict[str, Any]) -> None:
    """Check the states of all predictors that DSPy loads and that stand under their names."""
    for name, predictor in every_predictor(program).items():
        if name in state and type(predictor).load_state is dspy.Predict.load_state:
            _check_state(name, state[name], len(predictor.signature.fields))


def _check_state(name: str, state: dict[str, Any], fields: int) -> None:
    """DSPy sets whatever a state holds as attributes: so it must hold what DSPy writes, no more."""
    signature = state["signature"]
    sound = (
        set(state) <= _PREDICT_STATE
        and state["lm"] is None
        and all(isinstance(state[key], list) for key in ("traces", "train", "demos"))
        and all(isinstance(demo, dict) for demo in state["demos"])
        and isinstance(state.get("fields", {}), dict)
        and set(signature) == {"instructions", "fields"}
        and isinstance(signature["instructions"], str)
        and len(signature["fields"]) == fields
        and all(
            set(field) == {"prefix", "description"}
            and all(isinstance(text, str) for text in field.values())
            for field in signature["fields"]
        )
    )
    if not sound:
        raise StoreError(f"program.json does not hold the state of a predictor under {name!r}")


def bind_lms(program: dspy.Module, manifest: Manifest, lm: LocalLM) -> None:
    """Give the predictors their LMs; those with equal settings share one, as before."""
    bound: dict[str, LocalLM] = {}
    for name, predictor in every_predictor(program).items():
        settings = manifest.predictors[name].lm
        if settings is not None:
            key = json.dumps(settings, sort_keys=True)
            if key not in bound:
                bound[key] = lm.copy(cache=settings["cache"])
                bound[key].kwargs = {k: v for k, v in settings.items() if k != "cache"}
            predictor.lm = bound[key]
