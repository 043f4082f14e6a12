"""Beginnings that prompts have in common, read once each.

The prompts of a batch begin alike: the rollouts of a group have all of theirs in common, those of a
candidate its instructions, an agent's turns all that was before. ``find_prefixes`` cuts prompts
into such beginnings and what is left; a model reads the beginnings, and goes on from their caches
with the rest. Generation and optimizer step do so where ``can_continue`` says that the model's
caches allow it. The outcome is that of reading every prompt whole, but for rounding.

Where completions are read again, all of the rows are a tree. ``find_bins`` cuts it into parts; a
part is read as one sequence, in which each token sees those that it goes on from
(``fst_dspy.model.logprobs``), and what the parts begin with is read once as above.

It leans on how transformers' caches hold what was read (``fst_dspy.model.cache_layers``). Where
they do so in another way, prompts are read whole.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fst_dspy.model.cache_layers import (
    DynamicCache,
    DynamicLayer,
    LinearAttentionLayer,
    cache_name,
    obstacle,
)

logger = logging.getLogger(__name__)

WINDOW = 256
"""Prompts among which beginnings are looked for at once: the work grows with its square."""

SAVED_TOKENS = 512
"""Tokens that need not be read again, from which on beginnings are worth a pass of their own."""


PACKED_TOKENS = 4096
"""Tokens in bins, from which on a pass on a CPU is no quicker for having more."""
BIN_TOKENS = 640
"""Most tokens of a bin of several rows, behind what it goes on from: attention looks at all pairs
of them, also where two rows see nothing of each other."""


@dataclass(frozen=True)
class Bin:
    """Rows that are next to each other when sorted by their tokens, read as one sequence.

    Attributes:
        rows: Their numbers, in that order.
        begins: Tokens that they go on from, common to all bins that the same branch was cut into.
        tokens: Those behind them, what rows have in common counted once.
    """

    rows: tuple[int, ...]
    begins: int
    tokens: int


@dataclass(frozen=True)
class Prefixes:
    """N prompts over P beginnings.

    Attributes:
        prefix_ids_P: Token ids of the beginnings, none empty.
        owner_N: Which of them each prompt goes on from.
        saved: Tokens that are not read again.
    """

    prefix_ids_P: tuple[tuple[int, ...], ...]
    owner_N: tuple[int, ...]
    saved: int

    def rest(self, number: int, prompt_ids_T: Sequence[int]) -> tuple[int, ...]:
        """What is left of a prompt after its beginning."""
        return tuple(prompt_ids_T[len(self.prefix_ids_P[self.owner_N[number]]) :])


def worthwhile_prefixes(prompts_N: Sequence[Sequence[int]]) -> Prefixes | None:
    """The beginnings, where reading them once saves ``SAVED_TOKENS``."""
    if min(map(len, prompts_N)) < 2 or sum(map(len, prompts_N)) < SAVED_TOKENS:
        return None
    prefixes = find_prefixes(prompts_N)
    return prefixes if prefixes.saved >= SAVED_TOKENS else None


def find_prefixes(prompts_N: Sequence[Sequence[int]]) -> Prefixes:
    """Beginnings that save the most tokens; the last token of a prompt is never part of one.

    Prompts are sorted, and neighbours grouped so that the sum over groups of (prompts - 1) x
    (tokens that all of them begin with) is largest.

    Args:
        prompts_N: At least one, each of at least 2 tokens.
    """
    order = sorted(range(len(prompts_N)), key=lambda number: tuple(prompts_N[number]))
    prefixes: list[tuple[int, ...]] = []
    owners = [0] * len(order)
    saved = 0
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for group in _grouped([prompts_N[number] for number in window]):
            numbers = [window[place] for place in group]
            first = prompts_N[numbers[0]]
            length = _common(first, prompts_N[numbers[-1]])
            for number in numbers:
                owners[number] = len(prefixes)
            prefixes.append(tuple(first[:length]))
            saved += (len(numbers) - 1) * length
    return Prefixes(tuple(prefixes), tuple(owners), saved)


def _grouped(sorted_N: Sequence[Sequence[int]]) -> list[range]:
    """The best grouping of sorted prompts into runs, by dynamic programming over where runs end."""
    count = len(sorted_N)
    with_next = [_common(a, b) for a, b in pairwise(sorted_N)]
    best, begin = [0] * (count + 1), [0] * (count + 1)
    for end in range(1, count + 1):
        # A run of one saves nothing.
        best[end], begin[end] = best[end - 1], end - 1
        common = len(sorted_N[end - 1])
        for start in range(end - 2, -1, -1):
            common = min(common, with_next[start])
            if common == 0:
                break
            saved = best[start] + (end - start - 1) * common
            if saved > best[end]:
                best[end], begin[end] = saved, start
    runs, end = [], count
    while end > 0:
        runs.append(range(begin[end], end))
        end = begin[end]
    return runs[::-1]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, less the last of either."""
    return min(common_beginning(one, other), len(one) - 1, len(other) - 1)


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    limit = min(len(one), len(other))
    if one[:limit] == other[:limit]:
        return limit
    return next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def find_bins(rows_N: Sequence[Sequence[int]], most_rows: int) -> list[Bin]:
    """Parts of the tree that rows make, of a single row or of up to ``BIN_TOKENS``.

    A larger branch is cut wherever its rows part first. What then is shorter than the longest bin,
    which all are padded to, is put together again as far as it fits there. Rows of a bin have 2
    tokens in common at least.

    Args:
        rows_N: At least one.
        most_rows: Of a bin.
    """
    order = sorted(range(len(rows_N)), key=lambda number: tuple(rows_N[number]))
    with_next = [common_beginning(rows_N[a], rows_N[b]) for a, b in pairwise(order)]
    bins: list[Bin] = []
    branches = [(0, len(order), 0)]
    while branches:
        start, end, begins = branches.pop()
        common = with_next[start : end - 1]
        tokens = sum(len(rows_N[number]) for number in order[start:end]) - sum(common) - begins
        fits = tokens <= BIN_TOKENS and end - start <= most_rows and min(common, default=2) >= 2
        if fits or end - start == 1:
            bins.append(Bin(tuple(order[start:end]), begins, tokens))
            continue
        least = min(common)
        cuts = [start + n + 1 for n, length in enumerate(common) if length == least]
        parts = list(pairwise([start, *cuts, end]))
        branches += [(*part, least) for part in reversed(parts)]
    return _filled(bins, rows_N, most_rows)


