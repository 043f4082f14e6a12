"""One token more for every row of a batch: the model's forward, and the cache that grows with it.

``fst_dspy.model.graph_decode`` does the same from a cache of fixed size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fst_dspy.model.cache_layers import cache_name
from fst_dspy.model.prefixes import pads_safely
from fst_dspy.model.prompt_cache import keep_rows, read_next, shared_attention, takes_runs

COPIED_COLUMNS = 2**17
"""Tokens of a pass times tokens of the longest row, where rows have runs."""


def forward(
    model: Any, ids_BT: Tensor, mask: Tensor | None, position_BT: Tensor, cache: Any
) -> tuple[Tensor, Any]:
    """Read tokens.

    Args:
        model: A causal language model, with its adapters if it has any.
        mask: As the model takes it: (B, columns of the cache), or (B, 1, T, columns).
        cache: Of what was read before; ``None`` to begin.

    Returns:
        The logits at the last position, (B, V) in the model's dtype, and the cache.
    """
    kind: Any = type(base_of(model))
    name = cache_name(model)
    output = model(
        input_ids=ids_BT,
        attention_mask=mask,
        position_ids=position_BT,
        use_cache=True,
        **{name: cache},
        **_last_only(kind),
    )
    return output.logits[:, -1], getattr(output, name)


@contextmanager
def head_on(model: Any, row_R: Tensor) -> Iterator[None]:
    """Have the output layer read some rows alone: with a large vocabulary it is a good part of all.

    Args:
        row_R: The rows of the pass that logits are wanted of.
    """
    head = base_of(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][row_R], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def base_of(model: Any) -> Any:
    """The model itself, without what peft has put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@functools.cache
def _last_only(kind: type) -> dict[str, int]:
    """Ask for the last position's logits only, of models that can be asked."""
    takes = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


class GrowingDecode:
    """Decoding from a cache that grows by a token a row with every step. Tensors: B live rows.

    Args:
        cache: What was read of every row.
        mask_BT: 1 for the tokens in the cache, 0 for padding.
        shares: Whether rows share their prompts in the cache (``fst_dspy.model.prompt_cache``).
    """

    def __init__(self, model: Any, cache: Any, mask_BT: Tensor, shares: bool) -> None:
        self.model, self.cache, self.mask_BT, self.shares = model, cache, mask_BT, shares
        self.drops_rows = hasattr(cache, "reorder_cache")
        self.takes_runs = shares and takes_runs(cache)
        self._pads = pads_safely(model)  # where not, all rows of a batch are of one length
        self._columns = 0  # tokens that all rows have had, up to the first run
        self._columns_B: Tensor | None = None

    def step(self, next_B: Tensor, position_B: Tensor) -> Tensor:
        """Read the rows' next tokens; the logits after them, (B, V)."""
        if self._columns_B is not None:
            return self.step_with_runs(next_B, position_B, [()] * len(next_B)).float()
        ids_B1, position_B1 = next_B[:, None], position_B[:, None]
        self._columns += 1
        if self.shares:
            with shared_attention(self.model, self.cache):
                logits_BV, self.cache = forward(self.model, ids_B1, None, position_B1, self.cache)
        else:
            self.mask_BT = pad(self.mask_BT, (0, 1), value=1)
            # Models that keep states are given none: Mamba would take it for the new tokens' own.
            mask_BT = self.mask_BT if self._pads else None
            logits_BV, self.cache = forward(self.model, ids_B1, mask_BT, position_B1, self.cache)
        return logits_BV.float()

    def step_with_runs(
        self, next_B: Tensor, position_B: Tensor, runs: Sequence[Sequence[int]]
    ) -> Tensor:
        """The same, with tokens of some rows that follow these, in the same pass.

        Where ``takes_runs``. Each token counts as a row of the pass, so that none is padding.

        Returns:
            The logits after each row's last token, (B, V), in the model's dtype.
        """
        counts_B = torch.tensor([1 + len(run) for run in runs], device=next_B.device)
        begun_B = self._columns_B
        if begun_B is None:
            begun_B = torch.full_like(counts_B, self._columns)
        self._columns_B = begun_B + counts_B
        # A token's row is copied for it, so that there may be too many for one pass.
        most = max(1, COPIED_COLUMNS // int(self._columns_B.max()))
        parts: list[list[int]] = [[]]
        total = 0
        for row, run in enumerate(runs):
            total += 1 + len(run)
            if parts[-1] and total > most:
                parts.append([])
                total = 1 + len(run)
            parts[-1].append(row)
        logits = []
        for part in parts:
            part_R = torch.tensor(part, device=next_B.device)
            row_N = part_R.repeat_interleave(counts_B[part_R])
            places = [place for row in part for place in range(1 + len(runs[row]))]
            place_N = torch.tensor(places, device=next_B.device)
            ids_N = next_B[row_N]
            said = [token for row in part for token in runs[row]]
            ids_N[place_N > 0] = torch.tensor(said, dtype=ids_N.dtype, device=ids_N.device)
            read_next(self.cache, row_N, begun_B[row_N] + place_N)
            position_N1 = (position_B[row_N] + place_N)[:, None]
            last_R = counts_B[part_R].cumsum(0) - 1
            with shared_attention(self.model, self.cache), head_on(self.model, last_R):
                logits_RV, self.cache = forward(
                    self.model, ids_N[:, None], None, position_N1, self.cache
                )
            if len(logits_RV) != len(part):  # a model that calls its output layer in another way
                logits_RV = logits_RV[last_R]
            logits.append(logits_RV)
        return torch.cat(logits)

    def keep(self, keep_B: Tensor) -> None:
        """Drop all rows but these."""
        keep_rows(self.cache, keep_B)
        self.mask_BT = self.mask_BT[keep_B]
        if self._columns_B is not None:
            self._columns_B = self._columns_B[keep_B]
