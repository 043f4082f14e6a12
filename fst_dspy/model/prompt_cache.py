"""Key-value caches for decoding many completions of few prompts.

``share`` keeps each prompt's keys and values once, however many rows continue it, and decoding
reads them once for all of those: attention over a prompt is a matrix product of its rows' queries,
attention over a row's own tokens is added to it under one softmax (Hydragen; Juravsky et al.,
2024). ``make_room`` is for the models and devices that ``share`` is not for: every row then has
its copy of its prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from fst_dspy.model.cache_layers import DynamicLayer, begin_at, obstacle

logger = logging.getLogger(__name__)

NAME = "fst_shared_prompt"
"""Of the attention function, among those that transformers' models are told to use."""

OTHER_TERMS = ("position_bias", "s_aux", "softcap")  # what some models add to their attention
_refused: set[type] = set()


class CannotShare(Exception):
    """The model has attention of another kind; it was remembered, and can be asked again."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        _refused.add(type(_base(model)))
        logger.warning("%s: every row gets a copy of its prompt", type(_base(model)).__name__)


class Sharing:
    """Which prompt each row continues. Tensors: U prompts, N rows of a prompt at most, B rows.

    Args:
        owner_B: The prompt of each row, 0 to U - 1, each with at least one row.
        mask_UT: 1 for a prompt's tokens, 0 for its padding.
        steps: Most tokens a row will have of its own.
    """

    def __init__(self, owner_B: Tensor, mask_UT: Tensor, steps: int) -> None:
        self.steps = steps
        self.mask_UT = mask_UT.bool()
        self.rows_owner_B = owner_B
        self.row_N: Tensor | None = None
        self._group(owner_B)

    def read(self, row_N: Tensor, column_N: Tensor) -> None:
        """What the next pass reads: tokens of some rows, of each row so many as there are.

        Args:
            row_N: The row of each token.
            column_N: Its place among the row's own tokens; beyond the last are those of rows that
                are over.
        """
        column_N = column_N.clamp(max=self.steps - 1)
        if self.row_N is None or not torch.equal(row_N, self.row_N):
            self._group(self.rows_owner_B[row_N])
        self.row_N, self.column_N, self.length = row_N, column_N, int(column_N.max()) + 1
        everyone = torch.arange(len(self.rows_owner_B), device=row_N.device)
        self.each_row_once = torch.equal(row_N, everyone)
        later_NT = torch.arange(self.length, device=row_N.device) > column_N[:, None]
        bias_NT = torch.zeros(later_NT.shape, device=row_N.device)
        self.later_bias_N11T = bias_NT.masked_fill_(later_NT, -torch.inf)[:, None, None]

    def _group(self, owner_B: Tensor) -> None:
        counts_U = owner_B.bincount(minlength=len(self.mask_UT))
        first_U = counts_U.cumsum(0) - counts_U
        order_B = owner_B.argsort(stable=True)
        number_B = torch.empty_like(owner_B)  # of a row among those of its prompt
        number_B[order_B] = (
            torch.arange(len(owner_B), device=owner_B.device) - (first_U[owner_B[order_B]])
        )
        self.prompts, self.width = len(counts_U), int(counts_U.max())
        self.place_B = owner_B * self.width + number_B
        rows = torch.zeros(self.prompts * self.width, dtype=torch.long, device=owner_B.device)
        rows[self.place_B] = torch.arange(len(owner_B), device=owner_B.device)
        self.row_UN = rows  # flat; places without a row repeat the first
        everyone = torch.arange(len(rows), device=rows.device)
        self.in_order = torch.equal(self.place_B, everyone)  # all prompts have rows alike
        self.bias_U11T = None
        if not bool(self.mask_UT.all()):
            self.bias_U11T = torch.zeros(self.mask_UT.shape, device=owner_B.device).masked_fill_(
                ~self.mask_UT, -torch.inf
            )[:, None, None]

    def keep(self, keep_B: Tensor) -> Tensor | None:
        """Drop all rows but these; the prompts that are left, ``None`` where all are."""
        owner_B = self.rows_owner_B[keep_B]
        left_U, owner_B = owner_B.unique(return_inverse=True)
        gone = len(left_U) < self.prompts
        if gone:
            self.mask_UT = self.mask_UT[left_U]
        self.rows_owner_B, self.row_N = owner_B, None
        self._group(owner_B)
        return left_U if gone else None

    def by_prompt(self, values_BKGD: Tensor) -> Tensor:
        """(B, K, g, D) values of rows, as (U, K, N * g, D)."""
        _, heads, group, dim = values_BKGD.shape
        values = values_BKGD if self.in_order else values_BKGD[self.row_UN]
        values = values.reshape(self.prompts, self.width, heads, group, dim)
        return values.transpose(1, 2).reshape(self.prompts, heads, self.width * group, dim)

    def by_row(self, values: Tensor) -> Tensor:
        """The inverse of ``by_prompt``."""
        _, heads, both, dim = values.shape
        values = values.view(self.prompts, heads, self.width, both // self.width, dim)
        values = values.transpose(1, 2).reshape(-1, heads, both // self.width, dim)
        return values if self.in_order else values[self.place_B]


class SharedLayer(DynamicLayer):
    """One layer's prompts, once each, and every row's own tokens.

    Attributes:
        prompt_keys, prompt_values: (U, heads, T, dim).
        keys, values: Those of the rows' own tokens so far, (B, heads, t, dim).
        read: Whether attention has read the last update.
    """

    def __init__(self, layer: DynamicLayer, sharing: Sharing, steps: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        begin_at(self, layer.keys)
        self.sharing, self.read = sharing, True
        self.prompt_keys, self.prompt_values = layer.keys, layer.values
        self._rooms = [
            prompt.new_zeros(len(sharing.rows_owner_B), prompt.shape[1], steps, prompt.shape[3])
            for prompt in (layer.keys, layer.values)
        ]
        self._length = 0

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[-2] + self._length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        sharing = self.sharing
        if sharing.row_N is None:
            start, self._length = self._length, self._length + key_states.shape[-2]
            for room, new in zip(self._rooms, (key_states, value_states), strict=True):
                room[:, :, start : self._length] = new
            keys, values = (room[:, :, : self._length] for room in self._rooms)
        else:
            self._length = sharing.length
            for room, new in zip(self._rooms, (key_states, value_states), strict=True):
                room[sharing.row_N, :, sharing.column_N] = new[:, :, 0]
            keys, values = (
                room[:, :, : self._length]
                if sharing.each_row_once
                else room[sharing.row_N, :, : self._length]
                for room in self._rooms
            )
        keys.shared_layer = self  # how ``attend`` finds the prompts
        self.keys, self.values, self.read = keys, values, False
        return keys, values

    def keep(self, keep_B: Tensor, left_U: Tensor | None) -> None:
        """Drop all rows but these, and all prompts but those that are left."""
        self._rooms = [room.index_select(0, keep_B) for room in self._rooms]
        if left_U is not None:
            self.prompt_keys = self.prompt_keys.index_select(0, left_U)
            self.prompt_values = self.prompt_values.index_select(0, left_U)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row: transformers' attention interface.

    Args:
        query: (B, heads, 1, dim).
        key, value: The rows' own tokens, as ``SharedLayer.update`` gave them.
        attention_mask: Not used: padding is in prompts only, and later tokens are known of.
        scaling: Of the scores; by default ``dim ** -0.5``.

    Returns:
        (B, 1, heads, dim) and no weights.
    """
    layer: SharedLayer | None = getattr(key, "shared_layer", None)
    if layer is None or any(others.get(name) is not None for name in OTHER_TERMS):
        raise _OtherAttention
    layer.read = True
    sharing, (rows, heads, length, _) = layer.sharing, key.shape
    query_BKGD = query.view(rows, heads, -1, query.shape[-1])
    query_BKGD = query_BKGD * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    score_U = sharing.by_prompt(query_BKGD) @ layer.prompt_keys.transpose(-1, -2)
    if sharing.bias_U11T is not None:
        score_U = score_U + sharing.bias_U11T
    score_B = query_BKGD @ key.transpose(-1, -2)
    if sharing.row_N is not None:
        score_B = score_B + sharing.later_bias_N11T
    both_B = torch.cat([sharing.by_row(score_U), score_B], dim=-1)
    weight_B = both_B.softmax(-1, dtype=torch.float32).to(query.dtype)
    prompt_B, own_B = weight_B.split([weight_B.shape[-1] - length, length], dim=-1)
    output_B = sharing.by_row(sharing.by_prompt(prompt_B) @ layer.prompt_values) + own_B @ value
    return output_B.reshape(rows, 1, -1, value.shape[-1]), None


