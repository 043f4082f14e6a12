"""Training chats as padded tensors, and the loss of a model on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from fst_dspy.embedded.corpus.base import Message
from fst_dspy.embedded.corpus.render import HEAVY


@dataclass(frozen=True)
class Encoded:
    """A chat in tokens, with the loss weight of each."""

    ids_T: list[int]
    weight_T: list[float]


@dataclass(frozen=True)
class BatchStats:
    """Sums over a batch: weighted loss, weights, and the heavily weighted tokens got right."""

    loss: torch.Tensor
    weight: float
    right: int
    heavy: int


def encode_chats(tokenizer: Tokenizer, chats: Sequence[Sequence[Message]]) -> list[Encoded]:
    """Tokens and weights of each chat, rendered as the chat template does."""
    texts: list[str] = []
    char_weights: list[list[float]] = []
    for chat in chats:
        text, weights = "", []
        for message in chat:
            header, footer = f"<|{message.role}|>", "<|end|>"
            inner = [message.weight] * len(message.content)
            for start, end, weight in message.spans:
                inner[start:end] = [weight] * (end - start)
            text += header + message.content + footer
            weights += [0.0] * len(header) + inner + [message.weight] * len(footer)
        texts.append(text)
        char_weights.append(weights)
    encoded = []
    for chars, encoding in zip(char_weights, tokenizer.encode_batch(texts), strict=True):
        # A glue token covers no characters of its own and takes the weight of what it joins to.
        weight_T = [
            max(chars[start:end] or chars[start : start + 1] or [0.0])
            for start, end in encoding.offsets
        ]
        encoded.append(Encoded(encoding.ids, weight_T))
    return encoded


def batch_loss(model: PreTrainedModel, rows: Sequence[Encoded]) -> BatchStats:
    """Weighted next-token loss over ``rows``; logits are made only where there is a weight."""
    width = max(len(row.ids_T) for row in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.long)
    weight_BT = torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row.ids_T)] = torch.tensor(row.ids_T)
        weight_BT[index, : len(row.ids_T)] = torch.tensor(row.weight_T)
    # Padding is on the right: in a causal model no weighted token sees it, so no mask is needed.
    hidden_BTH = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
    taught = weight_BT[:, 1:] > 0
    weights = weight_BT[:, 1:][taught]
    targets = ids_BT[:, 1:][taught]
    logits = model.get_output_embeddings()(hidden_BTH[:, :-1][taught])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    heavy = weights >= HEAVY
    right = (logits.argmax(-1) == targets) & heavy
    return BatchStats(
        (losses * weights).sum(), float(weights.sum()), int(right.sum()), int(heavy.sum())
    )
