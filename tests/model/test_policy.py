"""The slow weights: loading, content versions, and swapping versions in and out."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_models import make_model, make_tokenizer, save_model
from tokenizers.processors import TemplateProcessing

import fst_dspy.model.policy as policy_module
from fst_dspy.cli.checks import check_model
from fst_dspy.config import LoraConfig
from fst_dspy.errors import ModelError
from fst_dspy.model.policy import Policy
from fst_dspy.plan.files import described_by_name
from fst_dspy.pretrained.weights import read_whole


def nudge(policy: Policy, amount: float = 0.01) -> None:
    """Change every trained weight, in place, as an optimizer step would."""
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(amount)


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def train_lora(policy: Policy, rank: int = 2) -> str:
    policy.add_lora(LoraConfig(rank=rank), seed=0)
    nudge(policy)
    return policy.keep()


def test_the_same_files_have_the_same_version_and_others_another(
    tiny_model: Path, tmp_path: Path
) -> None:
    first, second = Policy.load(tiny_model), Policy.load(tiny_model)
    assert first.base_version == second.base_version == first.version()
    name, _, digest = first.base_version.partition("@")
    assert name == tiny_model.name and len(digest) == 12
    other = save_model(tmp_path / tiny_model.name, "qwen3", seed=1)
    assert Policy.load(other).base_version != first.base_version
    half = Policy.load(tiny_model, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.base_version != first.base_version


def test_large_weights_are_hashed_in_parts_to_the_last_byte(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Policy.load(tiny_qwen3)
    largest = max(p.numel() for p in whole.model.parameters())
    monkeypatch.setattr(policy_module, "HASHED_TOGETHER", 4 * largest)
    assert Policy.load(tiny_qwen3).base_version == whole.base_version
    monkeypatch.setattr(policy_module, "HASHED_TOGETHER", 1000)
    policy = Policy.load(tiny_qwen3)
    assert policy.base_version == Policy.load(tiny_qwen3).base_version
    seen = {policy.version()}
    weight = max(policy.model.parameters(), key=torch.numel).detach().view(-1)
    places = (0, 249, 250, largest // 2, largest - 1)
    for place in places:
        weight[place] += 1
        seen.add(policy.version())
    assert len(seen) == 1 + len(places)


@pytest.mark.parametrize("lora", [False, True])
def test_any_change_of_the_weights_changes_the_version(tiny_qwen3: Path, lora: bool) -> None:
    policy = Policy.load(tiny_qwen3)
    seen = {policy.version()}
    if lora:
        policy.add_lora(LoraConfig(rank=2), seed=0)
        seen.add(policy.version())
    nudge(policy)
    seen.add(policy.version())
    trained = next(p for p in policy.model.parameters() if p.requires_grad)
    trained.data[0] += 0.5  # no version counter of torch's sees this
    seen.add(policy.version())
    assert len(seen) == 3 + lora


def test_a_missing_model_is_a_model_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        Policy.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="embedded"):
        Policy.load(tmp_path / "empty")


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model("llama", tokenizer)
    weights = {k: v for k, v in model.state_dict().items() if "layers.1.mlp" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lack 3 of its weights \(model.layers.1.mlp"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("with_weights", [False, True])
def test_adapters_are_no_model(with_weights: bool, tiny_llama: Path, tmp_path: Path) -> None:
    # Transformers would put them into the model, where adapters that are trained replace them.
    if with_weights:
        shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    refusals: list[Any] = [Policy.load, described_by_name, lambda folder: check_model(str(folder))]
    refusals.append(lambda folder: read_whole(str(folder)))  # as of an id of the hub
    for load in refusals:
        with pytest.raises(ModelError, match=r"holds adapters.*merge_and_unload"):
            load(tmp_path)


def test_a_tokenizer_without_chat_template_or_pad_gets_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    make_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    text = policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "user: hi\n\nassistant:"
    assert policy.tokenizer.pad_token_id is not None
    assert policy.context_length == 512


def test_a_base_model_is_asked_behind_the_token_that_begins_its_texts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=None)
    make_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.bos_token = first = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    asked = [{"role": "user", "content": "hi"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    policy = Policy.load(tmp_path)
    text = policy.tokenizer.apply_chat_template(asked, **options)
    assert text == f"{first}user: hi\n\nassistant:"


def test_a_pad_token_that_was_added_to_the_tokenizer_alone_is_not_used(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    assert policy.tokenizer.pad_token == policy.tokenizer.eos_token


def test_full_weights_are_kept_swapped_in_and_restored(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    base_logits = logits(policy)
    nudge(policy)
    trained, trained_logits = policy.keep(), logits(policy)
    nudge(policy)
    live, live_logits = policy.version(), logits(policy)
    assert not torch.equal(trained_logits, live_logits)
    for version, expected in [(policy.base_version, base_logits), (trained, trained_logits)]:
        with policy.at(version):
            assert policy.version() == version
            assert torch.equal(logits(policy), expected)
        assert policy.version() == live and torch.equal(logits(policy), live_logits)
    parameters = [id(p) for p in policy.model.parameters()]
    policy.restore(trained)
    assert torch.equal(logits(policy), trained_logits)
    assert [id(p) for p in policy.model.parameters()] == parameters
    policy.forget(trained)
    nudge(policy)
    with pytest.raises(ModelError, match="not at hand"):
        policy.restore(trained)
    policy.restore(policy.base_version)
    assert policy.version() == policy.base_version


def test_the_live_weights_come_back_when_the_block_fails(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    nudge(policy)
    live = policy.version()
    with pytest.raises(ZeroDivisionError), policy.at(policy.base_version):
        _ = 1 / 0
    assert policy.version() == live


def test_a_base_whose_files_have_changed_is_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_qwen3, tmp_path / "model")
    policy = Policy.load(folder)
    nudge(policy)
    make_model("qwen3", make_tokenizer(), seed=5).save_pretrained(folder)
    with pytest.raises(ModelError, match="have changed"):
        policy.restore(policy.base_version)


def test_lora_starts_at_the_base_and_depends_on_the_seed_alone(tiny_model: Path) -> None:
    versions = []
    for seed in (0, 0, 1):
        policy = Policy.load(tiny_model)
        base_logits = logits(policy)
        torch.manual_seed(len(versions))
        policy.add_lora(LoraConfig(rank=2), seed=seed)
        assert torch.equal(logits(policy), base_logits)
        versions.append(policy.version())
    assert versions[0] == versions[1] != versions[2]


def test_lora_versions_are_kept_swapped_in_and_restored(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model)
    base_logits = logits(policy)
    trained = train_lora(policy)
    trained_logits = logits(policy)
    assert not torch.allclose(trained_logits, base_logits)
    assert len(policy.trainable_state()) < 40 and all(
        "lora_" in name for name in policy.trainable_state()
    )
    with policy.at(policy.base_version):
        assert torch.equal(logits(policy), base_logits)
    nudge(policy)
    live, live_logits = policy.version(), logits(policy)
    with policy.at(trained):
        assert torch.equal(logits(policy), trained_logits)
    assert policy.version() == live and torch.equal(logits(policy), live_logits)
    policy.restore(policy.base_version)
    assert policy.lora is None and policy.version() == policy.base_version
    assert torch.equal(logits(policy), base_logits)
    assert all(p.requires_grad for p in policy.model.parameters())
    policy.restore(trained)
    assert policy.version() == trained and torch.equal(logits(policy), trained_logits)


@pytest.mark.parametrize("live_kind", ["full", "lora"])
def test_versions_of_every_kind_can_be_visited_from_every_other(
    tiny_qwen3: Path, live_kind: str
) -> None:
    policy = Policy.load(tiny_qwen3)
    expected = {}
    nudge(policy)
    expected[policy.keep()] = logits(policy)
    policy.restore(policy.base_version)
    for rank in (2, 3):
        version = train_lora(policy, rank)
        expected[version] = logits(policy)
        policy.restore(policy.base_version)
    if live_kind == "lora":
        policy.add_lora(LoraConfig(rank=4), seed=0)
    nudge(policy, 0.02)
    live, live_logits = policy.version(), logits(policy)
    trained = {id(p) for p in policy.model.parameters() if p.requires_grad}
    for version, wanted in expected.items():
        with policy.at(version):
            assert torch.equal(logits(policy), wanted)
        assert policy.version() == live and torch.equal(logits(policy), live_logits)
        # An optimizer over these parameters must still be training the live weights.
        assert {id(p) for p in policy.model.parameters() if p.requires_grad} == trained


def test_adapters_are_refused_on_weights_that_are_not_the_base(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    nudge(policy)
    with pytest.raises(ModelError, match="start from the base"):
        policy.add_lora(LoraConfig(), seed=0)


def test_weights_of_whole_numbers_lie_under_adapters_that_come_and_go(tiny_qwen3: Path) -> None:
    """As bitsandbytes has them, which cannot have a gradient."""
    policy = Policy.load(tiny_qwen3, device="cpu")
    packed = torch.nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    policy.model.register_parameter("packed", packed)
    policy = Policy(policy.model, policy.tokenizer, policy.name, policy.source)
    policy.add_lora(LoraConfig(rank=2), seed=0)
    trained = policy.keep()
    policy.restore(policy.base_version)
    assert policy.version() == policy.base_version
    assert all(w.requires_grad == (w is not packed) for w in policy.model.parameters())
    policy.restore(trained)
    assert policy.version() == trained


def test_trainable_state_round_trips_and_refuses_another_model(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    nudge(policy)
    state, version = policy.trainable_state(), policy.version()
    assert "lm_head.weight" not in state  # tied to the embedding, so it is there once
    nudge(policy)
    policy.load_trainable_state(state)
    assert policy.version() == version
    with pytest.raises(ModelError, match="another model"):
        policy.load_trainable_state({k: v[:1] for k, v in state.items()})


def test_copies_of_a_program_share_the_policy(tiny_qwen3: Path) -> None:
    policy = Policy.load(tiny_qwen3)
    assert copy.deepcopy({"policy": policy})["policy"] is policy
