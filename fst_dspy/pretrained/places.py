"""Where a model is that goes by a name, a path or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from fst_dspy.embedded import path as embedded_path
from fst_dspy.errors import ModelError
from fst_dspy.files import path_given
from fst_dspy.pretrained import smollm2
from fst_dspy.pretrained.gguf import SUFFIX, find_gguf


def model_place(name_or_path: str | Path) -> str:
    """The folder, GGUF file or hub id of a model; SmolLM2 is fetched where it is asked for.

    A path is absolute: it holds where the process has gone to another folder since.

    Raises:
        ModelError: It is no name or path, what looks like a path is none, or SmolLM2 cannot be had.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path).strip():
        raise ModelError(
            f"a model is a name, a folder, a GGUF file or a hub id, not {name_or_path!r:.80}"
        )
    if str(name_or_path) == "embedded":
        return str(embedded_path())
    if str(name_or_path) in smollm2.NAMES:
        return str(smollm2.fetch(str(name_or_path)))
    path = path_given(name_or_path)
    looks_like_path = isinstance(name_or_path, Path) or str(name_or_path)[:1] in ("/", ".", "~")
    found = find_gguf(path)
    if found is not None:
        return str(found)
    if (looks_like_path or path.suffix == SUFFIX) and not path.is_dir():
        raise ModelError(f"there is no model folder or GGUF file {str(path)!r}")
    return str(path) if path.is_dir() else str(name_or_path)
