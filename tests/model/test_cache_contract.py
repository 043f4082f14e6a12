"""The insides of transformers' caches that are relied upon, and what happens without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import fst_dspy.model.cache_layers as layers_module
from fst_dspy.model.cache_layers import obstacle
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import can_continue
from fst_dspy.model.prompt_cache import RoomyLayer, can_share

pytestmark = pytest.mark.insides

PROMPTS = [(7,) * 400 + (n, 8) for n in (1, 2, 3)]
"""Alike for long enough that beginnings are worth it, and rows share their prompts."""

REQUESTS = [GenerationRequest(prompt, 6, seed=n) for n, prompt in enumerate(PROMPTS * 2)]


@pytest.fixture(autouse=True)
def _as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "_found", [])


def test_the_transformers_at_hand_keeps_its_caches_as_listed() -> None:
    assert layers_module._missing() is None
    assert obstacle() is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [("update", "DynamicLayer"), ("reorder_cache", "DynamicLayer")],
)
def test_what_is_missing_is_named(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(self: object, *args: object, **kwargs: object) -> None:
        raise AttributeError(f"no {name} any more")

    monkeypatch.setattr(DynamicLayer, name, gone)
    layers_module._missing.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert kind in (obstacle() or "") and f"no {name} any more" in (obstacle() or "")
    finally:
        layers_module._missing.cache_clear()
    assert sum("slower, and the same tokens" in r.getMessage() for r in caplog.records) == 1


def test_without_the_insides_the_tokens_are_the_same(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.load(tiny_model)
    expected = generate(policy, REQUESTS)
    layers_module.refuse("as a test")
    assert not can_share(policy.model) and not can_continue(policy.model)
    found = generate(policy, REQUESTS)
    assert [r.completion_ids_T for r in found] == [r.completion_ids_T for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(
            torch.tensor(one.logprobs_T), torch.tensor(other.logprobs_T), atol=1e-4
        )


def test_a_change_in_the_middle_of_a_call_is_survived_and_told(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.load(tiny_qwen3)
    requests = [GenerationRequest((5, 6, 7), 4, seed=n) for n in range(3)]
    expected = generate(policy, requests)

    def changed(self: object, *args: object, **kwargs: object) -> None:
        raise AttributeError("'DynamicLayer' object has no attribute 'dtype'")

    monkeypatch.setattr(RoomyLayer, "update", changed)
    with caplog.at_level(logging.WARNING):
        found = generate(policy, requests)
    assert [r.completion_ids_T for r in found] == [r.completion_ids_T for r in expected]
    assert "no attribute 'dtype'" in (obstacle() or "")
    assert any("slower, and the same tokens" in r.getMessage() for r in caplog.records)


def test_an_error_that_is_not_the_caches_is_raised(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_qwen3)

    def broken(*args: object, **kwargs: object) -> None:
        raise TypeError("the model's own fault")

    monkeypatch.setattr(policy.model, "forward", broken)
    with pytest.raises(TypeError, match="own fault"):
        generate(policy, [GenerationRequest((5, 6, 7), 4)])
    assert obstacle() is None
