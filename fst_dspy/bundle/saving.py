"""A trained program as one folder: saved, checked, loaded again, on this machine or another.

Layout::

    manifest.json        versions, program class, base model, settings, metrics, SHA-256 of files
    program.json         DSPy's own state of the program, without its language models
    tools.json           what the model reads of an agent's tools, by predictor; only of agents
    model/               full fine-tuning: weights (safetensors), config and tokenizer
    adapter.safetensors  LoRA: the adapters alone
    tokenizer/           with adapters, or where the base's weights are unchanged
    population.json      the candidates with lineage and scores, the best pair, the student's own
    cycles.json          one record a cycle

Loading verifies every file first and runs nothing from the folder: no pickles, no code of a model,
and no import of a module that is not imported already.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import dspy
import torch

from fst_dspy.bundle.files import (
    MANIFEST,
    file_records,
    holds_only,
    is_name,
    read_plain_json,
    write_folder,
)
from fst_dspy.bundle.manifest import (
    TOOLS,
    Manifest,
    damaged,
    is_bundle,
    read_manifest,
)
from fst_dspy.bundle.program import (
    bind_lms,
    copy_of,
    dump_state,
    dump_tools,
    load_state,
    load_tools,
    new_instance,
    predictor_record,
)
from fst_dspy.bundle.weights import plain_folder, read_run, read_weights, write_weights
from fst_dspy.errors import ProgramError, StoreError
from fst_dspy.files import path_given
from fst_dspy.lm.compiled import mark_compiled
from fst_dspy.lm.local_lm import COMPILED_ADAPTER, LocalLM
from fst_dspy.model.policy import Policy
from fst_dspy.results.result import FSTResult, result_from_json
from fst_dspy.run.store import environment
from fst_dspy.student.candidate import (
    candidate_to_json,
    population_to_json,
)
from fst_dspy.student.identity import adapter_identity
from fst_dspy.student.mixins import Mixin, mix_in, plain_class
from fst_dspy.student.modules import every_predictor

_RESULT = "fst_result"  # the attribute of a savable program that holds what its compile came to


def save(program: dspy.Module, folder: str | os.PathLike[str]) -> Path:
    """Save a compiled program, with its weights, as a bundle.

    Weights: the adapters alone under LoRA; nothing where they are the unchanged ones of the
    embedded model or of a model on the hub; otherwise all of them.

    Args:
        program: Its predictors call one ``LocalLM``, at one version. Those that call another model
            get it from the program that is passed to ``load``.
        folder: A new or empty folder, or a bundle and nothing else, which is replaced.

    Returns:
        The folder.

    Raises:
        ProgramError: No predictor calls a ``LocalLM``, or they disagree, or the state is not JSON.
        StoreError: The folder holds something else, or cannot be written.
    """
    policy, version = _weights_of(program)
    predictors = {name: predictor_record(p) for name, p in every_predictor(program).items()}
    state, result, tools = dump_state(program), _result_of(program), dump_tools(program)

    def write(path: Path) -> None:
        weights = write_weights(policy, version, path)
        _write_json(path / "program.json", state)
        if tools:
            _write_json(path / TOOLS, tools)
        if result is not None:
            _write_json(path / "population.json", _population_to_json(result))
            _write_json(path / "cycles.json", [asdict(record) for record in result.records])
        manifest = Manifest(
            program=f"{type(program).__module__}:{type(program).__qualname__}",
            predictors=predictors,
            weights=weights,
            run=None if result is None else _run_to_json(result),
            versions=environment(),
            files=file_records(path),
            adapter=vars(program).get(COMPILED_ADAPTER) or adapter_identity(dspy.settings.adapter),
        )
        _write_json(path / MANIFEST, manifest.to_json())

    return write_folder(
        Path(folder), write, lambda path: is_bundle(path) and holds_only(path, is_name)
    )


def _all_held(manifest: Manifest) -> bool:
    """Whether answers of all that was bound are held to formats; so others' are at run time."""
    bound = [own.lm for own in manifest.predictors.values() if own.lm is not None]
    return bool(bound) and all(settings.get("structured") for settings in bound)


