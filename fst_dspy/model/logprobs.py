"""Completions read again: the inputs of a forward pass, and log-probabilities at their tokens.

Whatever looks at completions after they were sampled reads them through here: KL and entropy,
distillation, and the optimizer step, whose output layer is TRL's own. Rows are padded, or go on
from what their prompts have in common, which is then read once (``fst_dspy.model.prefixes``). Each
token has the position that it was sampled at, and the output layer runs at completions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fst_dspy.grammar.tokens import single, unpacked
from fst_dspy.model.cache_layers import cache_name
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import (
    backbone_of,
    can_continue,
    common_beginning,
    find_prefixes,
    left_padded,
    pads_safely,
    positions,
    read_prefixes,
    right_padded,
    worthwhile_bins,
    worthwhile_prefixes,
)
from fst_dspy.model.sampling import allowed_tokens
from fst_dspy.types import Grammar

Ids = Sequence[int]
CHUNK_BYTES = 2**29
"""Half a GiB: of log-probabilities over a vocabulary that are made at once, and of hidden states
that are held while other weights are swapped in."""
FORWARD_ROWS = 32
"""Rows that are read at once where there is no gradient."""


class Row(Protocol):
    """A prompt and its completion, as ``Call`` and ``TrainingRow`` are."""

    @property
    def prompt_ids_T(self) -> tuple[int, ...]: ...

    @property
    def completion_ids_T(self) -> tuple[int, ...]: ...

    @property
    def temperature(self) -> float: ...

    @property
    def grammar(self) -> Grammar | None: ...


def completion_logprobs(policy: Policy, rows: Sequence[Row]) -> Tensor:
    """Log-probabilities over the vocabulary at the N completion tokens of some rows, row by row.

    Under the weights now in the model, each row at its own temperature, or at 1 when greedy, and
    over what its grammar allows, with minus infinity elsewhere. Gradients flow where they are
    enabled.

    Args:
        policy: The caller holds its lock.
        rows: At least one, each with a completion.

    Returns:
        Nats, of shape N x V, in float32.
    """
    state_ND, temperature_N = completion_states(policy, rows), temperatures(rows, policy.device)
    return logprobs_of(policy, state_ND, temperature_N, allowed_tokens(policy, rows))


@torch.no_grad()
def sampled_logprobs(policy: Policy, rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """Log-probabilities (nats) of the completion tokens of each row; see ``completion_logprobs``.

    Rows are read some at a time, neighbours together; what is made over the vocabulary is not kept.

    Args:
        policy: The caller holds its lock.
        rows: Any number, each with a completion.
    """
    found: list[float] = []
    for start in range(0, len(rows), FORWARD_ROWS):
        batch = rows[start : start + FORWARD_ROWS]
        state_ND = completion_states(policy, batch)
        ids = [token for row in batch for token in row.completion_ids_T]
        id_N1 = torch.tensor(ids, device=state_ND.device)[:, None]
        for part, temperature_n, allowed_nW in vocabulary_parts(policy, batch):
            logprob_nV = logprobs_of(policy, state_ND[part], temperature_n, allowed_nW)
            found += logprob_nV.gather(1, id_N1[part]).squeeze(1).tolist()
    values = iter(found)
    return [tuple(next(values) for _ in row.completion_ids_T) for row in rows]


def vocabulary_parts(
    policy: Policy, rows: Sequence[Row]
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The rows' completion tokens, so many at a time that their log-probabilities fit.

    With the temperature of each, and what it was allowed to be.
    """
    temperature_N, allowed_NW = temperatures(rows, policy.device), allowed_tokens(policy, rows)
    size = _part_size(policy.model)
    for start in range(0, len(temperature_N), size):
        part = slice(start, start + size)
        yield part, temperature_N[part], None if allowed_NW is None else allowed_NW[part]


