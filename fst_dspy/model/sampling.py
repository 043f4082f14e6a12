"""How a token is drawn from the model's distribution: numbers of a row's own, cuts, penalties, and
masks for rows that are held to a grammar.

These masks are made on the CPU and put over the logits after the model's step, whichever way of
decoding has made them. A row that can only go on in one way to its end is at its end: the rest is
written down, and the model is not asked for it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fst_dspy.grammar.tokens import ALL, Vocabulary, Walk, unpacked
from fst_dspy.model.endings import eos_ids
from fst_dspy.model.policy import Policy
from fst_dspy.types import Grammar


class Penalised(Protocol):
    """What is asked of a request here; see ``fst_dspy.model.generate.GenerationRequest``."""

    @property
    def prompt_ids_T(self) -> tuple[int, ...]: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...


class Penalties:
    """Logits lowered for tokens that a row has had: OpenAI's penalties, and transformers' one.

    Frequency and presence count what the row has sampled; repetition counts its prompt as well,
    and divides a logit above 0 or multiplies one below.

    Args:
        requests: Of all rows of the batch.
        scale: Their temperatures, (rows,); 1 where greedy.
    """

    def __init__(self, requests: Sequence[Penalised], scale: Tensor) -> None:
        self._requests, self._scale = requests, scale
        self._frequency = scale.new_tensor([r.frequency_penalty for r in requests])
        self._presence = scale.new_tensor([r.presence_penalty for r in requests])
        self._repetition = scale.new_tensor([r.repetition_penalty for r in requests])
        self._count_NV: Tensor | None = None
        self._had_NV: Tensor | None = None

    def lowered(self, logits_BV: Tensor, rows: Tensor) -> Tensor:
        """The logits of some rows, which have been divided by their temperatures, lowered."""
        count_NV, had_NV = self._begun(logits_BV.shape[1], logits_BV.device)
        count_BV, had_BV = count_NV[rows], had_NV[rows]
        divisor_B1 = self._repetition[rows][:, None]
        repeated_BV = torch.where(logits_BV > 0, logits_BV / divisor_B1, logits_BV * divisor_B1)
        logits_BV = torch.where(had_BV, repeated_BV, logits_BV)
        taken_BV = self._frequency[rows][:, None] * count_BV
        taken_BV += self._presence[rows][:, None] * (count_BV > 0)
        return logits_BV - taken_BV / self._scale[rows][:, None]

    def had(self, next_B: Tensor, rows: Tensor) -> None:
        """Count the tokens that some rows have sampled."""
        assert self._count_NV is not None and self._had_NV is not None
        self._count_NV[rows, next_B] += 1
        self._had_NV[rows, next_B] = True

    def _begun(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._count_NV is None or self._had_NV is None:
            shape = len(self._requests), size
            self._count_NV = torch.zeros(shape, dtype=torch.int32, device=device)
            self._had_NV = torch.zeros(shape, dtype=torch.bool, device=device)
            for row, request in enumerate(self._requests):
                self._had_NV[row, torch.tensor(request.prompt_ids_T, device=device)] = True
        return self._count_NV, self._had_NV


def draw(
    prob_BV: Tensor, uniform_B: Tensor, top_p_B: Tensor | None, top_k_B: Tensor | None = None
) -> Tensor:
    """Inverse-CDF sampling: the token in whose share of the (cut) distribution the number falls.

    Args:
        prob_BV: Probabilities.
        uniform_B: Numbers in [0, 1).
        top_p_B: Nucleus masses, of what ``top_k_B`` leaves.
        top_k_B: How many of the likeliest tokens are left.
    """
    prob_BV = prob_BV.double()
    if top_p_B is not None or top_k_B is not None:
        sorted_BV, order_BV = prob_BV.sort(stable=True, dim=-1, descending=True)
        if top_k_B is not None:
            rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
            sorted_BV = sorted_BV.masked_fill(rank_V[None] >= top_k_B[:, None], 0.0)
        if top_p_B is not None:
            before_BV = sorted_BV.cumsum(-1) - sorted_BV
            mass_B1 = top_p_B[:, None]
            if top_k_B is not None:
                mass_B1 = mass_B1 * sorted_BV.sum(-1, keepdim=True)
            sorted_BV = sorted_BV.masked_fill(before_BV >= mass_B1, 0.0)
        sorted_BV[:, 0] = sorted_BV[:, 0].clamp(min=1e-300)  # top_p of 0 leaves the likeliest
        prob_BV = torch.zeros_like(prob_BV).scatter(1, order_BV, sorted_BV)
    cumulative_BV = prob_BV.cumsum(-1)
    target_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
    # Rounding may put the target at the very end: stay on the last token that can be drawn. Among
    # numbers that are none, whose batch is refused in the end, it would be no token at all.
    last_B = torch.searchsorted(cumulative_BV, cumulative_BV[:, -1:].contiguous()).squeeze(1)
    return torch.minimum(token_B, last_B.clamp(max=prob_BV.shape[1] - 1))


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Numbers in [0, 1) for each (seed, step), by the splitmix64 hash: float64 (rows, steps)."""
    mask = (1 << 64) - 1
    seed_B1 = np.array([seed & mask for seed in seeds], dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        counter_T = np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits_BT = _mix(_mix(seed_B1 + np.uint64(0x9E3779B97F4A7C15)) + counter_T[None])
    return (bits_BT >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


# --- answers that are held to a grammar ---------------------------------------------------------


class Row(Protocol):
    """A completion and what it was held to, as ``Call`` and ``TrainingRow`` have them."""

    @property
    def completion_ids_T(self) -> tuple[int, ...]: ...

    @property
    def grammar(self) -> Grammar | None: ...


_vocabularies: weakref.WeakKeyDictionary[Policy, Vocabulary] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def vocabulary(policy: Policy) -> Vocabulary:
    """The policy's tokens for grammars; about 0.3 s of work the first time, for 50,000 of them.

    Raises:
        ConfigError: The tokenizer is none of the tokenizers library, or has no end token.
    """
    with _making:
        if policy not in _vocabularies:
            # Tokens may have been added to the tokenizer alone.
            size = int(policy.model.get_output_embeddings().weight.shape[0])
            size = max(size, len(policy.tokenizer))
            # Nor are all of the model's known to the tokenizer, which llguidance reads.
            ends = [token for token in eos_ids(policy) if token < len(policy.tokenizer)]
            _vocabularies[policy] = Vocabulary(policy.tokenizer, size, ends)
        return _vocabularies[policy]


def allowed_tokens(policy: Policy, rows: Sequence[Row]) -> Tensor | None:
    """Which tokens were allowed at each of the N completion tokens of some rows, row by row.

    Returns:
        Packed, 32 tokens a number: int32 of shape (N, V / 32, rounded up), on the CPU. ``None``
        where no row has a grammar.
    """
    if all(row.grammar is None for row in rows):
        return None
    own = vocabulary(policy)
    bits_NW = np.full((sum(len(row.completion_ids_T) for row in rows), own.words), ALL)
    place = 0
    for row in rows:
        if row.grammar is not None:
            walk = Walk(own, row.grammar)
            for offset, token in enumerate(row.completion_ids_T):
                walk.allowed_into(bits_NW[place + offset])
                walk.advance(token)
        place += len(row.completion_ids_T)
    return torch.from_numpy(bits_NW)


class HeldRows:
    """Tensors: B live rows, V tokens of the vocabulary.

    Args:
        policy: Whose tokens these are.
        requests: All rows of the batch, as ``GenerationRequest``; those without a grammar are free.
        limits: The most tokens that each may say.
    """

    def __init__(self, policy: Policy, requests: Sequence[Any], limits: Sequence[int]) -> None:
        self._own = vocabulary(policy)
        self._begun = [r.prompt_ids_T[len(r.prompt_ids_T) - r.begun :] for r in requests]
        self._walks = [Walk(self._own, r.grammar) if r.grammar else None for r in requests]
        for walk, ids_T in zip(self._walks, self._begun, strict=True):
            for token in ids_T if walk is not None else ():
                walk.advance(token)  # type: ignore[union-attr]
        self._limits = list(limits)
        self._tails: list[list[int]] = [[] for _ in requests]

    def masked(self, logits_BV: Tensor, rows: Tensor) -> Tensor:
        """The logits of the live rows, minus infinity for what may not follow."""
        bits_BW = np.full((len(rows), self._own.words), ALL)
        for place, row in enumerate(rows.tolist()):
            walk = self._walks[row]
            if walk is not None:
                walk.allowed_into(bits_BW[place])
        packed = torch.from_numpy(bits_BW).to(logits_BV.device)
        return logits_BV.masked_fill(~unpacked(packed, logits_BV.shape[1]), -torch.inf)

    def advance(
        self, next_B: Tensor, rows: Tensor, done: Tensor, at_B: Tensor | None = None
    ) -> tuple[Tensor, list[list[int]]]:
        """Take the rows' next tokens.

        Args:
            done: The rows that are over, those that ended with this token included.
            at_B: Where these tokens are in their rows' answers, to take what is forced behind them
                too; without it, that is left for the calls to come.

        Returns:
            The rows whose rest is forced, to the end, and has been written down; and the tokens
            that were taken behind those of the other rows, none of them beyond its row's limit.
        """
        closed = [False] * len(rows)
        runs: list[list[int]] = [[] for _ in closed]
        at = at_B.tolist() if at_B is not None else []
        taken = zip(rows.tolist(), next_B.tolist(), done.tolist(), strict=True)
        for place, (row, token, over) in enumerate(taken):
            walk = self._walks[row]
            if walk is None or over:
                continue
            walk.advance(token)
            rest = walk.to_the_end()
            if rest is None and at:
                run = walk.begin()
                if walk.ended:
                    rest = run
                else:
                    runs[place] = run[: self._limits[row] - at[place] - 1]
            if rest is not None:
                self._tails[row] = rest
                closed[place] = True
        return torch.tensor(closed, device=done.device), runs

    def complete(
        self, ids: list[list[int]], logprobs: list[list[float]], stopped: list[bool]
    ) -> None:
        """Put the forced beginnings and ends to the completions of all rows."""
        for row, (begun, tail) in enumerate(zip(self._begun, self._tails, strict=True)):
            room = self._limits[row] - len(ids[row])
            stopped[row] = stopped[row] or (bool(tail) and len(tail) <= room)
            ids[row] = [*begun, *ids[row], *tail[:room]]
            logprobs[row] = [0.0] * len(begun) + logprobs[row] + [0.0] * len(tail[:room])
