"""What a model takes of memory: counts against the real thing, and batches that keep to them."""

from pathlib import Path

import pytest
import torch
from chat_families import save_family
from model_sizes import QWEN
from transformers import Qwen3Config

from fst_dspy.model import sizes
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.sizes import (
    DecodingRoom,
    cache_bytes,
    described,
    parameter_bytes,
    parameter_count,
    power_of_two,
    training_tokens,
)


def test_a_model_is_counted_from_its_configuration_alone(tmp_path: Path) -> None:
    Qwen3Config(**QWEN).save_pretrained(tmp_path)
    model = described(tmp_path)
    assert parameter_count(model) == 596_049_920  # as Qwen3-0.6B has
    assert all(weight.is_meta for weight in model.parameters())


def test_the_cache_of_a_token_is_what_the_cache_holds(tiny_model: Path) -> None:
    model = Policy.load(tiny_model, device="cpu").model
    with torch.no_grad():
        cache = model(torch.arange(3, 23)[None], use_cache=True).past_key_values
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )
    # Short convolutions keep less, and are counted as attention.
    assert held <= 20 * cache_bytes(model.config, 4)
    if all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers):
        assert held == 20 * cache_bytes(model.config, 4)


def test_the_cache_of_layers_with_heads_of_their_own_is_counted(tmp_path: Path) -> None:
    model = Policy.load(save_family(tmp_path, "gemma4"), device="cpu").model
    with torch.no_grad():
        cache = model(torch.arange(3, 23)[None], use_cache=True).past_key_values
    assert len({layer.keys.shape[-1] for layer in cache.layers}) == 2
    held = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
    assert held == 20 * cache_bytes(model.config, 4)


def test_micro_batches_keep_to_half_of_the_free_memory() -> None:
    config = Qwen3Config(**QWEN)
    assert training_tokens(config, 2, 2**33, 2**30) == 1024  # 3.5 MiB a token in 4 GiB
    assert training_tokens(config, 2, 2**37, 2**30) == 2**14
    assert training_tokens(config, 2, 2**37, 5000) == 5000
    assert training_tokens(config, 2, 2**20, 5000) == sizes.LEAST_TOKENS
    # What else runs for a while decides nothing.
    assert training_tokens(config, 2, 2**37 + 10**9, 2**30) == 2**14


def test_powers_of_two() -> None:
    assert [power_of_two(n) for n in (-1, 0, 1, 2, 3, 1023, 1024)] == [0, 0, 1, 2, 2, 512, 1024]


def test_decoding_keeps_to_the_memory_that_the_weights_leave(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Policy.load(tiny_qwen3, device="cpu").model
    token = cache_bytes(model.config, 4)
    monkeypatch.setattr(sizes, "LOGIT_BYTES", 0)
    monkeypatch.setattr(sizes, "LEAST_TOKENS", 0)
    monkeypatch.setattr(sizes, "free_memory", lambda device: 2**40)
    total = parameter_bytes(model) + 4 * 2 * 2**10 * token
    monkeypatch.setattr(sizes, "total_memory", lambda device: total)
    assert DecodingRoom(model).holds(1, 2**10)
    assert not DecodingRoom(model).holds(1, 2**10 + 1)
    monkeypatch.setattr(sizes, "free_memory", lambda device: 2**9 * 2 * token)
    assert not DecodingRoom(model).holds(1, 2**9 + 1)
    monkeypatch.setattr(sizes, "LOGIT_BYTES", 10)
    assert DecodingRoom(model).holds(1, 10) and not DecodingRoom(model).holds(1000, 10)


@pytest.mark.parametrize(("shares", "batches"), [(True, 1), (False, 4)])
def test_prompts_that_rows_share_count_once(
    tiny_qwen3: Path, shares: bool, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_qwen3, device="cpu")
    monkeypatch.setattr(sizes, "MAX_CPU_TOKENS", 512)
    monkeypatch.setattr("fst_dspy.model.generate.can_share", lambda model: shares)
    found: list[int] = []
    monkeypatch.setattr(
        "fst_dspy.model.generate._run_chunk",
        lambda policy, chunk: found.append(len(chunk)) or [object()] * len(chunk),
    )
    prompt = tuple(range(3, 243))
    generate(policy, [GenerationRequest(prompt, 4, seed=n) for n in range(8)])
    assert len(found) == batches and sum(found) == 8
