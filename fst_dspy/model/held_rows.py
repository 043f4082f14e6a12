"""The rows of a batch that are held to grammars: masks for their logits, and what costs no pass.

The masks are made on the CPU and put over the logits after the model's step, whichever way of
decoding has made these. A row that can only go on in one way to its end is at its end: the rest is
written down, and the model is not asked for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fst_dspy.model.grammar import ALL, Walk, unpacked, vocabulary
from fst_dspy.model.policy import Policy


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
        self._share = torch.zeros(len(requests), dtype=torch.float64, device=policy.device)
        self._asked = torch.zeros(len(requests), dtype=torch.long, device=policy.device)
        self._over = torch.zeros(len(requests), dtype=torch.bool, device=policy.device)

    def masked(self, logits_BV: Tensor, rows: Tensor) -> Tensor:
        """The logits of the live rows, minus infinity for what may not follow."""
        bits_BW = np.full((len(rows), self._own.words), ALL)
        held = []
        for place, row in enumerate(rows.tolist()):
            walk = self._walks[row]
            held.append(walk is not None)
            if walk is not None:
                walk.allowed_into(bits_BW[place])
        packed = torch.from_numpy(bits_BW).to(logits_BV.device)
        allowed_BV = unpacked(packed, logits_BV.shape[1])
        masked_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
        # How much of the model's own distribution is left of it, of rows that are not over.
        live_B = torch.tensor(held, device=rows.device) & ~self._over[rows]
        share_B = masked_BV.logsumexp(-1).double() - logits_BV.logsumexp(-1).double()
        self._share[rows] += share_B.clamp(max=0).masked_fill(~live_B, 0)
        self._asked[rows] += live_B.long()
        return masked_BV

    def advance(self, next_B: Tensor, rows: Tensor, done: Tensor) -> Tensor:
        """Take the rows' next tokens.

        Args:
            done: The rows that are over, those that ended with this token included.

        Returns:
            The rows whose rest is forced, to the end, and has been written down.
        """
        closed = [False] * len(rows)
        taken = zip(rows.tolist(), next_B.tolist(), done.tolist(), strict=True)
        for place, (row, token, over) in enumerate(taken):
            walk = self._walks[row]
            if walk is None or over:
                continue
            walk.advance(token)
            rest = walk.to_the_end()
            if rest is not None:
                self._tails[row] = rest
                closed[place] = True
        ended = torch.tensor(closed, device=done.device)
        self._over[rows] |= done | ended
        return ended

    def completed(
        self, ids: list[list[int]], logprobs: list[list[float]], stopped: list[bool]
    ) -> list[float | None]:
        """Put the forced beginnings and ends to the completions of all rows.

        Returns:
            ``GenerationResult.allowed_logprob`` of each.
        """
        for row, (begun, tail) in enumerate(zip(self._begun, self._tails, strict=True)):
            room = self._limits[row] - len(ids[row])
            stopped[row] = stopped[row] or (bool(tail) and len(tail) <= room)
            ids[row] = [*begun, *ids[row], *tail[:room]]
            logprobs[row] = [0.0] * len(begun) + logprobs[row] + [0.0] * len(tail[:room])
        asked = zip(self._walks, self._share.tolist(), self._asked.tolist(), strict=True)
        return [share / n if walk is not None and n else None for walk, share, n in asked]