def _part_size(model: Any) -> int:
    """Of how many tokens log-probabilities over the vocabulary fit in ``CHUNK_BYTES``."""
    return max(1, CHUNK_BYTES // (4 * int(model.config.get_text_config().vocab_size)))


def completion_states(policy: Policy, rows: Sequence[Row]) -> Tensor:
    """What the output layer takes at the N completion tokens, N x D; see ``completion_logprobs``.

    A hundred times smaller than log-probabilities over a large vocabulary: to be kept until other
    weights are in the model, along with the ``output_layer`` that they are for.
    """
    model, device = policy.model, policy.device
    pairs = [(row.prompt_ids_T, row.completion_ids_T) for row in rows]
    inputs, at_BT = completion_inputs(model, pairs, policy.tokenizer.pad_token_id, device)
    state_BTD, _ = _states(model, inputs, at_BT)
    lengths_B1 = torch.tensor([[len(row.completion_ids_T)] for row in rows], device=device)
    return state_BTD[torch.arange(at_BT.shape[1], device=device) < lengths_B1]


def logprobs_of(
    policy: Policy, state_ND: Tensor, temperature_N: Tensor, allowed_NW: Tensor | None = None
) -> Tensor:
    """Log-probabilities over the vocabulary, N x V, from what the output layer takes.

    With ``allowed_NW``, a mask as ``allowed_tokens`` gives it, over the tokens in it alone.

    The model itself runs, on one token whose state these take the place of: some scale or cap
    what their output layer gives.
    """
    pad_id = policy.tokenizer.pad_token_id
    return _logprobs(policy.model, pad_id, state_ND, temperature_N, allowed_NW)


def _logprobs(
    model: Any, pad_id: int, state_ND: Tensor, temperature_N: Tensor, allowed_NW: Tensor | None
) -> Tensor:
    ids_11 = torch.tensor([[pad_id]], device=state_ND.device)
    with _before_output_layer(model, lambda _module, inputs: (state_ND[None], *inputs[1:])):
        logits_NV = model(input_ids=ids_11, use_cache=False).logits[0].float()
    if allowed_NW is not None:
        allowed_NV = unpacked(allowed_NW.to(logits_NV.device), logits_NV.shape[1])
        logits_NV = logits_NV.masked_fill(~allowed_NV, -torch.inf)
    return (logits_NV / temperature_N[:, None]).log_softmax(-1)


def temperatures(rows: Sequence[Row], device: torch.device) -> Tensor:
    """The temperature of each of the N completion tokens of some rows; 1 where they are greedy."""
    values = [row.temperature or 1.0 for row in rows for _ in row.completion_ids_T]
    return torch.tensor(values, device=device)


def output_layer(policy: Policy) -> list[Tensor]:
    """A copy of the output layer's weights, as they are now."""
    return [weight.detach().clone() for weight in policy.model.get_output_embeddings().parameters()]


@contextmanager
def with_output_layer(policy: Policy, weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the model has these weights in its output layer, for ``logprobs_of``."""
    own = list(policy.model.get_output_embeddings().parameters())
    before = [weight.data for weight in own]
    for weight, data in zip(own, weights, strict=True):
        weight.data = data
    try:
        yield
    finally:
        for weight, data in zip(own, before, strict=True):
            weight.data = data


def state_bytes(policy: Policy) -> int:
    """Size of what the output layer takes for one token."""
    weight = policy.model.get_output_embeddings().weight
    return weight.shape[1] * weight.element_size()


def completion_inputs(
    model: Any,
    rows: Sequence[tuple[Ids, Ids]],
    pad_id: int,
    device: torch.device,
    *,
    continues: bool | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """What a forward pass over some rows takes; common beginnings have then been read.

    Args:
        model: A causal language model, with its adapters if it has any.
        rows: Prompt and completion of each of B rows; T is the longest completion.
        continues: Whether to read common beginnings once; by default where the model can.

    Returns:
        Arguments of the model's forward, and where the hidden state that predicts each completion
        token is, (B, T), counted through all rows of these arguments; of padding it is any place.
    """
    if continues is None:
        continues = can_continue(model)
    packed = _packed_inputs(model, rows, pad_id, device) if continues else None
    if packed is not None:
        return packed
    prefixes = worthwhile_prefixes([prompt for prompt, _ in rows]) if continues else None
    longest = max(len(completion) for _, completion in rows)
    steps_T = torch.arange(longest, device=device)
    if prefixes is not None:
        rest_B = [prefixes.rest(row, prompt) for row, (prompt, _) in enumerate(rows)]
        own = [(*rest, *completion) for rest, (_, completion) in zip(rest_B, rows, strict=True)]
        ids_BT, own_mask = right_padded(own, pad_id, device)
        cache, mask_BT = read_prefixes(backbone_of(model), prefixes, pad_id, device)
        mask_BT = torch.cat([mask_BT, own_mask], dim=1)
        # The logits of a token are those of the position before it.
        first_B1 = torch.tensor([[len(rest) - 1] for rest in rest_B], device=device)
        at_BT = (first_B1 + steps_T).clamp(max=ids_BT.shape[1] - 1)
        position_BT = positions(mask_BT)[:, -ids_BT.shape[1] :]
        more = {"position_ids": position_BT, cache_name(model): cache, "use_cache": True}
    elif not pads_safely(model):
        # Padding is behind all tokens, none of which it can change.
        ids_BT, mask_BT = right_padded([(*prompt, *own) for prompt, own in rows], pad_id, device)
        first_B1 = torch.tensor([[len(prompt) - 1] for prompt, _ in rows], device=device)
        at_BT = (first_B1 + steps_T).clamp(max=ids_BT.shape[1] - 1)
        more = {"use_cache": False}
    else:
        prompts = left_padded([prompt for prompt, _ in rows], pad_id, device)
        completions = right_padded([completion for _, completion in rows], pad_id, device)
        ids_BT, mask_BT = (
            torch.cat(pair, dim=1) for pair in zip(prompts, completions, strict=True)
        )
        at_BT = (prompts[0].shape[1] - 1 + steps_T).expand(len(rows), -1)
        # Rotary positions count from anywhere, and TRL counts padding too: bit for bit as it does.
        own_positions = {} if is_rotary(model) else {"position_ids": positions(mask_BT)}
        more = {**own_positions, "use_cache": False}
    at_BT = at_BT + torch.arange(len(rows), device=device)[:, None] * ids_BT.shape[1]
    return {"input_ids": ids_BT, "attention_mask": mask_BT, **more}, at_BT


def read_of(rows: Sequence[tuple[Ids, Ids]]) -> list[tuple[int, ...]]:
    """What has to be read of each row: all but its last token, behind which nothing is asked."""
    return [(*prompt, *completion)[:-1] for prompt, completion in rows]


def _packed_inputs(
    model: Any, rows: Sequence[tuple[Ids, Ids]], pad_id: int, device: torch.device
) -> tuple[dict[str, Any], Tensor] | None:
    """As ``completion_inputs``, with rows in bins; ``None`` where that is not worth it.

    Tensors: B bins of L tokens, behind beginnings of P tokens.
    """
    if min(len(prompt) for prompt, _ in rows) < 2:
        return None
    read_N = read_of(rows)
    bins = worthwhile_bins(model, read_N)
    if bins is None:
        return None
    stems = []
    for part in bins:
        first, last = (read_N[part.rows[place]] for place in (0, -1))
        # What follows each prompt is asked for, so that no beginning goes further than one.
        shortest = min(len(rows[number][0]) for number in part.rows)
        stems.append(first[: min(common_beginning(first, last), shortest)])
    prefixes = find_prefixes(stems)
    begins_B = [len(prefixes.prefix_ids_P[owner]) for owner in prefixes.owner_N]
    trees = [
        _Tree([read_N[number][begins:] for number in part.rows])
        for part, begins in zip(bins, begins_B, strict=True)
    ]
    width = max(len(tree.ids_L) for tree in trees)
    ids_BL = np.full((len(bins), width), pad_id)
    position_BL = np.zeros((len(bins), width), dtype=np.int64)
    sees_BLL = np.broadcast_to(np.eye(width, dtype=bool), (len(bins), width, width)).copy()
    at_BT = np.zeros((len(rows), max(len(completion) for _, completion in rows)), dtype=np.int64)
    for place, (part, tree, begins) in enumerate(zip(bins, trees, begins_B, strict=True)):
        length = len(tree.ids_L)
        ids_BL[place, :length] = tree.ids_L
        position_BL[place, :length] = begins + tree.depth_L
        sees_BLL[place, :length, :length] = tree.sees_LL
        for number, path_T in zip(part.rows, tree.paths, strict=True):
            own_T = path_T[len(rows[number][0]) - 1 - begins :]
            at_BT[number, : len(own_T)] = place * width + own_T
    cache, mask_BP = read_prefixes(backbone_of(model), prefixes, pad_id, device)
    sees_BLP = mask_BP.bool()[:, None].expand(-1, width, -1)
    inputs = {
        "input_ids": torch.from_numpy(ids_BL).to(device),
        "attention_mask": torch.cat([sees_BLP, torch.from_numpy(sees_BLL).to(device)], -1)[:, None],
        "position_ids": torch.from_numpy(position_BL).to(device),
        cache_name(model): cache,
        "use_cache": True,
    }
    return inputs, torch.from_numpy(at_BT).to(device)


class _Tree:
    """Sorted rows as one sequence of L tokens, what they have in common once.

    Attributes:
        ids_L: The tokens.
        depth_L: Tokens before each in its row.
        sees_LL: Whether one goes on from another, or is it.
        paths: Where the tokens of each row are.
    """

    def __init__(self, rows: Sequence[Ids]) -> None:
        ids: list[int] = []
        path_T, before = np.zeros(0, dtype=np.int64), rows[0][:0]
        self.paths: list[np.ndarray] = []
        for row in rows:
            common = common_beginning(before, row)
            new = np.arange(len(ids), len(ids) + len(row) - common)
            path_T, before = np.concatenate([path_T[:common], new]), row
            ids += row[common:]
            self.paths.append(path_T)
        self.ids_L = np.array(ids)
        self.depth_L = np.zeros(len(ids), dtype=np.int64)
        self.sees_LL = np.zeros((len(ids), len(ids)), dtype=bool)
        for path_T in self.paths:
            self.depth_L[path_T] = np.arange(len(path_T))
            self.sees_LL[np.ix_(path_T, path_T)] = np.tri(len(path_T), dtype=bool)


def is_rotary(model: Any) -> bool:
    """Whether only the distance between positions matters to a model, so that padding may count."""
    return getattr(model.config.get_text_config(), "rope_parameters", None) is not None


@contextmanager
def only_at(model: Any, at_BT: Tensor) -> Iterator[None]:
    """Inside the block the model's backbone gives its states at these places alone."""

    def after_backbone(_module: Any, _inputs: Any, output: Any) -> Any:
        output.last_hidden_state = _taken(output.last_hidden_state, at_BT)
        return output

    handle = backbone_of(model).register_forward_hook(after_backbone)
    try:
        yield
    finally:
        handle.remove()


def chosen_logprobs(
    model: Any,
    pad_id: int,
    inputs: Mapping[str, Any],
    at_BT: Tensor,
    label_BT: Tensor,
    allowed_BTW: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of given tokens, and entropies, over what was allowed at each.

    The output layer runs where there was something to choose, in parts that run again on the way
    back, so that their logits need not be kept. Where one token alone was allowed both are 0.

    Args:
        inputs, at_BT: As ``completion_inputs`` gives them.
        label_BT: The tokens; -100 for padding.
        allowed_BTW: A packed mask for each (``allowed_tokens``); ``None`` where all were.

    Returns:
        Nats, float32 of shape (B, T) each, with gradients where they are enabled; and the router
        loss of a mixture of experts, where the inputs ask for ``output_router_logits``.
    """
    state_BTD, output = _states(model, inputs, at_BT)
    free_BT, allowed_NW = label_BT >= 0, None
    if allowed_BTW is not None:
        free_BT &= ~single(allowed_BTW)
        allowed_NW = allowed_BTW[free_BT]
    state_ND, label_N = state_BTD[free_BT], label_BT[free_BT]

    def part_of(part: slice) -> tuple[Tensor, Tensor]:
        state_nD, label_n = state_ND[part], label_N[part]
        allowed_nW = None if allowed_NW is None else allowed_NW[part]
        temperature_n = torch.full(label_n.shape, temperature, device=label_n.device)
        logprob_nV = _logprobs(model, pad_id, state_nD, temperature_n, allowed_nW)
        own_nV = logprob_nV.masked_fill(logprob_nV == -torch.inf, 0)  # of which there is nothing
        entropy_n = -(logprob_nV.exp() * own_nV).sum(-1)
        return logprob_nV.gather(1, label_n[:, None]).squeeze(1), entropy_n

    size = _part_size(model)
    found = [
        checkpoint(part_of, slice(start, start + size), use_reentrant=False)
        for start in range(0, len(label_N), size)
    ]
    # Connected to the model also where nothing was free.
    zero_BT = label_BT.new_zeros(label_BT.shape, dtype=torch.float32) + 0 * state_BTD.float().sum()
    aux_loss = getattr(output, "aux_loss", None)
    if not found:
        return zero_BT, zero_BT, aux_loss
    logprob_N, entropy_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    logprob_BT, entropy_BT = (
        zero_BT.masked_scatter(free_BT, values_N) for values_N in (logprob_N, entropy_N)
    )
    return logprob_BT, entropy_BT, aux_loss


def _states(model: Any, inputs: Mapping[str, Any], at_BT: Tensor) -> tuple[Tensor, Any]:
    """What the output layer would take at some positions, and the model's output without logits."""
    caught: list[Tensor] = []

    def catch(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(_taken(inputs[0], at_BT))
        return inputs[0][:, :0], *inputs[1:]  # no logits

    with _before_output_layer(model, catch):
        output = model(**inputs)
    (state_BTD,) = caught
    return state_BTD, output


@contextmanager
def _before_output_layer(model: Any, hook: Any) -> Iterator[None]:
    # Some models' forward does not call the backbone as a whole, but all call the output layer.
    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _taken(state_BTD: Tensor, at_BT: Tensor) -> Tensor:
    return state_BTD.flatten(0, 1)[at_BT]
