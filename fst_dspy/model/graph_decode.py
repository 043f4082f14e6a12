"""Decoding from a cache of fixed size, whose steps a GPU replays from a recording.

A small model's step is some hundred kernels of a few microseconds each, and Python takes longer to
launch them. A CUDA graph launches them all at once, but only with the shapes and at the addresses
that it was recorded with. So rows and columns are rounded up to buckets; every bucket has its
recording, and all of them share one memory. A batch moves to another bucket when it has outgrown
its own, and when the rows that are left fit a smaller one.

The recording is our own and not ``torch.compile(mode="reduce-overhead")``: the latter's graphs
belong to the thread that recorded them, while a batch of rollouts is generated in whichever of its
threads comes last (pytorch issue 123177); and every shape would be compiled anew.

Prompts are read and shared as ever; the rows' keys and values are then copied in here. The states
of short convolutions come along, for they have a fixed size anyway.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from fst_dspy.model.cache_layers import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    obstacle,
)
from fst_dspy.model.graph_step import Step, copied
from fst_dspy.model.growing_decode import base_of
from fst_dspy.model.hardware import is_out_of_memory
from fst_dspy.model.policy import Policy

logger = logging.getLogger(__name__)

DEVICES: tuple[str, ...] = ("cuda",)
"""Types of device that decode so. On a CPU nothing is recorded, and nothing gained."""

FEWEST_ROWS, FEWEST_COLUMNS = 8, 128

MEMORY_SHARE = 0.1
"""Of a GPU's memory, that keys and values may take for good; larger batches grow their caches."""

MAX_STEPS = 64
"""Buckets that are kept recorded, those least lately used leave first."""


def bucket(count: int, fewest: int) -> int:
    """The smallest that holds so many, of ``fewest`` x 1, 1.5, 2, 3, 4, 6, 8, ..."""
    size = fewest
    while size < count:
        size *= 2
    between = size * 3 // 4
    return between if fewest < size and count <= between else size


class GraphDecode:
    """As ``growing_decode.GrowingDecode``; made by ``begin``. Tensors: B live rows."""

    drops_rows = True
    takes_runs = False  # its pass has a fixed shape

    def __init__(
        self, policy: Policy, rooms: _Rooms, layers: Sequence[Any], owner_B: Tensor, mask_UT: Tensor
    ) -> None:
        self._policy, self._rooms = policy, rooms
        self._column = mask_UT.shape[1]
        self._move(layers, owner_B, mask_UT.bool())

    def _move(self, layers: Sequence[Any], index_B: Tensor, mask: Tensor) -> None:
        """Go on in the bucket that fits, from some rows of layers."""
        rows = bucket(len(index_B), FEWEST_ROWS)
        columns = bucket(self._column + 1, FEWEST_COLUMNS)
        # Rows that nobody asked for repeat the first.
        index_N = torch.cat([index_B, index_B[:1].expand(rows - len(index_B))])
        # Copied first: the buckets lie in one memory, and a recording writes there too.
        held = [copied(layer, index_N, self._column) for layer in layers]
        self._now = self._rooms.step(self._policy, layers, rows, columns)
        self._now.fill(held, mask[index_N, : self._column])
        self._place_B = torch.arange(len(index_B), device=index_B.device)

    def step(self, next_B: Tensor, position_B: Tensor) -> Tensor:
        """Read the rows' next tokens; the logits after them, (B, V)."""
        now = self._now
        if self._column == now.columns:
            self._move(now.cache.layers, self._place_B, now.mask_N11L[:, 0, 0])
            now = self._now
        now.ids_N1[self._place_B, 0] = next_B
        now.position_N1[self._place_B, 0] = position_B
        now.mask_N11L[..., self._column] = True
        now.column_1.fill_(self._column)
        self._column += 1
        return now.run()[self._place_B].float()

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but these."""
        self._place_B = self._place_B[keep_B]
        if bucket(len(keep_B), FEWEST_ROWS) < self._now.rows:
            self._move(self._now.cache.layers, self._place_B, self._now.mask_N11L[:, 0, 0])


class _Rooms:
    """A policy's memory for keys and values, and the steps that were made over it."""

    def __init__(self) -> None:
        self.positions = 0  # rows x columns that there is room for
        self.rooms: list[Any] = []
        self.steps: OrderedDict[Any, Step] = OrderedDict()
        self.pool: Any = None

    def reserve(self, layers: Sequence[Any], positions: int) -> None:
        """Make room; steps over a smaller one are gone."""
        if positions <= self.positions:
            return
        self.steps.clear()
        self.rooms, self.positions, self.pool = [], 0, None
        for layer in layers:
            held = _held(layer)
            room = [t.new_zeros(positions * t.shape[1] * t.shape[3]) for t in held]
            self.rooms.append(room or None)
        self.positions = positions

    def step(self, policy: Policy, layers: Sequence[Any], rows: int, columns: int) -> Step:
        """The bucket's step, which is recorded when it is new."""
        key = (rows, columns, _taken_for_granted(policy))
        if key not in self.steps:
            step = Step(policy.model, layers, self.rooms, rows, columns)
            self.pool = step.record(self.pool)
            self.steps[key] = step
            if len(self.steps) > MAX_STEPS:
                self.steps.popitem(last=False)
        self.steps.move_to_end(key)
        return self.steps[key]