def _filled(bins: Sequence[Bin], rows_N: Sequence[Sequence[int]], most_rows: int) -> list[Bin]:
    """Neighbours that one branch was cut into as one bin, where that is no longer than another."""
    longest = max(part.tokens for part in bins)
    filled = [bins[0]]
    for part in bins[1:]:
        last = filled[-1]
        both = Bin((*last.rows, *part.rows), part.begins, last.tokens + part.tokens)
        common = common_beginning(rows_N[last.rows[-1]], rows_N[part.rows[0]])
        of_a_branch = last.begins == part.begins == common >= 2
        if of_a_branch and both.tokens <= longest and len(both.rows) <= most_rows:
            filled[-1] = both
        else:
            filled.append(part)
    return filled


def worthwhile_bins(
    model: Any, rows_N: Sequence[Sequence[int]], most_rows: int | None = None
) -> list[Bin] | None:
    """Bins, where reading rows so saves ``SAVED_TOKENS`` and the model is one that can.

    That is one that ``can_continue``, where attention is all that mixes tokens, takes any mask, and
    knows of positions their distance alone.
    """
    total = sum(map(len, rows_N))
    if min(map(len, rows_N)) < 2 or total < SAVED_TOKENS or not can_pack(model):
        return None
    bins = find_bins(rows_N, most_rows or len(rows_N))
    return bins if total - tokens_of(bins, rows_N) >= SAVED_TOKENS else None


def tokens_of(bins: Sequence[Bin], rows_N: Sequence[Sequence[int]]) -> int:
    """About how many tokens are read of some bins, in their order, padding included."""
    longest = max(part.tokens for part in bins)
    total = bins[0].begins + longest * len(bins)
    for before, part in pairwise(bins):
        common = common_beginning(rows_N[before.rows[-1]], rows_N[part.rows[0]])
        total += max(0, part.begins - common)
    return total


