"""The state of a bundle's program, its predictors' texts and settings."""

from __future__ import annotations

import json
import sys
from typing import Any

import dspy
from dspy.utils.saving import get_dependency_versions

from fst_dspy.bundle.manifest import Manifest, PredictorRecord, check_lm_settings
from fst_dspy.errors import ProgramError, StoreError
from fst_dspy.lm.local_lm import LocalLM

_PREDICT_STATE = {"traces", "train", "demos", "signature", "lm", "fields"}


def _predictor_record(predictor: dspy.Predict) -> PredictorRecord:
    settings = None
    if isinstance(predictor.lm, LocalLM):
        settings = {**predictor.lm.kwargs, "cache": predictor.lm.cache}
        try:
            check_lm_settings(settings)
        except (StoreError, TypeError) as error:
            raise ProgramError(f"the settings of its LM cannot be saved: {error}") from error
    return PredictorRecord(tuple(predictor.signature.fields), settings)


def _dump_state(program: dspy.Module) -> dict[str, Any]:
    """What ``program.save("x.json")`` would write, but for the language models."""
    bare = program.deepcopy()
    for _, predictor in bare.named_predictors():
        predictor.lm = None
    state = {**bare.dump_state(), "metadata": {"dependency_versions": get_dependency_versions()}}
    try:
        return json.loads(json.dumps(state))
    except (TypeError, ValueError, RecursionError) as error:
        raise ProgramError(f"the program's state is not plain JSON: {error}") from error


def _instance(class_path: str) -> dspy.Module:
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


def _copy_of(program: dspy.Module) -> dspy.Module:
    if not isinstance(program, dspy.Module):
        raise ProgramError(f"program must be an instance of the program's class, got {program!r}")
    return program.deepcopy()


def _load_state(program: dspy.Module, manifest: Manifest, state: dict[str, Any]) -> None:
    parameters = dict(program.named_parameters())
    predictors = dict(program.named_predictors())
    if not isinstance(state, dict) or set(state) - {"metadata"} != set(parameters):
        raise ProgramError(
            f"the bundle's program has the parameters {sorted(set(state) - {'metadata'})}, but "
            f"{type(program).__name__} has {sorted(parameters)}; pass the program that was compiled"
        )
    if set(manifest.predictors) != set(predictors):
        raise ProgramError(
            f"the bundle's program has the predictors {sorted(manifest.predictors)}, but "
            f"{type(program).__name__} has {sorted(predictors)}"
        )
    for name, predictor in predictors.items():
        fields = tuple(predictor.signature.fields)
        if manifest.predictors[name].fields != fields:
            raise ProgramError(
                f"the predictor {name!r} of the bundle's program has the fields "
                f"{manifest.predictors[name].fields}, but here it has {fields}"
            )
        if type(predictor).load_state is dspy.Predict.load_state:
            _check_state(name, state[name], len(fields))
    lms = {name: predictor.lm for name, predictor in predictors.items()}
    program.load_state({name: state[name] for name in parameters})
    for name, predictor in program.named_predictors():
        predictor.lm = lms[name]


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


def _bind(program: dspy.Module, manifest: Manifest, lm: LocalLM) -> None:
    """Give the predictors their LMs; those with equal settings share one, as before."""
    bound: dict[str, LocalLM] = {}
    for name, predictor in program.named_predictors():
        settings = manifest.predictors[name].lm
        if settings is not None:
            key = json.dumps(settings, sort_keys=True)
            if key not in bound:
                bound[key] = lm.copy(cache=settings["cache"])
                bound[key].kwargs = {k: v for k, v in settings.items() if k != "cache"}
            predictor.lm = bound[key]