AttentionInterface.register(NAME, attend)


class _OtherAttention(Exception):
    """Raised through the model's forward."""


def can_share(model: Any) -> bool:
    """Whether a model's attention can be given another function.

    On the CPU only, where a small model's decoding waits for its cache to be read; on a GPU
    the operations that this adds take longer than they save, but for very long prompts.
    """
    model = _base(model)
    return (
        obstacle() is None
        and type(model) not in _refused
        and model.device.type == "cpu"
        and getattr(model, "_supports_attention_backend", False)
        and model.config.get_text_config()._attn_implementation == "sdpa"
    )


def share(cache: Any, owner_B: Tensor, mask_UT: Tensor, steps: int) -> bool:
    """Let rows share the prompts in a cache.

    Args:
        cache: A transformers cache of U prompts; all layers are replaced or expanded to rows.
        owner_B: The prompt of each row.
        mask_UT: 1 for a prompt's tokens, 0 for its padding.
        steps: Most tokens a row will have of its own.

    Returns:
        Whether they do; the cache is unchanged where a layer keeps keys in another way (windows).
    """
    layers = getattr(cache, "layers", [])
    plain = [type(layer) is DynamicLayer and layer.is_initialized for layer in layers]
    states = [not hasattr(layer, "keys") and hasattr(layer, "reorder_cache") for layer in layers]
    if not any(plain) or not all(a or b for a, b in zip(plain, states, strict=True)):
        return False
    sharing = Sharing(owner_B, mask_UT, steps)
    for place, layer in enumerate(layers):
        if plain[place]:
            layers[place] = SharedLayer(layer, sharing, steps)
        else:
            layer.reorder_cache(owner_B)
    return True


