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


def check_claims(folder: Path) -> None:
    """Refuse a model folder whose configuration asks for more than its weights can fill.

    Args:
        folder: Where ``config.json`` and the weights are; without one of them nothing is checked,
            for then transformers loads nothing.

    Raises:
        ModelError: It asks for more.
    """
    path = folder / "config.json"
    stored = sum(file.stat().st_size for kind in _WEIGHTS for file in folder.glob(kind))
    if not path.is_file() or not stored:
        return
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} is too large for the configuration of a model")
    plain = json.loads(path.read_bytes())
    for name, number in _numbers(plain):
        for pattern, limit in MAX_COUNTED.items():
            if re.fullmatch(pattern, name) and number > limit:
                raise ModelError(f"{path} asks for {name}={number:g}; at most {limit} are made")
    model = described(folder)
    values = sum(weight.numel() for weight in model.parameters())
    room = stored * (_VALUES_A_BYTE if "quantization_config" in plain else 1) + SPARE_VALUES
    if values > room:
        raise ModelError(
            f"{path} describes a model of {values:,} weights, but its files hold {stored:,} bytes"
        )
    constants = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if constants > stored + SPARE_BUFFER_BYTES:
        raise ModelError(f"{path} asks for {constants:,} bytes of constants")


def described(where: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The causal language model that a ``config.json`` describes, without memory for its weights.

    Args:
        where: A folder with ``config.json``, or a hub id; weights and tokenizer are not needed.
        trust_remote_code: Run Python code that comes with the model.
    """
    config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def parameter_count(model: Any) -> int:
    """Parameters of a model, those that it uses twice counted once, without adapters."""
    return sum(w.numel() for name, w in model.named_parameters() if "lora_" not in name)


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
