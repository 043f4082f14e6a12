"""A stream of tasks as one folder: a bundle a task, and what the stages did.

Layout::

    continual.json     settings, stages with their results, measured scores
    tasks/<name>/      the task's program under the shared weights (``fst_dspy.bundle.saving``)

All bundles hold the same weights, so their files are hard links to one where the file system has
them; copied elsewhere, each is whole. Nothing in the folder is run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dspy
from safetensors.torch import load_file

from fst_dspy.bundle import saving as bundle
from fst_dspy.bundle.files import holds_only, is_name, read_plain_json, write_folder
from fst_dspy.bundle.manifest import damaged, read_manifest
from fst_dspy.bundle.weights import read_weights
from fst_dspy.continual.stages import TaskStage, keep_version, stage_from_json, stage_to_json
from fst_dspy.errors import ModelError, StoreError
from fst_dspy.model.policy import Policy
from fst_dspy.run.store import environment

HISTORY = "continual.json"
SCHEMA_VERSION = 1
WEIGHTS = ("model/model.safetensors", "adapter.safetensors")


def write(
    folder: Path,
    history: Mapping[str, Any],
    stages: Sequence[TaskStage],
    programs: Mapping[str, dspy.Module],
) -> Path:
    """Write the folder whole or not at all.

    Args:
        folder: A new or empty folder, or one of these with nothing else in it.
        history: What else there is to know, for JSON.
        stages: All of them.
        programs: The tasks' programs by name, under one version of the weights.

    Raises:
        StoreError: The folder holds something else, or cannot be written.
    """
    plain = {
        "schema_version": SCHEMA_VERSION,
        "environment": environment(),
        **history,
        "stages": [stage_to_json(stage) for stage in stages],
    }

    def fill(path: Path) -> None:
        folders = [bundle.save(program, _task(path, name)) for name, program in programs.items()]
        for other in folders[1:]:
            _link_weights(folders[0], other)
        (path / HISTORY).write_text(json.dumps(plain, indent=1))

    return write_folder(folder, fill, lambda path: holds_only(path, _is_own))


def read(folder: Path) -> tuple[dict[str, Any], tuple[TaskStage, ...]]:
    """What ``write`` was given as ``history``, and the stages.

    Raises:
        StoreError: The folder is no such folder, damaged, or of another version.
    """
    if not (folder / HISTORY).is_file():
        raise StoreError(f"{folder} holds no saved stream of tasks: it has no {HISTORY}")
    history = read_plain_json(folder / HISTORY)
    with damaged(folder):
        if history.pop("schema_version") != SCHEMA_VERSION:
            raise StoreError(f"{folder} was written by another version of this package")
        stages = tuple(stage_from_json(plain) for plain in history.pop("stages"))
        if not stages:
            raise StoreError(f"the stream in {folder} has no stages")
    return history, stages


def read_shared_weights(folder: Path, last: TaskStage, policy: Policy) -> None:
    """Have the weights after the last stage at hand in the policy.

    Raises:
        StoreError: The bundle that holds them is damaged.
        ModelError: The policy is of another model than the one that was trained.
    """
    if policy.base_version != last.result.base_version:
        raise ModelError(
            f"the stream in {folder} was learned on {last.result.base_version}, but the programs "
            f"call {policy.base_version}; configure the model that it began with"
        )
    if policy.has(last.version):
        return
    path = _task(folder, last.task)
    manifest = read_manifest(path)
    if manifest.weights.version != last.version:
        raise StoreError(f"{path} holds {manifest.weights.version}, not {last.version}")
    if manifest.weights.kind == "lora":
        state = load_file(path / "adapter.safetensors")
    else:
        state = read_weights(path, manifest, device="cpu").trainable_state()
    keep_version(policy, last.version, manifest.weights.lora, state)


def _is_own(name: str) -> bool:
    """Whether a file of that name is one of ours: run folders beside them may be a user's only."""
    place, _, rest = name.partition("/")
    return name == HISTORY or (place == "tasks" and is_name(rest.partition("/")[2]))


def _task(folder: Path, name: str) -> Path:
    return folder / "tasks" / name


def _link_weights(source: Path, target: Path) -> None:
    """Make the weight files of a bundle hard links to another's, where that can be done."""
    for name in WEIGHTS:
        if (source / name).is_file() and (target / name).is_file():
            link = target / f"{name}.link"
            with suppress(OSError):
                os.link(source / name, link)
                os.replace(link, target / name)
