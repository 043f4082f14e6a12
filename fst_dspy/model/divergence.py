"""How far the policy has moved from the base model, and how sure it is of its tokens.

The KL divergence is exact over the vocabulary at every completion token, not an estimate from the
sampled tokens; only the completions are sampled (paper, section 4: KL to the base policy).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from fst_dspy.errors import DataError
from fst_dspy.grammar.tokens import single, unpacked
from fst_dspy.model.endings import eos_ids
from fst_dspy.model.hardware import give_back_memory
from fst_dspy.model.logprobs import (
    CHUNK_BYTES,
    FORWARD_ROWS,
    completion_states,
    logprobs_of,
    output_layer,
    state_bytes,
    vocabulary_parts,
    with_output_layer,
)
from fst_dspy.model.policy import Policy
from fst_dspy.types import Call, Rollout


def kl_to_base(policy: Policy, calls: Sequence[Call]) -> float:
    """KL(policy || base), nats a token, averaged over the completion tokens of the calls.

    Args:
        policy: The live weights are compared with those at its ``base_version``.
        calls: Sampled from the live weights; taken at their own temperature, or at 1 when greedy,
            both over what the call's grammar allowed.

    Returns:
        At least 0; exactly 0 when the weights are those of the base.

    Raises:
        DataError: No call has a completion.
    """
    total, count = 0.0, 0
    with policy.lock, torch.no_grad():
        layer = output_layer(policy)
        for chunk in _chunks(policy, calls):
            live = [completion_states(policy, rows) for rows in _batches(chunk)]
            with policy.at(policy.base_version):
                for rows, live_ND in zip(_batches(chunk), live, strict=True):
                    base_ND = completion_states(policy, rows)
                    for part, temperature_N, allowed_NW in vocabulary_parts(policy, rows):
                        own = (temperature_N, allowed_NW)
                        base_NV = logprobs_of(policy, base_ND[part], *own)
                        with with_output_layer(policy, layer):
                            live_NV = logprobs_of(policy, live_ND[part], *own)
                        # A probability of 0 adds nothing, however low the other one is.
                        term_NV = live_NV.exp() * (live_NV - base_NV)
                        term_NV = term_NV.masked_fill(live_NV == -torch.inf, 0)
                        total += term_NV.double().sum().item()
                        count += len(live_NV)
            give_back_memory()
    return max(0.0, total / count)


def format_share(policy: Policy, calls: Sequence[Call]) -> float | None:
    """How often answers would keep to their formats if they were not held to them, 0 to 1.

    An answer is drawn with q, over what its format allows, where the model itself has p: at each
    token q = p / Z, with Z the share of p that is allowed, of forced tokens too. So the sum of p
    over all answers in the format is the mean under q of the product of Z over an answer's tokens:
    the mean over the calls of that product estimates it without bias. The end that is forced behind
    a whole answer is not counted: adapters do not read on. Ways to write the same text in other
    tokens than a forced one count as kept from it.

    Args:
        policy: The live weights, which the calls were sampled from.
        calls: Those without a grammar, or without a completion, are passed over.

    Returns:
        ``None`` where no answer was held.
    """
    held = [call for call in calls if call.grammar is not None and call.completion_ids_T]
    if not held:
        return None
    kept: list[float] = []
    ends = torch.tensor(sorted(eos_ids(policy)))
    with policy.lock, torch.no_grad():
        for rows in _batches(held):
            state_ND = completion_states(policy, rows)
            ids_N = torch.tensor([token for row in rows for token in row.completion_ids_T])
            end_N = torch.isin(ids_N, ends).to(policy.device)
            log_share_N = torch.empty(len(state_ND), dtype=torch.float64, device=policy.device)
            for part, temperature_N, allowed_NW in vocabulary_parts(policy, rows):
                logprob_NV = logprobs_of(policy, state_ND[part], temperature_N)
                assert allowed_NW is not None  # as every row has a grammar
                allowed_NW = allowed_NW.to(policy.device)
                allowed_NV = unpacked(allowed_NW, logprob_NV.shape[1])
                share_N = logprob_NV.masked_fill(~allowed_NV, -torch.inf).logsumexp(-1).double()
                unread_N = end_N[part] & single(allowed_NW)
                log_share_N[part] = share_N.clamp(max=0).masked_fill(unread_N, 0)
            lengths = [len(row.completion_ids_T) for row in rows]
            kept += [float(one_T.sum().exp()) for one_T in log_share_N.split(lengths)]
    return sum(kept) / len(kept)


def spread_calls(rollouts: Sequence[Rollout], tokens: int, seed: int) -> list[Call]:
    """Calls to measure on, so that each rollout is represented as far as there is room.

    The rollouts are taken in turn, one call each, until the next one would be too much; which calls
    of a rollout and, in the last turn, which rollouts is drawn. So agents of many calls are not
    measured on the beginnings of the first few, and a single long one does not weigh as much as all
    others.

    Args:
        rollouts: With any number of calls each.
        tokens: Most prompt and completion tokens of the calls together, which is what a measurement
            has to read; but one call is always taken.
        seed: Of what is drawn.

    Returns:
        In the order of the rollouts and of their calls; all calls, where there is room for them.
    """
    calls = [(row, call) for row, rollout in enumerate(rollouts) for call in rollout.calls]
    if sum(_length(call) for _, call in calls) <= tokens:
        return [call for _, call in calls]
    rng = random.Random(seed)
    turns_of = [0] * len(rollouts)
    drawn = []  # (turn, a number to shuffle the turn, place among all calls)
    for place in rng.sample(range(len(calls)), len(calls)):
        row, call = calls[place]
        if call.completion_ids_T:  # others cannot be measured on
            drawn.append((turns_of[row], rng.random(), place))
            turns_of[row] += 1
    taken: list[int] = []
    used = 0
    for *_, place in sorted(drawn):
        used += _length(calls[place][1])
        if taken and used > tokens:
            break
        taken.append(place)
    return [calls[place][1] for place in sorted(taken)]


def token_entropy(policy: Policy, calls: Sequence[Call]) -> float:
    """Entropy of the live policy, nats a token, averaged over the calls' completion tokens.

    Raises:
        DataError: No call has a completion.
    """
    total, count = 0.0, 0
    with policy.lock, torch.no_grad():
        for chunk in _chunks(policy, calls):
            for rows in _batches(chunk):
                state_ND = completion_states(policy, rows)
                for part, temperature_N, allowed_NW in vocabulary_parts(policy, rows):
                    own = (temperature_N, allowed_NW)
                    logprob_NV = logprobs_of(policy, state_ND[part], *own)
                    total += torch.special.entr(logprob_NV.exp()).double().sum().item()
                    count += len(logprob_NV)
    return total / count


def _chunks(policy: Policy, calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Calls in order of length, in chunks whose hidden states fit in ``CHUNK_BYTES``."""
    whole = [call for call in calls if call.completion_ids_T]
    if not whole:
        raise DataError("no call has a completion, so there is nothing to measure on")
    token_bytes = state_bytes(policy)
    chunk: list[Call] = []
    used = 0
    for call in sorted(whole, key=_length):
        size = len(call.completion_ids_T) * token_bytes
        if chunk and used + size > CHUNK_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(call)
        used += size
    yield chunk


def _length(call: Call) -> int:
    return len(call.prompt_ids_T) + len(call.completion_ids_T)


def _batches(calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
    return (calls[i : i + FORWARD_ROWS] for i in range(0, len(calls), FORWARD_ROWS))