_rooms: weakref.WeakKeyDictionary[Policy, _Rooms] = weakref.WeakKeyDictionary()
_told: weakref.WeakSet[Any] = weakref.WeakSet()
_refused: weakref.WeakSet[Any] = weakref.WeakSet()


def begin(
    policy: Policy, cache: Any, owner_B: Tensor, mask_UT: Tensor, steps: int
) -> GraphDecode | None:
    """Go on from a cache of U prompts with B rows.

    Args:
        cache: A transformers cache; it stays as it is.
        owner_B: The prompt of each row.
        mask_UT: 1 for a prompt's tokens in the cache, 0 for padding.
        steps: Most tokens that a row will read.

    Returns:
        ``None`` where the device, the model or the size is not one for it.
    """
    model = base_of(policy.model)
    if policy.device.type not in DEVICES or model in _refused or obstacle() is not None:
        return None
    rows = bucket(len(owner_B), FEWEST_ROWS)
    columns = bucket(mask_UT.shape[1] + steps, FEWEST_COLUMNS)
    layers = getattr(cache, "layers", [])
    hindrance = _hindrance(model, layers, rows, columns)
    if hindrance is not None:
        if model not in _told:
            _told.add(model)
            logger.warning("%s: caches grow while decoding: %s", type(model).__name__, hindrance)
        return None
    rooms = _rooms.setdefault(policy, _Rooms())
    try:
        rooms.reserve(layers, rows * columns)
        return GraphDecode(policy, rooms, layers, owner_B, mask_UT)
    except Exception as error:  # whatever it is, growing caches do without recordings
        if is_out_of_memory(error) and len(owner_B) > 1:  # fewer rows may fit
            raise
        release(policy)
        if not is_out_of_memory(error):
            _refused.add(model)
            logger.warning(
                "%s: caches grow while decoding, a step cannot be recorded: %s",
                type(model).__name__,
                error,
            )
        return None


def release(policy: Policy) -> bool:
    """Give back a policy's memory and recordings; whether there were any."""
    return _rooms.pop(policy, None) is not None


def _hindrance(model: Any, layers: Sequence[Any], rows: int, columns: int) -> str | None:
    fixed, plain = "_can_compile_fullgraph", "_supports_attention_backend"
    if not getattr(model, fixed, False) or not getattr(model, plain, False):
        return "transformers does not say that its step has a fixed shape"
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return "its attention is not torch's"
    if not layers or not all(map(_is_known, layers)):
        return "there is more in them than keys, values and the inputs of short convolutions"
    window = min(getattr(layer, "sliding_window", None) or columns for layer in layers)
    if window < columns:
        return f"{columns} tokens do not fit in its window of {window}"
    if model.device.type == "cuda":
        each = sum(t.element_size() * t.shape[1] * t.shape[3] for y in layers for t in _held(y))
        if rows * columns * each > MEMORY_SHARE * torch.cuda.mem_get_info(model.device)[1]:
            return f"{rows} rows of {columns} tokens take more than {MEMORY_SHARE:.0%} of memory"
    return None


def _is_known(layer: Any) -> bool:
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return bool(layer.is_initialized)
    return (
        type(layer) is LinearAttentionLayer
        and all(layer.is_conv_states_initialized.values())
        and not any(layer.is_recurrent_states_initialized.values())
    )


def _held(layer: Any) -> tuple[Tensor, ...]:
    return () if type(layer) is LinearAttentionLayer else (layer.keys, layer.values)


def _taken_for_granted(policy: Policy) -> Any:
    """What a recording depends on besides the weights' values: adapters, and all addresses."""
    tensors = itertools.chain(policy.model.parameters(), policy.model.buffers())
    places = tuple((t.data_ptr(), t.numel()) for t in tensors)
    lora = next((m for m in policy.model.modules() if isinstance(m, LoraLayer)), None)
    if lora is None:
        return places
    return places, lora.disable_adapters, tuple(lora.active_adapters), tuple(lora.scaling.items())
