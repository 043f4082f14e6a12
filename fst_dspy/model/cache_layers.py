"""What we rely on of the insides of transformers' caches; no other file imports them.

Ran with transformers 5.17 to 5.24. They are:

- ``Cache(layers=[...])``, whose ``layers`` is a list that may be assigned to, and its
  ``reorder_cache(index)``, which gathers rows of every layer; ``DynamicCache(config=...)``, whose
  layers exist before anything is read; ``Cache.activate_past_recording()``;
- what a model's forward calls the cache: ``cache``, and ``past_key_values`` until 5.23, or
  ``cache_params`` (Mamba, xLSTM);
- ``DynamicLayer``: ``keys`` and ``values``, (rows, heads, tokens, dim), concatenated along the
  tokens by ``update(keys, values)``, which returns both, so that gradients pass;
  ``is_initialized``, ``device``, ``get_seq_length()`` and ``reorder_cache(index)``;
- ``DynamicSlidingWindowLayer`` and its ``sliding_window``;
- ``StaticLayer(max_cache_len=)``, whose ``keys`` and ``values`` may be given to it;
- ``LinearAttentionLayer``: by number of the state, ``conv_states``, ``conv_kernel_size``,
  ``has_previous_state``, ``is_conv_states_initialized`` and ``is_recurrent_states_initialized``;
  ``lazy_initialization(conv_states=, state_idx=)``; ``record_past``, which makes a convolution
  keep all its inputs; it has no ``keys``.

Where one of them is another than this, ``obstacle`` says so, and what leans on them (shared
prompts, room for tokens to come, common beginnings, recorded steps) is left out: generation then
goes through the cache's public methods alone, slower and with the same tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from fst_dspy.errors import ModelError

__all__ = [
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "StaticLayer",
    "begin_at",
    "cache_name",
    "left_out",
    "obstacle",
    "refuse",
]

logger = logging.getLogger(__name__)

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CHANGED = (AttributeError, TypeError, NotImplementedError, KeyError)
"""What it looks like where an inside has changed."""

_found: list[str] = []


def cache_name(model: Any) -> str:
    """What a model's forward, and its output, call the cache: 5.24 began to rename it.

    Args:
        model: A transformers model, or peft's around one.

    Raises:
        ModelError: It has none (the first GPT), or keeps states elsewhere (RWKV, RecurrentGemma).
    """
    kind: Any = type(model.get_base_model() if hasattr(model, "get_base_model") else model)
    return _cache_name(kind)


@functools.cache
def _cache_name(kind: Any) -> str:
    takes = inspect.signature(kind.forward)
    gives = takes.return_annotation
    outputs = [one for one in get_args(gives) or (gives,) if dataclasses.is_dataclass(one)]
    given = {field.name for one in outputs for field in dataclasses.fields(one)}
    for name in CACHE_NAMES:
        # What is in the model itself could not be gathered for other rows.
        if name in takes.parameters and (name in given or not outputs):
            return name
    raise ModelError(
        f"{kind.__name__} does not take and give back a cache of what it has read (as "
        f"{' or '.join(CACHE_NAMES)}), so that rows cannot go on from it together; take a model of "
        "another kind"
    )


def begin_at(layer: DynamicLayer, keys: Tensor) -> None:
    """Mark a layer of ours as begun, with memory of its own of the kind of these keys."""
    layer.device, layer.is_initialized = keys.device, True
    layer.dtype = keys.dtype  # until 5.23 transformers reads it


def obstacle() -> str | None:
    """What is otherwise than listed above in the transformers at hand, or was found to be."""
    if not _found:
        missing = _missing()
        if missing is not None:
            refuse(missing)
    return _found[0] if _found else None


@contextmanager
def left_out() -> Iterator[None]:
    """Inside the block there is an obstacle, for the caller to find out whether there is one."""
    _found.append("left out")
    try:
        yield
    finally:
        _found.pop()


def refuse(reason: str) -> None:
    """From now on do without the insides, and tell why, once."""
    if not _found:
        _found.append(reason)
        logger.warning(
            "transformers %s keeps its caches in another way than the versions that this was "
            "written for (%s): prompts are read whole and copied for every row; slower, and the "
            "same tokens",
            transformers.__version__,
            reason,
        )


@functools.cache
def _missing() -> str | None:
    """Try the list above on small tensors, a few hundred microseconds."""
    for check in (_dynamic, _static, _linear):
        try:
            check()
        except (*CHANGED, AssertionError) as error:
            return f"{check.__doc__}: {type(error).__name__}: {error}"
    return None


def _dynamic() -> None:
    """DynamicLayer and Cache"""
    layer, states = DynamicLayer(), torch.arange(12.0).view(2, 1, 3, 2)
    assert not layer.is_initialized, "begun before it has read anything"
    layer.update(states, states)
    keys, values = layer.update(states[:, :, :1], states[:, :, :1])
    assert keys is layer.keys and values is layer.values, "update returns other tensors"
    assert keys.shape == (2, 1, 4, 2) and layer.get_seq_length() == 4, "not concatenated"
    assert layer.is_initialized and layer.device == keys.device, "not begun after an update"
    cache = Cache(layers=[layer])
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert layer.keys is not None
    assert torch.equal(layer.keys[:, :, :3], states[[1, 1, 0]]), "rows are not gathered"
    cache.layers[0] = DynamicLayer()
    assert callable(cache.activate_past_recording)
    assert issubclass(DynamicSlidingWindowLayer, DynamicLayer)


def _static() -> None:
    """StaticLayer"""
    layer, keys = StaticLayer(max_cache_len=4), torch.zeros(1, 1, 4, 2)
    layer.keys, layer.values = keys, keys
    begin_at(layer, keys)
    assert layer.max_cache_len == 4 and layer.keys is keys, "another length"


def _linear() -> None:
    """LinearAttentionLayer"""
    layer = LinearAttentionLayer()
    assert not hasattr(layer, "keys"), "it has keys"
    assert callable(layer.reorder_cache), "its rows cannot be gathered"
    layer.lazy_initialization(conv_states=torch.zeros(1, 2, 3), state_idx=0)
    assert list(layer.conv_states) == [0] and layer.is_conv_states_initialized[0]
    assert layer.conv_kernel_size[0] == 3 and not any(
        layer.is_recurrent_states_initialized.values()
    )
    assert layer.has_previous_state[0] in (True, False) and layer.record_past is False
