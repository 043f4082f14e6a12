"""The memory of a compile, part by part, and whether all weights can be trained in it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fst_dspy.config import LoraConfig
from fst_dspy.model.policy import adapter_shapes
from fst_dspy.model.sizes import (
    LEAST_TOKENS,
    LOGIT_BYTES,
    activation_bytes,
    cache_bytes,
    parameter_count,
    quantized_bits,
)
from fst_dspy.run.store import KEPT_CHECKPOINTS

USABLE = 0.8
"""Of a machine's memory, that a compile is planned to take: programs and data want some as well."""
MOMENTS = 8
"""Bytes of AdamW's two moments, in float32."""
TRAINED_LOGIT_BYTES = 14
"""For each completion token of a micro-batch and word of the vocabulary: its logit and the gradient
of it in the model's dtype and in float32, at worst."""


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for.

    Attributes:
        weights: The model, in its dtype.
        gradients: Of what is trained, in its dtype.
        optimizer: AdamW's moments, and float32 copies of trained weights in bfloat16.
        copies: The base and the best weights, held beside the live ones where all are trained, and
            an averaged teacher's; on the CPU, also where the model is on a GPU.
        activations: What a micro-batch keeps for the gradient.
        cache: Keys and values of the rows decoded together, and what tokens are drawn from.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    cache: int

    def peak(self, device: torch.device) -> int:
        """The most that the model's device holds at once: while it trains, or while it decodes."""
        always = self.weights + self.optimizer + (self.copies if device.type != "cuda" else 0)
        return always + max(self.gradients + self.activations, self.cache)

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


def run_folder_bytes(memory: Memory) -> int:
    """The most that a run folder's checkpoints and versions of weights take at once.

    A checkpoint holds the trained weights and the optimizer's state. The last ones are kept until
    the next is whole; a version beside them is the best, and one more is it while that changes.
    """
    weights = memory.copies // 2
    return (KEPT_CHECKPOINTS + 1) * (weights + memory.optimizer) + 2 * weights


def trainable_count(model: Any, lora: LoraConfig | None) -> int:
    """Parameters that are trained: all, or those of adapters on every linear layer but the output.

    Args:
        model: Its own adapters, if it has any, are not counted; may be on PyTorch's meta device.
    """
    if lora is None:
        return parameter_count(model)
    return sum(math.prod(shape) for shape in adapter_shapes(model, lora).values())


def memory_of(
    model: Any,
    dtype: torch.dtype,
    lora: LoraConfig | None,
    *,
    trainable: int | None = None,
    averaged: bool = False,
    micro_tokens: int = LEAST_TOKENS,
    trained_tokens: int = 0,
    rows: int = 0,
    cached_tokens: int = 0,
) -> Memory:
    """What a compile takes.

    Args:
        model: Without adapters; may be on PyTorch's meta device.
        dtype: Of its weights.
        lora: The adapters, or ``None`` where all weights are trained.
        trainable: As ``trainable_count`` gives it, which takes half a second for adapters; counted
            if not given.
        averaged: Whether an average of the trained weights teaches.
        micro_tokens, trained_tokens: Of a micro-batch, all tokens and those of completions.
        rows, cached_tokens: Decoded together, and the tokens that their cache holds.
    """
    config, item = model.config, dtype.itemsize
    words = config.get_text_config().vocab_size
    trainable = trainable_count(model, lora) if trainable is None else trainable
    trained_item = item if lora is None else 4  # adapters are in float32
    masters = 4 if trained_item < 4 else 0
    return Memory(
        weights=_weights(model, item),
        gradients=trainable * trained_item,
        optimizer=trainable * (MOMENTS + masters) + (0 if lora is None else trainable * 4),
        copies=2 * trainable * trained_item + (averaged_bytes(trainable) if averaged else 0),
        activations=micro_tokens * activation_bytes(config, item)
        + trained_tokens * words * TRAINED_LOGIT_BYTES,
        cache=cached_tokens * cache_bytes(config, item) + rows * words * LOGIT_BYTES,
    )


def averaged_bytes(trainable: int) -> int:
    """Bytes of an average of so many weights, which is in float32 and on the CPU."""
    return 4 * trainable


def _weights(model: Any, item: int) -> int:
    """Bytes of a model's weights; quantized are the linear layers, but for the output."""
    bits, parameters = quantized_bits(model.config), parameter_count(model)
    if bits is None:
        return parameters * item
    output = model.get_output_embeddings()
    packed = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and module is not output
    )
    return round(packed * bits / 8) + (parameters - packed) * item


def fitting_lora(
    model: Any, dtype: torch.dtype, device: torch.device, total: int
) -> LoraConfig | None:
    """Adapters where training all weights would not fit, or they are quantized; else ``None``.

    It goes by the memory that the machine has, not by what is free: a run that goes on later must
    come to the same.

    Args:
        model: May be on PyTorch's meta device.
        dtype, device: Of its weights, and where they are.
        total: Memory of the device, in bytes.
    """
    if getattr(model, "is_quantized", False) or quantized_bits(model.config) is not None:
        return LoraConfig()
    full = memory_of(model, dtype, None)
    return None if full.peak(device) <= USABLE * total else LoraConfig()
