"""What the embedded model can do: accuracy with the bare and with the ideal prompt.

The questions go through DSPy's adapters, rendered and parsed, at temperature 1; where none is
named, through ``ChatAdapter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import dspy
import torch
from dspy.utils.exceptions import AdapterParseError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fst_dspy.embedded.corpus.base import Family, Question

MAX_NEW_TOKENS = 64
BATCH = 64


@dataclass(frozen=True)
class Score:
    """Shares (0 to 1) of answers that are right, and that the adapter could parse."""

    accuracy: float
    parsed: float


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Any], seed: int
) -> list[str]:
    """One completion a chat, sampled at temperature 1."""
    texts: list[str] = []
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(chats), BATCH):
            encoded: Any = tokenizer.apply_chat_template(
                list(chats[start : start + BATCH]),
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            )
            ids_BT = model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            new_BT = ids_BT[:, encoded["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new_BT, skip_special_tokens=True)
    return texts


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    ideal: bool,
    seed: int,
    adapter: dspy.Adapter | None = None,
) -> Score:
    """The model's score on ``questions``, under their ideal or their bare instructions."""
    adapter = adapter or dspy.ChatAdapter()
    signatures = [
        q.signature.with_instructions(q.ideal_instructions) if ideal else q.signature
        for q in questions
    ]
    chats = [
        adapter.format(signature, [], q.inputs)
        for signature, q in zip(signatures, questions, strict=True)
    ]
    right = parsed = 0
    for q, signature, text in zip(
        questions, signatures, sample(model, tokenizer, chats, seed), strict=True
    ):
        try:
            fields = adapter.parse(signature, text)
        except AdapterParseError:
            continue
        parsed += 1
        right += fields[q.field].strip() == q.answer
    return Score(right / len(questions), parsed / len(questions))


def family_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    families: Sequence[Family],
    count: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """For each family: scores with the bare and the ideal prompt on ``count`` questions.

    ``"ideal_unseen_words"`` is the ideal prompt's score on words that the corpus does not hold,
    ``"ideal_xml"`` and ``"ideal_json"`` the ideal prompt's through these adapters.
    """
    figures = {}
    for family in families:
        questions = family.questions(Random(f"figures {seed}"), count)
        unseen = family.questions(Random(f"figures {seed}"), count, unseen=True)
        asked = {
            "bare": score(model, tokenizer, questions, False, seed),
            "ideal": score(model, tokenizer, questions, True, seed),
            "ideal_unseen_words": score(model, tokenizer, unseen, True, seed),
            "ideal_xml": score(model, tokenizer, questions, True, seed, dspy.XMLAdapter()),
            "ideal_json": score(model, tokenizer, questions, True, seed, dspy.JSONAdapter()),
        }
        figures[family.name] = {
            "questions": count,
            **{prompt: asdict(found) for prompt, found in asked.items()},
        }
    return figures