def load(
    folder: str | os.PathLike[str],
    program: dspy.Module | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> dspy.Module:
    """Load a bundle: the program, its predictors bound to the trained weights.

    Args:
        folder: The bundle.
        program: An instance of the student's class, which is copied. May be left out when the
            class has been imported and is made without arguments.
        base: The folder or hub id of the model that was trained, for a bundle without its own
            copy (LoRA over a local folder, or a name that cannot be reached).
        device: Defaults to CUDA where there is one.

    Returns:
        The program; with ``detailed_results`` where the bundle holds them.

    Raises:
        StoreError: The folder is damaged, unknown or unsafe. Nothing of it was run.
        ProgramError: The program is missing, or is not the one that was saved.
        ModelError: The base model is missing or another one; the message says which is expected.
    """
    path = path_given(folder)
    manifest = read_manifest(path)
    with damaged(path):
        loaded = new_instance(manifest.program) if program is None else copy_of(program)
        load_state(loaded, manifest, read_plain_json(path / "program.json"))
        if TOOLS in manifest.files:
            load_tools(loaded, read_plain_json(path / TOOLS))
        result = _read_result(path, manifest)
    policy = read_weights(path, manifest, os.fspath(base) if base is not None else None, device)
    policy.keep()
    lm = LocalLM(policy, structured=_all_held(manifest))
    following = [p for p in every_predictor(loaded).values() if p.lm is None]
    bind_lms(loaded, manifest, lm)
    following = [p for p in following if p.lm is not None]
    mark_compiled(loaded, lm, following, manifest.adapter)
    loaded._compiled = True
    vars(loaded).pop("detailed_results", None)  # of the program that was passed
    if result is not None:
        loaded.detailed_results = result
    make_savable(loaded, result)
    return loaded


def export(
    source: dspy.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the trained model as a plain folder for transformers, vLLM and others.

    Adapters are merged into the weights. The program's prompts do not go along.

    Args:
        source: A compiled program, a bundle, or the run folder of a finished compile.
        folder: A new or empty folder.
        base: As for ``load``; a run folder needs it unless the embedded model was trained.

    Returns:
        The folder.

    Raises:
        StoreError: The source is neither, or the folder holds something.
        ModelError: The base model is missing or another one.
        ProgramError: No predictor calls a ``LocalLM``, or they disagree.
    """
    where = os.fspath(base) if base is not None else None
    if isinstance(source, dspy.Module):
        policy, version = _weights_of(source)
    else:
        path = path_given(source)
        if is_bundle(path):
            policy = read_weights(path, read_manifest(path), where)
        elif (path / "result.json").is_file():
            policy = read_run(path, where)
        else:
            raise StoreError(f"{path} is neither a bundle nor the run folder of a finished compile")
        version = policy.version()
    return write_folder(Path(folder), plain_folder(policy, version), may_replace=lambda _: False)


class Savable(Mixin):
    """A compiled program: a folder that it is saved to becomes a bundle, all else is DSPy's own."""

    def save(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the program: with its weights as a bundle, or as ``dspy.Module.save`` does.

        Args:
            path: A folder for a bundle; for DSPy's own a file that ends in ``.json`` or ``.pkl``.
            *args, **kwargs: Of ``dspy.Module.save``, which is what any of them asks for.
        """
        if args or any(kwargs.values()) or Path(path).suffix in (".json", ".pkl"):
            super().save(path, *args, **kwargs)  # type: ignore[misc]
        else:
            save(cast(dspy.Module, self), path)


def make_savable(program: dspy.Module, result: FSTResult | None) -> None:
    """Let ``program.save(folder)`` write a bundle, unless its class has a ``save`` of its own."""
    if plain_class(type(program)).save is dspy.Module.save:
        mix_in(program, Savable)
        vars(program)[_RESULT] = result


# --- the program ----------------------------------------------------------------------------------


def _weights_of(program: dspy.Module) -> tuple[Policy, str]:
    if not isinstance(program, dspy.Module):
        raise ProgramError(f"a program must be a dspy.Module, got {type(program).__name__}")
    lms = [p.lm for p in every_predictor(program).values() if isinstance(p.lm, LocalLM)]
    if not lms:
        raise ProgramError(
            "no predictor of the program has a LocalLM of its own, so there are no weights to "
            "save; compile it with fst_dspy.FST, or call program.set_lm(lm)"
        )
    versions = {lm.version for lm in lms}
    if len(versions) > 1 or any(lm.policy is not lms[0].policy for lm in lms):
        raise ProgramError(f"its predictors call different weights: {', '.join(sorted(versions))}")
    return lms[0].policy, versions.pop()


# --- the compile's outcome ------------------------------------------------------------------------


def _result_of(program: dspy.Module) -> FSTResult | None:
    found = getattr(program, "detailed_results", None)
    if isinstance(found, FSTResult):
        return found
    return vars(program).get(_RESULT)


def _run_to_json(result: FSTResult) -> dict[str, Any]:
    first, best = result.records[0], result.records[result.best.cycle]
    return {
        "arm": result.arm,
        "seed": result.seed,
        "config": result.config.to_dict(),
        "base_version": result.base_version,
        "weights_version": result.weights_version,
        "structured": result.structured,
        "metrics": {
            "student_val_score": first.val_score,
            "best_val_score": result.best.score,
            "best_cycle": result.best.cycle,
            "kl_to_base": best.kl_to_base,
            "rollouts": asdict(result.rollouts),
            "seconds": sum(result.records[-1].seconds.values()),
        },
    }


def _population_to_json(result: FSTResult) -> dict[str, Any]:
    return {
        "population": population_to_json(result.population),
        "best": {**asdict(result.best), "candidate": candidate_to_json(result.best.candidate)},
        "seed_candidate": candidate_to_json(result.seed_candidate),
    }


def _read_result(path: Path, manifest: Manifest) -> FSTResult | None:
    if manifest.run is None:
        return None
    fast = read_plain_json(path / "population.json")
    records = read_plain_json(path / "cycles.json")
    return result_from_json({**fast, **manifest.run, "records": records, "log_dir": None})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
