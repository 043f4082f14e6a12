"""The slow channel: what a step does, what it leaves alone, and going on after an interruption."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_equal_but_for_rounding
from records import make_call, make_group, make_rollout
from tiny_models import SHAPE, make_model, make_tokenizer
from training_rows import rows_for
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import fst_dspy.model.prefixes as prefixes_module
import fst_dspy.slow.trainer as slow_module
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import StoreError, TrainingError
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.logprobs import completion_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import is_checkpointing
from fst_dspy.slow.advantage import constant_group_share, group_advantages, group_rows
from fst_dspy.slow.learning_rate import default_learning_rate
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import Call, Group, TrainingRow

SLOW = SlowConfig(learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=2)


def load(folder, lora=None, seed=1):
    policy = Policy.load(folder, device="cpu")
    if lora is not None:
        policy.add_lora(lora, seed)
    return policy


def make(folder, slow=SLOW, **kwargs):
    policy = load(folder, slow.lora)
    return policy, SlowTrainer(policy, slow, SamplingConfig(**kwargs), total_steps=20, seed=0)


def gradients_after(policy, trainer, rows):
    """The gradient of a step, caught before the optimizer drops it."""
    caught = {}

    def catch(*_):
        for name, weight in policy.model.named_parameters():
            if weight.grad is not None:
                caught[name] = weight.grad.clone()

    handle = trainer._trl.optimizer.optimizer.register_step_pre_hook(catch)
    stats = trainer.advance(rows)
    handle.remove()
    return caught, stats


@pytest.mark.parametrize("loss_type", ["cispo", "dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_loss_does_not_depend_on_micro_batches(loss_type, size, tiny_lfm2):
    slow = SlowConfig(loss_type=loss_type, max_grad_norm=0)
    whole, one = gradients_after(*make(tiny_lfm2, slow), rows_for(0, 11))
    cut, many = gradients_after(
        *make(tiny_lfm2, replace(slow, micro_batch_size=size)), rows_for(0, 11)
    )
    assert_equal_but_for_rounding(whole, cut)
    assert many.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-7)
    assert many.entropy == pytest.approx(one.entropy, rel=1e-5)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


@pytest.mark.parametrize("loss_type", ["cispo", "dapo", "grpo", "dr_grpo", "bnpo"])
def test_zero_advantage_rows_count_in_the_normaliser_only(loss_type, tiny_qwen3):
    """Against a row whose advantage is too small to matter, which is run."""
    slow = SlowConfig(loss_type=loss_type, max_grad_norm=0)
    zero = rows_for(0, 6, [1.0, 0.0, -0.5, 0.0, 0.7, 0.0])
    tiny = [replace(row, advantage=row.advantage or 1e-30) for row in zero]
    left_out, _ = gradients_after(*make(tiny_qwen3, slow), zero)
    run, _ = gradients_after(*make(tiny_qwen3, slow), tiny)
    assert_equal_but_for_rounding(left_out, run)


def test_cispo_gradient_is_the_policy_gradient_over_all_tokens(tiny_llama):
    """Against the formula: -sum(advantage * log p) / tokens, at temperature 0.7."""
    policy, trainer = make(tiny_llama, SlowConfig(max_grad_norm=0), temperature=0.7)
    rows = [replace(row, temperature=0.7) for row in rows_for(3, 5)]
    reference = load(tiny_llama).model
    loss, entropies = 0.0, []
    for row in rows:
        ids = torch.tensor(row.prompt_ids_T + row.completion_ids_T)
        logprob_TV = (reference(ids[None]).logits[0] / 0.7).log_softmax(-1)
        logprob_TV = logprob_TV[len(row.prompt_ids_T) - 1 : -1]
        taken_T = logprob_TV[range(len(row.completion_ids_T)), row.completion_ids_T]
        loss = loss - row.advantage * taken_T.sum()
        entropies += (-(logprob_TV.exp() * logprob_TV).sum(-1)).tolist()
    tokens = sum(len(row.completion_ids_T) for row in rows)
    (loss / tokens).backward()
    gradients, stats = gradients_after(policy, trainer, rows)
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    assert_equal_but_for_rounding(gradients, expected, rounding=5e-5)
    assert stats.loss == pytest.approx((loss / tokens).item(), rel=1e-4)
    assert stats.entropy == pytest.approx(sum(entropies) / tokens, rel=1e-4)


def test_a_positive_advantage_raises_the_probability(tiny_lfm2):
    policy, trainer = make(tiny_lfm2, SlowConfig(learning_rate=1e-3))
    row = replace(rows_for(0, 1)[0], advantage=1.0)
    first = trainer.advance([row]).loss
    assert trainer.advance([row]).loss < first
    assert policy.step == 2


@pytest.mark.parametrize("advantages", [[0.0] * 4, []])
def test_constant_step_is_skipped(advantages, tiny_qwen3):
    policy, trainer = make(tiny_qwen3)
    trainer.advance(rows_for(0))
    before, rate = policy.weights_hash(), trainer.advance(rows_for(1)).learning_rate
    before = policy.weights_hash()
    stats = trainer.advance(rows_for(2, len(advantages), advantages))
    assert stats.skipped == "constant" and stats.rows == len(advantages)
    assert policy.weights_hash() == before and policy.step == 2
    assert stats.entropy == (1.5 if advantages else 0.0)  # -log p of every sampled token
    assert rate < stats.learning_rate  # the last of the warm-up


@pytest.mark.parametrize("skipped", [(), (0, 1), (2, 5)])
def test_a_decay_completes_whatever_steps_are_constant(skipped, tiny_qwen3, tmp_path):
    slow = SlowConfig(learning_rate=1e-2, lr_scheduler_type="linear")

    def make_it():
        policy = load(tiny_qwen3)
        return SlowTrainer(policy, slow, SamplingConfig(), total_steps=8, seed=0)

    trainer, rates = make_it(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            if step == 4:  # goes on the same after an interruption
                trainer.state().write(tmp_path)
                trainer = make_it()
                trainer.load(tmp_path)
            advantages = [0.0] * 6 if step in skipped else None
            rates.append(trainer.advance(rows_for(step, 6, advantages)).learning_rate)
    assert rates == pytest.approx([1e-2 * (8 - step) / 8 for step in range(8)])


@pytest.mark.parametrize("advantage", [math.nan, math.inf, 1e38])
def test_non_finite_step_is_dropped(advantage, tiny_qwen3, tmp_path):
    policy, trainer = make(tiny_qwen3)
    other_policy, other = make(tiny_qwen3)
    stats = trainer.advance(rows_for(0, 6, [1.0, advantage, advantage, -1.0, 1.0, 0.5]))
    assert stats.skipped == "non_finite" and policy.step == 0
    assert all(math.isfinite(v) for v in (stats.loss, stats.grad_norm, stats.entropy))
    for step in range(2):
        trainer.advance(rows_for(step))
        other.advance(rows_for(step))
    assert policy.weights_hash() == other_policy.weights_hash()


def test_steps_that_are_not_finite_are_counted_in_a_row(tiny_qwen3, tmp_path):
    bad = rows_for(0, 6, [1.0, math.nan, 0.0, -1.0, 1.0, 0.5])
    _, trainer = make(tiny_qwen3)
    assert trainer.bad_steps == 0
    trainer.advance(bad)
    trainer.advance(rows_for(1, 6, [0.0] * 6))  # shows nothing
    trainer.advance(bad)
    trainer.state().write(tmp_path)
    _, resumed = make(tiny_qwen3)
    resumed.load(tmp_path)
    assert trainer.bad_steps == resumed.bad_steps == 2
    resumed.advance(rows_for(1))
    assert resumed.bad_steps == 0
    path = tmp_path / "trainer.json"
    scalars = json.loads(path.read_text())
    del scalars["bad_steps"]  # as earlier versions wrote it
    path.write_text(json.dumps(scalars))
    trainer.load(tmp_path)
    assert trainer.bad_steps == 0


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.3)])
def test_interrupted_run_gives_the_same_weights(lora, tiny_lfm2, tmp_path):
    slow = replace(SLOW, lora=lora)
    whole_policy, whole = make(tiny_lfm2, slow)
    whole_stats = [whole.advance(rows_for(step)) for step in range(6)]

    _, first = make(tiny_lfm2, slow)
    for step in range(3):
        first.advance(rows_for(step))
    first.state().write(tmp_path)
    torch.manual_seed(99)  # the resumed process has another state of the global generator
    policy, second = make(tiny_lfm2, slow)
    second.load(tmp_path)
    assert policy.step == 3
    stats = [second.advance(rows_for(step)) for step in range(3, 6)]
    assert stats == whole_stats[3:]
    assert policy.weights_hash() == whole_policy.weights_hash()
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_load_before_any_step_and_bad_folders(tiny_qwen3, tiny_llama, tmp_path):
    _, trainer = make(tiny_qwen3)
    trainer.state().write(tmp_path)
    policy, other = make(tiny_qwen3)
    other.load(tmp_path)
    other.advance(rows_for(0))
    trainer.advance(rows_for(0))
    assert policy.weights_hash() == trainer.policy.weights_hash()
    with pytest.raises(StoreError, match="another model"):
        make(tiny_llama)[1].load(tmp_path)
    with pytest.raises(StoreError, match="cannot read"):
        other.load(tmp_path / "absent")
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(StoreError, match="version 99"):
        other.load(tmp_path)


def test_dropout_draws_from_the_trainers_own_stream(tiny_qwen3):
    slow = replace(SLOW, lora=LoraConfig(rank=4, dropout=0.5))
    hashes = set()
    for noise in (1, 2):
        policy, trainer = make(tiny_qwen3, slow)
        for step in range(2):
            torch.manual_seed(noise)
            trainer.advance(rows_for(step))
            assert torch.initial_seed() == noise
        hashes.add(policy.weights_hash())
    other_policy = load(tiny_qwen3, slow.lora)
    other = SlowTrainer(other_policy, slow, SamplingConfig(), total_steps=20, seed=5)
    for step in range(2):
        other.advance(rows_for(step))
    assert len(hashes) == 1 and other_policy.weights_hash() not in hashes


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
def test_beta_pulls_back_to_the_base(lora, tiny_qwen3):
    """The penalty's gradient is 0 at the base; away from it, it brings the weights back."""
    from fst_dspy.model.divergence import kl_to_base

    def drift_after(beta):
        slow = SlowConfig(learning_rate=3e-3, beta=beta, lora=lora)
        policy, trainer = make(tiny_qwen3, slow)
        calls = [
            Call("p", r.prompt_ids_T, r.completion_ids_T, r.logprobs_T, "", "stop", 1.0)
            for r in rows_for(0)
        ]
        for _ in range(8):
            trainer.advance(rows_for(0))
        return kl_to_base(policy, calls)

    assert drift_after(1.0) < 0.7 * drift_after(0.0)


