"""What a model's files claim to be, held against their size before any memory is taken for it.

A ``config.json`` of a kilobyte can ask for any amount of memory: a vocabulary of 10⁹, or 10⁸ names
of labels. So the numbers that count things made one by one are bounded, and the weights that a
configuration describes are counted on PyTorch's meta device, which allocates none, and compared
with the bytes that are there to fill them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fst_dspy.errors import ModelError
from fst_dspy.pretrained.gguf import SUFFIX, read_gguf_config

MAX_CONFIG_BYTES = 2**24
MAX_COUNTED = {
    r".*labels": 2**16,
    r".*(layers?|blocks?|groups|stages|depths?)": 2**9,
    r".*experts": 2**13,
}
"""The most of each that a configuration may ask for, several times what any model has."""
SPARE_VALUES = 2**24
"""Weights that a model may have beyond what its files hold, such as an output layer tied to its
input."""
SPARE_BUFFER_BYTES = 2**28
"""Constants that a model may make for itself, such as masks and tables of angles."""
_VALUES_A_BYTE = 8  # of a quantized model, at most
_WEIGHTS = ("*.safetensors", "*.bin")


def check_claims(where: Path) -> None:
    """Refuse a model whose configuration asks for more than its weights can fill.

    Args:
        where: A GGUF file, or the folder where ``config.json`` and the weights are; without one of
            them nothing is checked, for then transformers loads nothing.

    Raises:
        ModelError: It asks for more.
    """
    if where.suffix == SUFFIX:
        config = read_gguf_config(where)
        _check_counts(where, config.to_dict())
        _check_weights(where, config, where.stat().st_size, _VALUES_A_BYTE)
        return
    folder, path = where, where / "config.json"
    stored = sum(file.stat().st_size for kind in _WEIGHTS for file in folder.glob(kind))
    if not path.is_file() or not stored:
        return
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is too large for the configuration of a model")
    plain = json.loads(path.read_bytes())
    _check_counts(path, plain)
    values_a_byte = _VALUES_A_BYTE if "quantization_config" in plain else 1
    _check_weights(path, AutoConfig.from_pretrained(folder), stored, values_a_byte)


def _check_counts(path: Path, plain: Any) -> None:
    for name, number in _numbers(plain):
        for pattern, limit in MAX_COUNTED.items():
            if re.fullmatch(pattern, name) and number > limit:
                raise ModelError(f"{path} asks for {name}={number:g}; at most {limit} are made")


def _check_weights(path: Path, config: Any, stored: int, values_a_byte: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    values = sum(weight.numel() for weight in model.parameters())
    room = stored * values_a_byte + SPARE_VALUES
    if values > room:
        raise ModelError(
            f"{path} describes a model of {values:,} weights, but its files hold {stored:,} bytes"
        )
    constants = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if constants > stored + SPARE_BUFFER_BYTES:
        raise ModelError(f"{path} asks for {constants:,} bytes of constants")


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a JSON value, each with the name it goes by."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _numbers(child, key)
    elif isinstance(value, list):
        for child in value:
            yield from _numbers(child, name)
    elif isinstance(value, int | float):
        yield name, value
