"""Common beginnings are found, read once, and change nothing but rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SHAPE, make_tokenizer
from training_rows import prompts_of, sliding
from transformers import (
    MptConfig,
    MptForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

import fst_dspy.model.generate as generate_module
import fst_dspy.model.prefixes as prefixes_module
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.model.divergence import kl_to_base, token_entropy
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import can_continue, find_bins, find_prefixes
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import Call, TrainingRow

pytestmark = pytest.mark.insides

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=12)


@given(PROMPTS)
def test_every_prompt_goes_on_from_its_beginning(prompts: list[list[int]]) -> None:
    prefixes = find_prefixes(prompts)
    used = 0
    for number, prompt in enumerate(prompts):
        prefix = prefixes.prefix_ids_P[prefixes.owner_N[number]]
        rest = prefixes.rest(number, prompt)
        assert [*prefix, *rest] == prompt
        assert len(prefix) > 0 and len(rest) > 0
        used += len(rest)
    read = used + sum(map(len, prefixes.prefix_ids_P))
    assert prefixes.saved == sum(map(len, prompts)) - read >= 0


def test_candidates_are_told_apart_and_groups_share_all_but_the_last_token() -> None:
    instructions = [[1] * 50, [1] * 10 + [2] * 60, [3] * 30]
    prompts = [[*text, 7, n, 8, 9] for text in instructions for n in range(4) for _ in range(2)]
    prefixes = find_prefixes(prompts)
    assert sorted(map(len, prefixes.prefix_ids_P)) == [31, 51, 71]
    same = find_prefixes([instructions[0]] * 3)
    assert same.prefix_ids_P == (tuple(instructions[0][:-1]),) and same.saved == 2 * 49


@given(PROMPTS, st.integers(1, 4))
def test_bins_hold_every_row_once_and_its_tokens_in_common_once(
    rows: list[list[int]], most: int
) -> None:
    bins = find_bins(rows, most)
    assert sorted(number for part in bins for number in part.rows) == list(range(len(rows)))
    for part in bins:
        own = [rows[number] for number in part.rows]
        assert len(own) <= most and len({tuple(row[: part.begins]) for row in own}) == 1
        nodes = {tuple(row[:n]) for row in own for n in range(part.begins + 1, len(row) + 1)}
        assert part.tokens == len(nodes)


def test_bins_of_a_branch_that_was_cut_are_filled_up() -> None:
    # A long prompt in common, three rows that go on alike, and others that are read in one go.
    alike = [[*range(100), *range(200, 400), n] for n in range(3)]
    other = [[*range(100), 500 + n, *range(60)] for n in range(20)]
    bins = find_bins([*alike, *other], 30)
    assert [(len(part.rows), part.begins) for part in bins] == [(3, 100), *[(3, 100)] * 6, (2, 100)]
    assert max(part.tokens for part in bins) == 203


def test_an_agents_turns_are_read_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for rollout in range(4):
        history = [*range(10, 30)]
        for turn in range(3):
            completion = tuple(range(40 + rollout, 47 + turn + rollout))
            zeros = (0.0,) * len(completion)
            rows.append(TrainingRow(tuple(history), completion, zeros, rollout - 1.4))
            history += [*completion, 5, 60 + turn, 6]
    nodes = {
        ids[:n]
        for ids in ((*row.prompt_ids_T, *row.completion_ids_T)[:-1] for row in rows)
        for n in range(1, len(ids) + 1)
    }
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 10**9)
    whole = gradient_of(tiny_llama, rows, [])
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 1)
    for size, least in ((640, len(nodes)), (30, len(nodes) + 1)):
        monkeypatch.setattr(prefixes_module, "BIN_TOKENS", size)
        read: list[int] = []
        parts = gradient_of(tiny_llama, rows, read)
        assert (parts - whole).norm() < 1e-5 * whole.norm()
        assert least <= sum(read) <= 2 * len(nodes) and (size < 640 or sum(read) == least)


def gradient_of(path: Path, rows: list[TrainingRow], read: list[int]) -> torch.Tensor:
    """The gradient of a step on some rows; how many tokens each pass has read is written down."""
    policy, caught = Policy.load(path), []
    trainer = SlowTrainer(policy, SlowConfig(max_grad_norm=0), SamplingConfig(), 10, 0)
    trainer._trl.optimizer.optimizer.register_step_pre_hook(
        lambda *_: caught.extend(p.grad.flatten().clone() for p in trainer._trl.parameters)
    )
    policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].numel())
    )
    trainer.advance(rows)
    return torch.cat(caught)


@pytest.mark.parametrize("lora", [False, True])
def test_generation_is_that_of_whole_prompts(
    tiny_model: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_model)
    if lora:
        policy.add_lora(LoraConfig(rank=2), seed=0)
        policy.load_trainable_state({k: v + 0.02 for k, v in policy.trainable_state().items()})
    requests = [
        GenerationRequest(prompt, 16, temperature, seed=number)
        for number, prompt in enumerate(prompts_of(policy) * 2)
        for temperature in (0.0, 1.0)
    ]
    whole = generate(policy, requests)
    read: list[int] = []
    handle = policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: read.append(inputs[0].numel())
    )
    for share_tokens in (1, 10**9):  # with shared caches, and with copies
        read.clear()
        monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 1)
        monkeypatch.setattr(generate_module, "SHARE_TOKENS", share_tokens)
        parts = generate(policy, requests)
        assert [r.completion_ids_T for r in parts] == [r.completion_ids_T for r in whole]
        for one, other in zip(parts, whole, strict=True):
            assert one.logprobs_T == pytest.approx(other.logprobs_T, abs=1e-4)
        if can_continue(policy.model):
            assert sum(read[:2]) < sum(map(len, prompts_of(policy)))
    handle.remove()


def rows_of(policy: Policy) -> list[TrainingRow]:
    rows = []
    for number, prompt in enumerate(prompts_of(policy) * 2):
        completion = tuple(range(20, 23 + number))
        zeros = (0.0,) * len(completion)
        rows.append(TrainingRow(prompt, completion, zeros, (number % 5) - 1.9))
    return rows


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradients_are_those_of_whole_prompts(
    tiny_model: Path, lora: LoraConfig | None, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def gradient(saved_tokens: int) -> tuple[torch.Tensor, float]:
        monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", saved_tokens)
        policy = Policy.load(tiny_model)
        if lora is not None:
            policy.add_lora(lora, seed=0)
            policy.load_trainable_state({k: v + 0.02 for k, v in policy.trainable_state().items()})
        slow = SlowConfig(max_grad_norm=0, beta=beta, micro_batch_size=5, entropy_coef=0.1)
        trainer, caught = SlowTrainer(policy, slow, SamplingConfig(), 10, 0), []
        trainer._trl.optimizer.optimizer.register_step_pre_hook(
            lambda *_: caught.extend(p.grad.flatten().clone() for p in trainer._trl.parameters)
        )
        read.clear()
        policy.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0].numel())
        )
        stats = trainer.advance(rows_of(policy))
        return torch.cat(caught), stats.entropy

    whole, entropy = gradient(10**9)
    tokens = sum(read)
    parts, same_entropy = gradient(1)
    assert whole.norm() > 0
    assert (parts - whole).norm() < 1e-5 * whole.norm()
    assert same_entropy == pytest.approx(entropy, rel=1e-5)
    if can_continue(Policy.load(tiny_model).model):
        assert sum(read) < tokens


def test_kl_and_entropy_are_those_of_whole_prompts(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_model)
    policy.load_trainable_state({k: v + 0.02 for k, v in policy.trainable_state().items()})
    calls = [
        Call("p", row.prompt_ids_T, row.completion_ids_T, row.logprobs_T, "", "stop", temperature)
        for row, temperature in zip(rows_of(policy), [0.0, 0.7, 1.0, 1.3] * 4, strict=False)
    ]
    kl, entropy = kl_to_base(policy, calls), token_entropy(policy, calls)
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 1)
    assert kl > 1e-4
    assert kl_to_base(policy, calls) == pytest.approx(kl, rel=1e-4)
    assert token_entropy(policy, calls) == pytest.approx(entropy, rel=1e-5)


def test_a_model_that_counts_padding_in_reads_whole_prompts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=len(tokenizer))
    MptForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    common = tuple(range(5, 125))
    requests = [GenerationRequest((*common, *range(5, n)), 6, seed=n) for n in range(10, 50, 4)]
    for request, result in zip(requests, generate(policy, requests), strict=True):
        ids_1T = torch.tensor([[*request.prompt_ids_T, *result.completion_ids_T]])
        logprob_TV = policy.model(ids_1T).logits[0].log_softmax(-1)[len(request.prompt_ids_T) - 1 :]
        expected = [logprob_TV[n, token].item() for n, token in enumerate(result.completion_ids_T)]
        assert result.logprobs_T == pytest.approx(expected, abs=1e-4)


def test_dropout_and_checkpointing_train_on_whole_prompts(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def continues(policy: Policy) -> bool:
        return SlowTrainer(policy, SlowConfig(), SamplingConfig(), 10, 0)._trl.continues

    policy = Policy.load(tiny_llama)
    assert continues(policy)
    requests = [GenerationRequest(prompt, 5, 0.0) for prompt in prompts_of(policy)]
    before = generate(policy, requests)
    policy.model.gradient_checkpointing_enable()
    assert not continues(policy)
    # Generation, which keeps nothing for a gradient, reads common beginnings once all the same.
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 1)
    assert can_continue(policy.model)
    after = generate(policy, requests)
    assert [r.completion_ids_T for r in after] == [r.completion_ids_T for r in before]
    policy = Policy.load(tiny_llama)
    policy.add_lora(LoraConfig(dropout=0.1), seed=0)
    assert not continues(policy)


def recurrent(tokenizer: Any) -> torch.nn.Module:
    """Gated delta rule and attention in turn, as in Qwen3.5."""
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    linear = dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2)
    linear |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 8)
    config = Qwen3_5TextConfig(
        **shape,
        **linear,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    return Qwen3_5ForCausalLM(config)


@pytest.mark.parametrize("make", [sliding, recurrent])
def test_other_models_read_prompts_whole_and_say_so_once(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    prompts = prompts_of(policy)
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 1)
    for _ in range(2):
        results = generate(policy, [GenerationRequest(prompt, 8, 0.0) for prompt in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt + result.completion_ids_T])
        with torch.no_grad():
            logprobs_TV = policy.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert logprobs_TV.argmax(-1).tolist() == list(result.completion_ids_T)
        assert result.logprobs_T == pytest.approx(logprobs_TV.amax(-1).tolist(), abs=1e-4)
    stats = SlowTrainer(policy, SlowConfig(), SamplingConfig(), 10, 0).advance(rows_of(policy))
    assert stats.grad_norm > 0 and stats.skipped is None
    kl_to_base(policy, [Call("p", prompts[0], (20, 21), (0.0, 0.0), "", "stop", 1.0)] * 2)
    told = [record for record in caplog.records if "read whole" in record.message]
    assert len(told) == 1 and type(policy.model.base_model).__name__ in told[0].message


def test_models_that_share_say_nothing(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert can_continue(Policy.load(tiny_model).model)
    assert not caplog.records
