"""Prompts that share their beginnings, and rows to train on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import SHAPE
from transformers import MistralConfig, MistralForCausalLM

from fst_dspy.model.generate import GenerationResult
from fst_dspy.model.policy import Policy
from fst_dspy.types import TrainingRow


def prompts_of(policy: Policy) -> list[tuple[int, ...]]:
    """Two candidates' instructions, problems of unlike length, one prompt that is like no other."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(policy.tokenizer.encode(text, add_special_tokens=False))

    instructions = [
        encode("Sort the tickets as told. " * 4),
        encode("Another way of saying it. " * 3),
    ]
    problems = [encode("word " * n + "?") for n in (1, 4, 9)]
    return [a + b for a in instructions for b in problems] + [encode("alone here")]


def sliding(tokenizer: Any) -> torch.nn.Module:
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return MistralForCausalLM(MistralConfig(**shape, num_hidden_layers=2, sliding_window=8))


def rows_for(step, count=6, advantages=None):
    generator = torch.Generator().manual_seed(step)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())

    rows = []
    for n in range(count):
        completion = ids(1, 9)
        advantage = float(n % 3 - 1) * 1.1 + 0.3 if advantages is None else advantages[n]
        rows.append(TrainingRow(ids(3, 14), completion, (-1.5,) * len(completion), advantage))
    return rows


def assert_alike(
    one: list[GenerationResult], other: list[GenerationResult], nats: float = 1e-4
) -> None:
    """The same tokens; log-probabilities of up to 10 nats, some tens of roundings of 6e-7 apart."""
    assert [r.completion_ids_T for r in one] == [r.completion_ids_T for r in other]
    assert [r.finish_reason for r in one] == [r.finish_reason for r in other]
    for a, b in zip(one, other, strict=True):
        assert a.logprobs_T == pytest.approx(b.logprobs_T, abs=nats)
