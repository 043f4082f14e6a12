"""GGUF files, read into plain models: as llama.cpp, Ollama and others have them, quantized or not.

A quantized file is unpacked, for its weights are to be trained. What it has forgotten in being
quantized stays forgotten: the model is the one that the file describes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from fst_dspy.errors import ModelError
from fst_dspy.pretrained.adapters import refuse_adapters
from fst_dspy.pretrained.weights import read_whole

SUFFIX = ".gguf"
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf")
"""How llama.cpp ends the names of the parts of a model."""


def find_gguf(where: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder without ``config.json`` holds alone.

    Returns:
        ``None`` where it is another kind of model, or none.

    Raises:
        ModelError: There are several, or it is a part of a model, which would be read as a whole.
    """
    if where.suffix == SUFFIX and where.is_file():
        return _whole(where)
    if not where.is_dir() or (where / "config.json").is_file():
        return None
    found = list(map(_whole, sorted(where.glob(f"*{SUFFIX}"))))
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        raise ModelError(f"{where} holds {len(found)} GGUF files ({names}); name one of them")
    return found[0] if found else None


def _whole(file: Path) -> Path:
    part = _PART.search(file.name)
    if part is not None and int(part[1]) > 1:
        raise ModelError(
            f"{file} is one of the {int(part[1])} parts of a model; put them together with "
            "llama.cpp's llama-gguf-split --merge, and name the file that comes of it"
        )
    return file


def read_from(where: str | Path) -> tuple[str, Mapping[str, Any]]:
    """What transformers' ``from_pretrained`` is to be given for a model: a name, and keywords.

    Args:
        where: A folder, a GGUF file, or a hub id.

    Raises:
        ModelError: As ``find_gguf``; the package that reads such files is missing; or the folder
            holds adapters.
    """
    file = find_gguf(Path(where))
    if file is None:
        refuse_adapters(where)
        return str(where), {}
    if find_spec("gguf") is None:
        raise ModelError("a GGUF file is read by the package gguf: pip install gguf")
    return str(file.parent), {"gguf_file": file.name}


def read_gguf_config(file: Path) -> Any:
    """The configuration that a file's header gives its model; takes no memory for weights."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def read_gguf(file: Path, dtype: torch.dtype) -> Any:
    """The model of a file, unpacked, as if it had been loaded from a folder of plain weights."""
    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Later versions of transformers would leave the weights packed if they could compute so.
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = read_whole(file.parent, gguf_file=file.name, dtype=dtype, **more)
    # What is left to tell that the weights were quantized would keep them from being saved.
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, mark):
            delattr(model.config, mark)
    model.is_quantized, model.hf_quantizer = False, None
    return model
