"""How far the policy has moved from the base model, and how sure it is of its tokens.

The KL divergence is exact over the vocabulary at every completion token, not an estimate from the
sampled tokens; only the completions are sampled (paper, section 4: KL to the base policy).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fst_dspy.errors import DataError
from fst_dspy.model.cache_layers import cache_name
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import (
    Prefixes,
    backbone_of,
    can_continue,
    positions,
    read_prefixes,
    right_padded,
    worthwhile_prefixes,
)
from fst_dspy.types import Call

CHUNK_BYTES = 2**29
"""Log-probabilities held at once while the weights are swapped: half a GiB."""
FORWARD_ROWS = 32


def kl_to_base(policy: Policy, calls: Sequence[Call]) -> float:
    """KL(policy || base), nats a token, averaged over the completion tokens of the calls.

    Args:
        policy: The live weights are compared with those at its ``base_version``.
        calls: Sampled from the live weights; taken at their own temperature, or at 1 when greedy.

    Returns:
        At least 0; exactly 0 when the weights are those of the base.

    Raises:
        DataError: No call has a completion.
    """
    total, count = 0.0, 0
    with policy.lock, torch.no_grad():
        for chunk in _chunks(policy, calls):
            live = [_logprobs(policy, rows) for rows in _batches(chunk)]
            with policy.at(policy.base_version):
                for rows, live_NV in zip(_batches(chunk), live, strict=True):
                    base_NV = _logprobs(policy, rows)
                    # A probability of 0 adds nothing, however low the other one is.
                    terms_NV = live_NV.exp() * (live_NV - base_NV)
                    total += terms_NV.masked_fill(live_NV == -torch.inf, 0).double().sum().item()
                    count += len(live_NV)
    return max(0.0, total / count)


def token_entropy(policy: Policy, calls: Sequence[Call]) -> float:
    """Entropy of the live policy, nats a token, averaged over the calls' completion tokens.

    Raises:
        DataError: No call has a completion.
    """
    total, count = 0.0, 0
    with policy.lock, torch.no_grad():
        for chunk in _chunks(policy, calls):
            for rows in _batches(chunk):
                logprob_NV = _logprobs(policy, rows)
                total += torch.special.entr(logprob_NV.exp()).double().sum().item()
                count += len(logprob_NV)
    return total / count


def _chunks(policy: Policy, calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Calls in order of length, in chunks whose log-probabilities fit in ``CHUNK_BYTES``."""
    whole = [call for call in calls if call.completion_ids_T]
    if not whole:
        raise DataError("no call has a completion, so there is nothing to measure on")
    token_bytes = 4 * policy.model.config.get_text_config().vocab_size
    chunk: list[Call] = []
    used = 0
    for call in sorted(whole, key=lambda c: len(c.prompt_ids_T) + len(c.completion_ids_T)):
        size = len(call.completion_ids_T) * token_bytes
        if chunk and used + size > CHUNK_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(call)
        used += size
    yield chunk


def _batches(calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
    return (calls[i : i + FORWARD_ROWS] for i in range(0, len(calls), FORWARD_ROWS))


def _logprobs(policy: Policy, calls: Sequence[Call]) -> Tensor:
    """Log-probabilities over the vocabulary at the N completion tokens of the calls, in float32."""
    prefixes = worthwhile_prefixes([call.prompt_ids_T for call in calls])
    if prefixes is not None and can_continue(policy.model):
        return _from_prefixes(policy, calls, prefixes)
    prompt_T = max(len(call.prompt_ids_T) for call in calls)
    completion_T = max(len(call.completion_ids_T) for call in calls)
    shape, device = (len(calls), prompt_T + completion_T), policy.device
    id_BT = torch.full(shape, policy.tokenizer.pad_token_id, device=device)
    mask_BT = torch.zeros(shape, dtype=torch.long, device=device)
    for row, call in enumerate(calls):
        ids = torch.tensor(call.prompt_ids_T + call.completion_ids_T, device=device)
        start = prompt_T - len(call.prompt_ids_T)
        id_BT[row, start : start + len(ids)] = ids
        mask_BT[row, start : start + len(ids)] = 1
    output = policy.model(
        input_ids=id_BT, attention_mask=mask_BT, logits_to_keep=completion_T + 1, use_cache=False
    )
    temperature_B = torch.tensor([call.temperature or 1.0 for call in calls], device=device)
    logits_BTV = output.logits[:, :-1].float() / temperature_B[:, None, None]
    return logits_BTV[mask_BT[:, prompt_T:].bool()].log_softmax(-1)


def _from_prefixes(policy: Policy, calls: Sequence[Call], prefixes: Prefixes) -> Tensor:
    """The same, with what the prompts have in common read once."""
    pad_id, device = policy.tokenizer.pad_token_id, policy.device
    rest_B = [prefixes.rest(row, call.prompt_ids_T) for row, call in enumerate(calls)]
    own_ids, own_mask = right_padded(
        [(*rest, *call.completion_ids_T) for rest, call in zip(rest_B, calls, strict=True)],
        pad_id,
        device,
    )
    cache, mask_BT = read_prefixes(backbone_of(policy.model), prefixes, pad_id, device)
    mask_BT = torch.cat([mask_BT, own_mask], dim=1)
    # The logits of a token are those of the position before it.
    first = min(map(len, rest_B)) - 1
    output = policy.model(
        input_ids=own_ids,
        attention_mask=mask_BT,
        position_ids=positions(mask_BT)[:, -own_ids.shape[1] :],
        **{cache_name(policy.model): cache},
        use_cache=True,
        logits_to_keep=torch.arange(first, own_ids.shape[1] - 1, device=device),
    )
    spans_B = [
        (len(rest) - 1 - first, len(call.completion_ids_T), call.temperature or 1.0)
        for rest, call in zip(rest_B, calls, strict=True)
    ]
    return torch.cat(
        [
            (logits_TV[start : start + length].float() / temperature).log_softmax(-1)
            for logits_TV, (start, length, temperature) in zip(output.logits, spans_B, strict=True)
        ]
    )
