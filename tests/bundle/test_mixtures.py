"""Mixtures of experts: one weight holds all experts of a layer, and so does one adapter."""

from __future__ import annotations

import pytest
import torch
from bundles import adapted, answers
from helpers import Echo
from tiny_models import make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fst_dspy
from fst_dspy import LocalLM
from fst_dspy.config import LoraConfig

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
}
KINDS = {
    "qwen3": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
}


@pytest.fixture(params=KINDS)
def mixture(request, tmp_path):
    model, config, own = KINDS[request.param]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {**SHAPE, **own, "vocab_size": len(tokenizer), "bos_token_id": None, **ends}
    model(config(**sizes)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_adapters_of_a_mixture_are_saved_and_loaded(mixture, tmp_path):
    program = adapted(mixture)
    policy = program.say.lm.policy
    ranks = {s[0] for n, s in policy.adapter_shapes(policy.lora).items() if "lora_A" in n}
    assert ranks > {4}  # the experts' is as many times that as there are experts
    made = {name: tuple(t.shape) for name, t in policy.trainable_state().items()}
    assert policy.adapter_shapes(policy.lora) == made
    fst_dspy.save(program, tmp_path / "bundle")
    loaded = fst_dspy.load(tmp_path / "bundle", Echo(), base=mixture)
    assert loaded.say.lm.model == program.say.lm.model
    assert answers(loaded, 5) == answers(program, 5)


def test_a_mixture_is_exported_merged(mixture, tmp_path):
    program = adapted(mixture)
    policy = program.say.lm.policy
    folder = fst_dspy.export(program, tmp_path / "out")
    ids = torch.arange(3, 43).reshape(2, 20)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found, expected = merged(ids).logits, policy.model(ids).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_full_weights_of_a_mixture_are_saved_and_loaded(mixture, tmp_path):
    lm = LocalLM(str(mixture), temperature=0.0, max_tokens=8, cache=False)
    with torch.no_grad():
        for weight in lm.policy.model.parameters():
            weight.mul_(1.1)
    program = Echo()
    program.say.lm = lm.at(lm.policy.keep())
    fst_dspy.save(program, tmp_path / "bundle")
    loaded = fst_dspy.load(tmp_path / "bundle", Echo())
    assert loaded.say.lm.model == program.say.lm.model
    assert answers(loaded, 3) == answers(program, 3)


def test_shapes_take_no_memory_and_no_random_numbers(mixture):
    policy = LocalLM(str(mixture)).policy
    before = torch.get_rng_state()
    shapes = policy.adapter_shapes(LoraConfig(rank=2**16))
    assert max(s[0] for s in shapes.values()) > 2**16 and policy.lora is None
    assert torch.equal(before, torch.get_rng_state())