def takes_runs(cache: Any) -> bool:
    """Whether a pass may read several tokens of a row (``Sharing.read``): all layers keep keys."""
    return all(isinstance(layer, SharedLayer) for layer in cache.layers)


def read_next(cache: Any, row_N: Tensor, column_N: Tensor) -> None:
    """Tell a cache that ``takes_runs`` what the next pass reads."""
    cache.layers[0].sharing.read(row_N, column_N)


def keep_rows(cache: Any, keep_B: Tensor) -> None:
    """Drop all rows of a cache but these."""
    shared = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, SharedLayer)]
    if not shared:
        cache.reorder_cache(keep_B)
        return
    left_U = shared[0].sharing.keep(keep_B)
    for layer in cache.layers:
        if isinstance(layer, SharedLayer):
            layer.keep(keep_B, left_U)
        else:
            layer.reorder_cache(keep_B)


@contextmanager
def shared_attention(model: Any, cache: Any) -> Iterator[None]:
    """Inside the block the model's attention reads shared prompts.

    Raises:
        CannotShare: A layer did not, or has more to its attention than keys and values.
    """
    config = _base(model).config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    except _OtherAttention:
        raise CannotShare(model) from None
    finally:
        config._attn_implementation = before
    if not all(layer.read for layer in cache.layers if isinstance(layer, SharedLayer)):
        raise CannotShare(model)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class RoomyLayer(DynamicLayer):
    """Keys and values in a buffer with room for the whole completion.

    The stock layer copies all it holds at every token, a quarter of the time of a small model.
    """

    def __init__(self, layer: DynamicLayer, steps: int) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        begin_at(self, layer.keys)
        self._length = layer.keys.shape[-2]
        self._rooms = [_with_room(held, steps) for held in (layer.keys, layer.values)]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, : self._length] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        start, self._length = self._length, self._length + key_states.shape[-2]
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, start : self._length] = new
        return self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rooms = [room.index_select(0, beam_idx) for room in self._rooms]
        self._show()


def make_room(cache: Any, steps: int) -> None:
    """Give every layer that holds keys and values room for the tokens to come."""
    layers = getattr(cache, "layers", []) if obstacle() is None else []
    for place, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layers[place] = RoomyLayer(layer, steps)


def _with_room(held: Tensor, steps: int) -> Tensor:
    rows, heads, length, dim = held.shape
    room = held.new_empty(rows, heads, length + steps, dim)
    room[:, :, :length] = held
    return room