def test_beta_makes_constant_groups_matter(tiny_qwen3):
    policy, trainer = make(tiny_qwen3, SlowConfig(learning_rate=1e-2, beta=0.5))
    first = trainer.advance(rows_for(0))
    assert first.skipped is None
    before = policy.weights_hash()
    assert trainer.advance(rows_for(0, 6, [0.0] * 6)).skipped is None
    assert policy.weights_hash() != before


def test_model_is_left_as_it_was(tiny_qwen3, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    policy = load(tiny_qwen3)
    rng = torch.get_rng_state()
    ids = torch.tensor([[3, 4, 5]])
    logits = policy.model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = SlowTrainer(policy, SLOW, SamplingConfig(), total_steps=4, seed=0)
        assert torch.equal(policy.model(ids).logits, logits)
        trainer.advance(rows_for(0))
    assert "forward" not in policy.model.__dict__
    assert not policy.model.training
    assert all(weight.grad is None for weight in policy.model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_bad_use_is_refused(tiny_qwen3):
    policy, trainer = make(tiny_qwen3)
    with pytest.raises(TrainingError, match="no completion"):
        trainer.advance([TrainingRow((3,), (), (), 1.0)])
    policy.add_lora(LoraConfig(rank=2), seed=0)
    with pytest.raises(TrainingError, match="adapters"):
        trainer.advance(rows_for(0))


def group_of(rewards, calls=(1,)):
    return make_group(rewards, calls=tuple(map(make_call, calls)))


def test_rows_carry_their_rollouts_advantage():
    rows = group_rows([group_of([0.0, 1.0], calls=(2, 0, 3))], "group")
    assert [len(row.completion_ids_T) for row in rows] == [2, 3, 2, 3]
    assert [row.advantage for row in rows] == pytest.approx([-0.70701] * 2 + [0.70701] * 2, 1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_constant_groups_have_advantage_exactly_zero(scale):
    groups = [group_of([0.1] * 7), group_of([0.3, 0.1, 0.2])]
    rows = group_rows(groups, scale)
    assert [row.advantage for row in rows[:7]] == [0.0] * 7
    assert sum(row.advantage for row in rows[7:]) == pytest.approx(0, abs=1e-6)
    assert rows[7].advantage > 0
    assert constant_group_share(groups) == 0.5


def test_groups_without_spread():
    assert group_advantages(group_of([0.5])) == [0.0]
    assert constant_group_share([]) == 0.0
    for scale in ("group", "batch", "none"):
        assert group_rows([], scale) == []
        assert group_rows([group_of([0.5])], scale)[0].advantage == 0.0


def test_saved_files_need_no_pickle(tiny_qwen3, tmp_path: Path):
    _, trainer = make(tiny_qwen3)
    trainer.advance(rows_for(0))
    trainer.state().write(tmp_path)
    assert all(path.read_bytes()[:2] != b"\x80\x04" for path in tmp_path.iterdir())


def sampled_rows(policy, count=6, temperatures=(1.0,)):
    """Rows of unlike lengths, the temperatures in turn."""
    requests = [
        GenerationRequest((5, *range(6, 8 + n)), 8, temperatures[n % len(temperatures)], seed=n)
        for n in range(count)
    ]
    return [
        TrainingRow(r.prompt_ids_T, g.completion_ids_T, g.logprobs_T, (-1.0) ** n, r.temperature)
        for n, (r, g) in enumerate(zip(requests, generate(policy, requests), strict=True))
    ]


@pytest.mark.parametrize("temperatures", [(0.3,), (0.3, 1.0, 0.7)])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_each_row_is_trained_on_at_its_own_temperature(temperatures, lora, beta, tiny_qwen3):
    """Whatever the configured one is; the gradient is the sum over the temperatures'."""
    slow = SlowConfig(max_grad_norm=0, lora=lora, beta=beta)
    policy, trainer = make(tiny_qwen3, slow)
    rows = sampled_rows(policy, 9, temperatures)
    found, stats = gradients_after(policy, trainer, rows)
    assert 0 < stats.drift < 1e-5
    expected, count = {}, sum(len(row.completion_ids_T) for row in rows)
    for temperature in temperatures:
        part = [row for row in rows if row.temperature == temperature]
        policy, trainer = make(tiny_qwen3, slow, temperature=temperature)
        tokens = sum(len(row.completion_ids_T) for row in part)
        for name, gradient in gradients_after(policy, trainer, part)[0].items():
            expected[name] = expected.get(name, 0) + gradient * tokens / count
    assert_equal_but_for_rounding(found, expected)


def test_greedy_calls_count_in_the_advantages_and_are_not_trained_on(tiny_qwen3):
    calls = [replace(make_call(2), temperature=t) for t in (0.7, 0.0, 0.7)]
    rollouts = [
        make_rollout(reward, calls=(call,))
        for call, reward in zip(calls, (0.0, 1.0, 0.5), strict=True)
    ]
    group = Group("e", tuple(rollouts))
    rows = group_rows([group], "group")
    advantages = group_advantages(group)
    assert [row.advantage for row in rows] == [advantages[0], advantages[2]]
    assert [row.temperature for row in rows] == [0.7, 0.7]
    with pytest.raises(TrainingError, match="greedy"):
        make(tiny_qwen3)[1].advance([replace(rows[0], temperature=0.0)])


def small_gpt2(tokenizer):
    """With dropout in its configuration, as OPT, that sampling does not have."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=512,
            initializer_range=0.4,
        )
    )  # fmt: skip


def small_opt(tokenizer):
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
            init_std=0.4,
        )
    )  # fmt: skip


def small_llama(tokenizer):
    return make_model("llama", tokenizer)


@pytest.mark.parametrize("make_small", [small_gpt2, small_opt, small_llama])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
@pytest.mark.parametrize("saved_tokens", [1, 10**9])
def test_tokens_have_the_positions_that_they_were_sampled_at(
    make_small, lora, saved_tokens, tmp_path, monkeypatch
):
    """In training, KL and distillation, with common beginnings read once and without."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_small(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load(tmp_path, lora)
    if lora is not None:  # fresh adapters add nothing
        policy.load_trainable_state({k: v + 0.02 for k, v in policy.trainable_state().items()})
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", saved_tokens)
    rows = sampled_rows(policy, 9, (1.0, 0.5))
    with torch.no_grad():
        logprob_NV = completion_logprobs(policy, rows)
    taken = logprob_NV.gather(
        1, torch.tensor([i for r in rows for i in r.completion_ids_T])[:, None]
    )
    sampled = torch.tensor([p for row in rows for p in row.logprobs_T])
    assert (taken[:, 0] - sampled).abs().max() < 1e-4
    trainer = SlowTrainer(policy, SlowConfig(lora=lora), SamplingConfig(), 20, 0)
    assert trainer.advance(rows).drift < 1e-4


def small_granite(tokenizer):
    """Dense, though its configuration speaks of routers."""
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **SHAPE, vocab_size=len(tokenizer), num_hidden_layers=2, num_local_experts=0,
            layer_types=["attention"] * 2, shared_intermediate_size=64, mamba_n_heads=8,
        )
    )  # fmt: skip


def small_granite_moe(tokenizer):
    """Its experts go by another name than TRL knows."""
    return GraniteMoeForCausalLM(
        GraniteMoeConfig(
            **SHAPE, vocab_size=len(tokenizer), num_hidden_layers=2, num_local_experts=4,
            num_experts_per_tok=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make_small", [small_granite, small_granite_moe])
def test_granite_is_trained(make_small, tmp_path):
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_small(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load(tmp_path)
    trainer = SlowTrainer(policy, SlowConfig(), SamplingConfig(), 20, 0)
    assert trainer._trl.aux_loss_enabled == (make_small is small_granite_moe)
    stats = trainer.advance(sampled_rows(policy, 9, (1.0, 0.5)))
    assert stats.skipped is None and stats.drift < 1e-4


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_model_with_an_output_of_its_own_is_trained_by_that(lora, tiny_qwen3):
    policy, known = load(tiny_qwen3), SlowTrainer(load(tiny_qwen3), SLOW, SamplingConfig(), 20, 0)
    assert known._trl.outputs_as_model
    # Something is done to its logits that TRL does not know of.
    policy.model.lm_head.register_forward_hook(lambda module, given, logits: 0.25 * logits)
    with torch.no_grad():  # else all tokens are about as probable, whatever the factor
        policy.model.get_output_embeddings().weight.mul_(20)
    slow = replace(SLOW, lora=lora)
    trainer = SlowTrainer(policy, slow, SamplingConfig(), 20, 0)
    assert not trainer._trl.outputs_as_model
    stats = trainer.advance(sampled_rows(policy))
    assert stats.skipped is None and stats.drift < 1e-4


def test_drift_between_sampling_and_training_is_measured(tiny_lfm2, caplog):
    policy, trainer = make(tiny_lfm2)
    rows = sampled_rows(policy)
    assert trainer.advance(rows).drift < 1e-5  # a CPU may round both alike: then it is 0
    assert "disagree" not in caplog.text
    off = [replace(row, logprobs_T=tuple(p - 0.5 for p in row.logprobs_T)) for row in rows]
    policy, trainer = make(tiny_lfm2)
    assert trainer.advance(off).drift == pytest.approx(0.5, abs=1e-4)
    assert "disagree by 0.500" in caplog.text and "dropout" not in caplog.text
    policy, trainer = make(tiny_lfm2, replace(SLOW, lora=LoraConfig(rank=4, dropout=0.5)))
    trainer.advance(off)
    assert "quite on policy: adapters drop activations" in caplog.text


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_checkpointing_is_the_last_resort_when_memory_runs_out(
    tiny_qwen3, lora, monkeypatch, caplog
):
    slow = replace(SLOW, lora=lora, micro_batch_size=2, max_grad_norm=0)
    expected, _ = gradients_after(*make(tiny_qwen3, slow), rows_for(0))
    policy, trainer = make(tiny_qwen3, slow)
    accumulate = trainer._trl.accumulate

    def short(*args):
        if not is_checkpointing(policy.model):
            raise MemoryError
        return accumulate(*args)

    monkeypatch.setattr(trainer._trl, "accumulate", short)
    found, _ = gradients_after(policy, trainer, rows_for(0))
    assert "going on with activation checkpointing" in caplog.text
    differences = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    whole = torch.cat([gradient.flatten() for gradient in expected.values()])
    assert found.keys() == expected.keys() and differences.norm() < 1e-5 * whole.norm()
    monkeypatch.setattr(trainer._trl, "accumulate", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(TrainingError, match="single row"):
        trainer.advance(rows_for(1))


def test_what_was_saved_on_a_gpu_goes_on_without_one(tiny_qwen3, tmp_path):
    _, trainer = make(tiny_qwen3)
    trainer.advance(rows_for(0))
    state = trainer.state()
    replace(state, rng={**state.rng, "cuda": torch.zeros(16, dtype=torch.uint8)}).write(tmp_path)
    _, again = make(tiny_qwen3)
    again.load(tmp_path)
    assert again.advance(rows_for(1)) == trainer.advance(rows_for(1))


def test_a_step_is_not_taken_again_once_weights_have_moved(tiny_qwen3, monkeypatch):
    policy, trainer = make(tiny_qwen3, replace(SLOW, micro_batch_size=4))
    before = trainer._trl.optimizer.step
    steps = []

    def short(*args):
        steps.append(before(*args))
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer._trl.optimizer, "step", short)
    with pytest.raises(TrainingError, match="middle of an optimizer's step"):
        trainer.advance(rows_for(0))
    assert len(steps) == 1 and policy.step == 0


@pytest.mark.parametrize("most", [20, 64])
def test_micro_batches_keep_to_a_number_of_tokens(most, tiny_lfm2, monkeypatch):
    slow = replace(SLOW, max_grad_norm=0)
    expected, _ = gradients_after(*make(tiny_lfm2, slow), rows_for(0, 11))
    monkeypatch.setattr(slow_module, "MICRO_BATCH_TOKENS", most)
    policy, trainer = make(tiny_lfm2, slow)
    sizes = []
    policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape)
    )
    found, _ = gradients_after(policy, trainer, rows_for(0, 11))
    assert len(sizes) > 1
    assert all(rows == 1 or rows * width <= most for rows, width in sizes)
    assert_equal_but_for_rounding(found, expected)


def moved(policy, rows, **settings):
    """How far a first step moves the weights, as a share of what AdamW moves them at most."""
    trainer = SlowTrainer(policy, SlowConfig(**settings), SamplingConfig(), 9, 0)
    before = {name: value.clone() for name, value in policy.trainable_state().items()}
    trainer.advance(rows)
    after = policy.trainable_state()
    longest = max((after[name] - value).abs().max().item() for name, value in before.items())
    return longest / trainer.slow.learning_rate


def test_a_step_is_shorter_where_rows_are_constant(tiny_qwen3):
    rows = rows_for(0, 8, [1.0, -1.0, *[0.0] * 6])
    assert moved(load(tiny_qwen3), rows) == pytest.approx(0.5, rel=1e-2)
    alone = moved(load(tiny_qwen3), rows, damp_constant=False)
    assert alone == pytest.approx(1, rel=1e-2)
    with_penalty = moved(load(tiny_qwen3), rows, entropy_coef=1e-3)
    assert with_penalty == pytest.approx(1, rel=1e-2)


def test_the_schedule_does_not_remember_a_short_step(tiny_qwen3):
    _, trainer = make(tiny_qwen3, SlowConfig(learning_rate=1e-3))
    short = trainer.advance(rows_for(0, 4, [1.0, -1.0, 0.0, 0.0]))
    assert short.learning_rate == pytest.approx(1e-3 * math.sqrt(0.5))
    assert trainer.advance(rows_for(1)).learning_rate == 1e-3


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_a_constant_rate_is_warmed_up_where_that_is_asked_for(schedule, tiny_qwen3):
    slow = SlowConfig(learning_rate=1e-3, lr_scheduler_type=schedule, warmup_steps=2)
    _, trainer = make(tiny_qwen3, slow)
    rates = [trainer.advance(rows_for(number)).learning_rate for number in range(4)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_the_learning_rate_goes_by_the_models_size(tiny_qwen3):
    rate = default_learning_rate
    for size in (0, 947_200, 2_000_000):
        assert rate(size, lora=False) == rate(size, lora=True) == 3e-4
    assert rate(135_000_000, lora=False) == 5e-5 and rate(135_000_000, lora=True) == 5e-4
    assert 1e-6 < rate(1_700_000_000, lora=False) < rate(596_000_000, lora=False) < 2e-5
    assert rate(8_000_000_000, lora=False) == rate(70_000_000_000, lora=False) == 1e-6
    sizes = [10**n for n in range(5, 12)]
    for lora in (False, True):
        assert all(0 < rate(n, lora) <= 5e-4 for n in sizes)
    full = [rate(n, False) for n in sizes]
    assert full == sorted(full, reverse=True)
    _, trainer = make(tiny_qwen3, SlowConfig())
    assert trainer.slow.learning_rate == trainer.advance(rows_for(0)).learning_rate == 3e-4
    _, trainer = make(tiny_qwen3, SlowConfig(learning_rate=1e-3))
    assert trainer.slow.learning_rate == 1e-3
