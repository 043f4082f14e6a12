"""What a model takes of a machine's memory, and what its files claim, before any is taken for it.

The counts work for models on PyTorch's meta device too, which have no weights; sizes are in bytes.

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
from fst_dspy.model.hardware import free_memory, total_memory
from fst_dspy.pretrained.gguf import SUFFIX, read_from, read_gguf_config

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
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_USED = ("num_experts_per_tok", "top_k_experts")
"""How configurations call the experts of a layer, and those that a token is sent to."""
_VALUES_A_BYTE = 8  # of a quantized model, at most
_WEIGHTS = ("*.safetensors", "*.bin")

MAX_CPU_TOKENS = 65_536
"""Of a batch that is decoded on a CPU, where larger ones are no faster."""
LEAST_TOKENS = 1024
"""Of a batch, however little memory there seems to be: what does not fit is halved then."""
ACTIVATION_BYTES = 128
"""A layer keeps about so much for the gradient, times its width, of a token in bfloat16."""
LOGIT_BYTES = 28
"""For each row and word of the vocabulary while a token is drawn: logits in the model's dtype and
in float32, log-probabilities, and probabilities and their sums in float64."""


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


def described(where: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The causal language model that a ``config.json`` describes, without memory for its weights.

    Args:
        where: A folder with ``config.json``, a GGUF file, or a hub id; of a folder, weights and
            tokenizer are not needed.
        trust_remote_code: Run Python code that comes with the model.
    """
    named, more = read_from(where)
    config = AutoConfig.from_pretrained(named, trust_remote_code=trust_remote_code, **more)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def parameter_count(model: Any) -> int:
    """Parameters of a model, those that it uses twice counted once, without adapters."""
    own = sum(w.numel() for name, w in model.named_parameters() if "lora_" not in name)
    # bitsandbytes keeps several in one number.
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return own + sum(max(0, m.in_features * m.out_features - m.weight.numel()) for m in linear)


def active_count(model: Any) -> int:
    """Parameters that a token meets: of a mixture's experts those alone that it is sent to."""
    config = model.config.get_text_config()
    experts, used = (
        next((count for name in names if (count := getattr(config, name, None))), 0)
        for names in (EXPERTS, EXPERTS_USED)
    )
    count = parameter_count(model)
    if not 0 < used < experts:
        return count
    held = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if ".experts." in name and "lora_" not in name
    )
    return count - round(held * (1 - used / experts))


def quantized_bits(config: Any) -> float | None:
    """Bits that a weight of a quantized linear layer takes, with what scales it; about.

    Args:
        config: Of the model.

    Returns:
        ``None`` where weights are not quantized, or it is not known how far.
    """
    found = getattr(config, "quantization_config", None)
    plain = found if isinstance(found, dict) or found is None else found.to_dict()
    text = str(plain).lower()
    if plain is None:
        return None
    if plain.get("load_in_4bit") or plain.get("bits") == 4 or "int4" in text:
        return 4.5
    return 8.25 if plain.get("load_in_8bit") or plain.get("bits") == 8 or "int8" in text else None


def parameter_bytes(model: Any) -> int:
    """Size of a model's weights, those that it uses twice counted once."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def cache_bytes(config: Any, itemsize: int) -> int:
    """Size of what a layer cache holds of one token: its keys and values, over all layers.

    Args:
        config: Of the model. Where it tells no heads, hidden states are counted instead.
        itemsize: Of a value.
    """
    config = config.get_text_config()
    # Layers of Gemma 4 differ in their heads, and its configuration tells of each by itself alone.
    several = getattr(config, "is_heterogeneous", False)
    layers = config.per_layer_config if several else [config] * config.num_hidden_layers
    return itemsize * sum(map(_cached_values, layers))


def _cached_values(config: Any) -> int:
    """Of a layer, and one token."""
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * key_heads * width


def activation_bytes(config: Any, itemsize: int) -> int:
    """About what is kept of one token for the gradient, but for the logits."""
    config = config.get_text_config()
    each = ACTIVATION_BYTES * itemsize // 2
    return each * config.hidden_size * config.num_hidden_layers


class DecodingRoom:
    """What memory holds of the rows that are decoded together.

    Of what the weights leave their caches may take half on a GPU and an eighth on a CPU, or half of
    what is free where that is less. Rounded down to a power of two: how rollouts are cut into
    batches should not depend on what else runs, for it decides how sums are rounded.
    """

    def __init__(self, model: Any) -> None:
        cpu = model.device.type != "cuda"
        room = (total_memory(model.device) - parameter_bytes(model)) // (4 if cpu else 1)
        self.bytes = power_of_two(min(room, free_memory(model.device)) // 2)
        self.most_tokens = MAX_CPU_TOKENS if cpu else None
        self._token = cache_bytes(model.config, model.dtype.itemsize)
        self._row = LOGIT_BYTES * model.config.get_text_config().vocab_size

    def holds(self, rows: int, tokens: int) -> bool:
        """Whether there is room for rows with so many tokens in all; always for little enough.

        Args:
            rows: Rows that a token is drawn for.
            tokens: That the cache holds, of prompts and completions.
        """
        if self.most_tokens is not None and tokens > self.most_tokens:
            return False
        return tokens <= LEAST_TOKENS or rows * self._row + tokens * self._token <= self.bytes


def training_tokens(config: Any, itemsize: int, free: int, most: int) -> int:
    """How many tokens of a micro-batch half of the free memory holds the activations of.

    A power of two, for the same reason as in ``decoding_budget``.

    Args:
        config, itemsize: Of the model that is trained, and of its values.
        free: Memory that is free, in bytes.
        most: More tokens are not wanted.
    """
    fit = power_of_two(free // 2 // activation_bytes(config, itemsize))
    return min(most, max(LEAST_TOKENS, fit))


def power_of_two(number: int) -> int:
    """The largest that a number is not below; 0 below 1."""
    return 2 ** (number.bit_length() - 1) if number > 0 else 0


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
