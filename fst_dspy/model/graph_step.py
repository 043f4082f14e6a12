"""One token for a fixed number of rows over tensors that stay in place, so CUDA can replay it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fst_dspy.model.cache_layers import Cache, LinearAttentionLayer, StaticLayer, begin_at
from fst_dspy.model.growing_decode import base_of, forward
from fst_dspy.model.hardware import cudnn_attention

WARM_UPS = 2  # what libraries set up at first use must not be recorded


class FixedLayer(StaticLayer):
    """One layer's keys and values, (rows, heads, columns, dim), in memory that is given to it.

    Args:
        column_1: Where the next token goes, the same for every row.
    """

    def __init__(self, keys: Tensor, values: Tensor, column_1: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.column_1 = keys, values, column_1
        begin_at(self, keys)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.column_1, key_states)
        self.values.index_copy_(2, self.column_1, value_states)
        return self.keys, self.values


class Step:
    """One token for N rows over L columns.

    Args:
        layers: Those of a cache of the model's, for their kinds and shapes.
        rooms: By layer, flat memory for keys and for values; ``None`` for a convolution.

    Attributes:
        ids_N1, position_N1: The tokens to read.
        column_1: The column that they go to.
        mask_N11L: The columns that each row attends to, its own among them.
    """

    def __init__(
        self, model: Any, layers: Sequence[Any], rooms: Sequence[Any], rows: int, columns: int
    ) -> None:
        device = base_of(model).device
        self.model, self.rows, self.columns = model, rows, columns
        self.ids_N1 = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.position_N1 = torch.zeros_like(self.ids_N1)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.mask_N11L = torch.ones((rows, 1, 1, columns), dtype=torch.bool, device=device)
        self.cache: Any = Cache(
            layers=[self._layer(*both) for both in zip(layers, rooms, strict=True)]
        )
        self._graph: Any = None
        self._logits_NV: Tensor | None = None

    def _layer(self, like: Any, room: Any) -> Any:
        if room is None:
            layer = LinearAttentionLayer()
            for number, state in like.conv_states.items():
                own = state.new_zeros(self.rows, *state.shape[1:])
                layer.lazy_initialization(conv_states=own, state_idx=number)
                layer.has_previous_state[number] = True
            return layer
        keys, values = (
            _view(flat, self.rows, held.shape[1], self.columns, held.shape[3])
            for flat, held in zip(room, (like.keys, like.values), strict=True)
        )
        return FixedLayer(keys, values, self.column_1)

    def _forward(self) -> Tensor:
        return forward(self.model, self.ids_N1, self.mask_N11L, self.position_N1, self.cache)[0]

    def record(self, pool: Any) -> Any:
        """Record the step as a CUDA graph; nothing on a CPU. What is in the memory is lost.

        Args:
            pool: The memory of earlier recordings, for this one to use too; or ``None``.

        Returns:
            The memory of this one.

        Raises:
            RuntimeError: The step waits for the GPU, or has another thing that cannot be recorded.
        """
        device = self.ids_N1.device
        if device.type != "cuda":
            return None
        current, side = torch.cuda.current_stream(device), _stream(device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(device), cudnn_attention(device, True):
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):
                        self._forward()
                current.wait_stream(side)
                # Other threads may use the GPU meanwhile, a reflection model's for one.
                with torch.cuda.graph(
                    graph, pool=pool, stream=side, capture_error_mode="thread_local"
                ):
                    self._logits_NV = self._forward()
        finally:
            torch.cuda.set_stream(current)  # a recording that fails leaves its own stream behind
        self._graph = graph
        return graph.pool()

    def run(self) -> Tensor:
        """The logits, (N, V); they stay until the next step over the same memory."""
        if self._graph is None or self._logits_NV is None:
            return self._forward()
        self._graph.replay()
        return self._logits_NV

    def fill(self, held: Sequence[Sequence[Tensor]], mask_NT: Tensor) -> None:
        """Begin anew.

        Args:
            held: By layer, of N rows: keys and values of T columns, or a convolution's states.
            mask_NT: The columns of those that each row attends to.
        """
        columns = mask_NT.shape[1]
        for layer, tensors in zip(self.cache.layers, held, strict=True):
            if isinstance(layer, FixedLayer):
                assert layer.keys is not None and layer.values is not None
                for to, tensor in zip((layer.keys, layer.values), tensors, strict=True):
                    to[:, :, :columns] = tensor
                    to[:, :, columns:] = 0  # a mask does not help against an old infinity
            else:
                for to, tensor in zip(layer.conv_states.values(), tensors, strict=True):
                    to.copy_(tensor)
        self.mask_N11L[:, 0, 0, :columns] = mask_NT
        self.mask_N11L[:, 0, 0, columns:] = False


def copied(layer: Any, index_N: Tensor, columns: int) -> list[Tensor]:
    """What ``Step.fill`` takes of a layer: some of its rows, and its first columns."""
    if isinstance(layer, LinearAttentionLayer):
        return [
            state.index_select(0, index_N)
            for state in layer.conv_states.values()
            if state is not None
        ]
    return [t[:, :, :columns].index_select(0, index_N) for t in (layer.keys, layer.values)]


@functools.cache
def _stream(device: torch.device) -> Any:
    """The one that steps are recorded in: cuBLAS keeps tens of megabytes for each it has seen."""
    return torch.cuda.Stream(device)


def _view(flat: Tensor, *shape: int) -> Tensor:
    return flat[: torch.Size(shape).numel()].view(shape)
