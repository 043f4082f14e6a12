"""Chats that share a prompt as one row of tokens: what they have in common is read once.

Behind the prompt's tokens lie its branches, one after another. Each token sees the prompt and its
own branch up to itself, and has the position that it would have in a chat of its own; so the
logits are those of separate chats. No token is padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fst_dspy.smollm2.corpus.render import Message, Tree

STEM = 0
"""The number of the tokens that all branches share; the branches count from 1."""


@dataclass(frozen=True)
class Row:
    """A tree in tokens.

    Attributes:
        ids_T, position_T: Tokens and their positions in their own chats.
        branch_T: The branch of each; ``STEM`` for those of the prompt.
        taught_T: Whether a token is an answer's: it is predicted from the one before it.
    """

    ids_T: Tensor
    position_T: Tensor
    branch_T: Tensor
    taught_T: Tensor

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each token sees: 0, and minus infinity elsewhere; shape (1, 1, T, T)."""
        own_TT = self.branch_T[:, None] == self.branch_T[None, :]
        seen_TT = (own_TT | (self.branch_T == STEM)[None, :]).tril()
        hidden = torch.finfo(dtype).min
        return torch.where(seen_TT, 0.0, hidden).to(dtype)[None, None]


def encode(tokenizer: Any, tree: Tree, limit: int) -> Row:
    """The tokens of a tree, in the format of SmolLM2's chat template.

    Args:
        tokenizer: SmolLM2's.
        tree: One or more branches.
        limit: Branches that would make the row longer than this are left out, but for the first.
    """
    ids, taught = _encode(tokenizer, tree.stem)
    positions, branches = list(range(len(ids))), [STEM] * len(ids)
    stem = len(ids)
    for number, branch in enumerate(tree.branches, start=1):
        more, more_taught = _encode(tokenizer, branch)
        if number > 1 and len(ids) + len(more) > limit:
            break
        ids += more
        taught += more_taught
        positions += range(stem, stem + len(more))
        branches += [number] * len(more)
    return Row(
        torch.tensor(ids), torch.tensor(positions), torch.tensor(branches), torch.tensor(taught)
    )


def _encode(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    taught: list[bool] = []
    end = tokenizer.eos_token
    for message in messages:
        # Header and content apart, as they are when the model answers.
        parts = (
            (f"<|im_start|>{message.role}\n", False),
            (f"{message.content}{end}", message.taught),
            ("\n", False),
        )
        for text, learn in parts:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            taught += [learn] * len(found)
    return ids, taught


def answer_losses(model: Any, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the taught tokens of a row, whether each was the likeliest, and their branches.

    Logits are made where a token is taught, and nowhere else.

    Args:
        model: A causal language model, with adapters or without.
        row: One tree.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_TH = inner.get_decoder()(
        input_ids=row.ids_T[None],
        position_ids=row.position_T[None],
        attention_mask=row.mask(inner.dtype),
        use_cache=False,
    ).last_hidden_state[0]
    places = row.taught_T.nonzero()[:, 0]
    # An answer begins in a branch or stem behind a header, so what predicts it lies just before.
    logits = inner.get_output_embeddings()(hidden_TH[places - 1].to(inner.dtype)).float()
    targets = row.ids_T[places]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses, logits.detach().argmax(-1) == targets, row.branch_T[places]