def can_pack(model: Any) -> bool:
    """Whether a model that ``can_continue`` reads bins: see ``worthwhile_bins``."""
    config = backbone_of(model).config.get_text_config()
    return (
        getattr(config, "rope_parameters", None) is not None
        and getattr(backbone_of(model), "_supports_attention_backend", False)
        and config._attn_implementation == "sdpa"
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def can_continue(model: Any) -> bool:
    """Whether a model goes on from a cache, several tokens at a time, padding masked out.

    Plain attention does, and so do short convolutions without bias. Sliding windows and recurrent
    layers are not relied upon, nor models that are not told positions (MPT counts padding in):
    their prompts are read whole, of which a warning tells once a model.
    """
    if obstacle() is not None:
        return False
    backbone = backbone_of(model)
    continues = (
        pads_safely(model)
        and "position_ids" in inspect.signature(type(backbone).forward).parameters
        and _layers_continue(backbone.config.get_text_config())
    )
    if not continues and backbone not in _told:
        _told.add(backbone)
        logger.warning(
            "%s: its prompts are read whole, for only plain attention and short convolutions "
            "without bias, that are told positions, go on from what prompts have in common; "
            "slower, and else the same",
            type(backbone).__name__,
        )
    return continues


_told: weakref.WeakSet[Any] = weakref.WeakSet()


def _layers_continue(config: Any) -> bool:
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(
        type(layer) is DynamicLayer
        or (type(layer) is LinearAttentionLayer and hasattr(layer, "activate_past_recording"))
        for layer in layers
    )


def is_checkpointing(model: Any) -> bool:
    """Whether a model keeps few activations, and runs its layers again for the gradient."""
    # The older name warns in later versions of transformers.
    new, old = "is_activation_checkpointing", "is_gradient_checkpointing"
    return getattr(model, new if hasattr(model, new) else old, False)


def pads_safely(model: Any) -> bool:
    """Whether left padding leaves the logits alone.

    Attention masks it out. A convolution zeroes the padded inputs, but a bias in its projection
    would bring them back (Lfm2 with ``conv_bias``); other recurrent layers are not relied upon.
    """
    config = model.config.get_text_config()
    recurrent = {
        kind
        for kind in getattr(config, "layer_types", None) or ()
        if not kind.endswith("attention") or kind == "linear_attention"
    }
    if recurrent == {"conv"}:
        return not getattr(config, "conv_bias", True)
    # Some tell of no kinds of layers; transformers marks all that keep a state.
    return not recurrent and not getattr(backbone_of(model), "_is_stateful", False)


def backbone_of(model: Any) -> Any:
    """A causal language model without its output layer, with its adapters if it has any."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def read_prefixes(
    backbone: Any, prefixes: Prefixes, pad_id: int, device: torch.device
) -> tuple[Any, Tensor]:
    """Read the beginnings.

    Gradients flow through the cache where they are enabled.

    Returns:
        A cache with a row a prompt (N), and the mask of what is in it, (N, T).
    """
    ids_PT, mask_PT = left_padded(prefixes.prefix_ids_P, pad_id, device)
    cache: Any = DynamicCache(config=backbone.config)
    backbone(
        input_ids=ids_PT,
        attention_mask=mask_PT,
        position_ids=positions(mask_PT),
        **{cache_name(backbone): cache},
        use_cache=True,
    )
    owner_N = torch.tensor(prefixes.owner_N, device=device)
    cache.reorder_cache(owner_N)
    return cache, mask_PT[owner_N]


def left_padded(
    ids_N: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask, (N, T), of tokens that end together."""
    longest = max(map(len, ids_N))
    ids_NT = [[*[pad_id] * (longest - len(ids)), *ids] for ids in ids_N]
    lengths_N1 = torch.tensor([[len(ids)] for ids in ids_N], device=device)
    mask_NT = (torch.arange(longest, device=device)[None] >= longest - lengths_N1).long()
    return torch.tensor(ids_NT, dtype=torch.long, device=device), mask_NT


def right_padded(
    ids_N: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and mask, (N, T), of tokens that begin together."""
    ids_NT, mask_NT = left_padded([ids[::-1] for ids in ids_N], pad_id, device)
    return ids_NT.flip(1), mask_NT.flip(1)


def read_rest(
    backbone: Any,
    cache: Any,
    mask_NT: Tensor,
    rest_N: Sequence[Sequence[int]],
    pad_id: int,
) -> Tensor:
    """Go on from the beginnings with the rest of each prompt, which may be empty.

    Afterwards the cache is as if each prompt had been read whole. Without gradients.

    Returns:
        The mask of what is in the cache; with padding between and at the end.
    """
    ids_NR, own_NR = right_padded(rest_N, pad_id, mask_NT.device)
    mask_NT = torch.cat([mask_NT, own_NR], dim=1)
    cache.activate_past_recording()  # convolutions then keep all their inputs, to be cut below
    backbone(
        input_ids=ids_NR,
        attention_mask=mask_NT,
        position_ids=positions(mask_NT)[:, -ids_NR.shape[1] :],
        **{cache_name(backbone): cache},
        use_cache=True,
    )
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            _cut_states(layer, own_NR.sum(1))
    return mask_NT


def _cut_states(layer: LinearAttentionLayer, lengths_N: Tensor) -> None:
    """Leave a convolution its inputs at each prompt's end, which is not that of the padded rows."""
    layer.record_past = False
    for index, state in layer.conv_states.items():
        width = layer.conv_kernel_size[index]
        assert state is not None and width is not None
        at_N1K = (lengths_N[:, None] + torch.arange(width, device=lengths_N.device))[:, None]
        layer.conv_states[index] = state.gather(2, at_N1K.expand(-1, state.shape[1], -1))


def positions(mask_NT: Tensor) -> Tensor:
    """The position of each token among those that the mask leaves."""
    return (mask_NT.cumsum(1) - 1).clamp(min=0)
