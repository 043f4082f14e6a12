"""GGUF files as models: what they hold, unpacked, and a compiled program over one."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import dspy
import pytest
import torch
from gguf_files import save_gguf
from tiny_models import make_tokenizer
from transformers import AutoModelForCausalLM

import fst_dspy
from fst_dspy.config import FSTConfig, LoraConfig
from fst_dspy.errors import ModelError
from fst_dspy.model.policy import Policy
from fst_dspy.plan.files import plan_of_files

IDS = torch.tensor([[5, 6, 7, 8, 9, 40, 41]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_model_is_the_one_that_was_written(tmp_path: Path) -> None:
    written = save_gguf(tmp_path / "plain.gguf", quantized=False)
    policy = Policy.load(tmp_path / "plain.gguf")
    assert torch.allclose(logits(policy.model), logits(written.eval()), atol=1e-4)
    tokenizer, text = make_tokenizer(), "[[ ## answer ## ]]\nsilver queue, 12!"
    assert policy.tokenizer.encode(text) == tokenizer.encode(text)
    chat = [{"role": "user", "content": "hi"}]
    assert policy.tokenizer.apply_chat_template(chat, tokenize=False) == (
        tokenizer.apply_chat_template(chat, tokenize=False)
    )
    assert policy.tokenizer.eos_token_id == tokenizer.eos_token_id
    assert policy.context_length == written.config.max_position_embeddings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_file_is_unpacked_in_the_type_asked_for_and_can_be_saved(
    tmp_path: Path, dtype: str
) -> None:
    written = save_gguf(tmp_path / "small.gguf")
    policy = Policy.load(str(tmp_path / "small.gguf"), dtype=dtype)
    assert {p.dtype for p in policy.model.parameters()} == {getattr(torch, dtype)}
    weight = policy.model.state_dict()["model.layers.1.mlp.up_proj.weight"].float()
    true = written.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert 0 < (weight - true).abs().max() < 0.05 * true.abs().max()
    policy.model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert torch.equal(logits(again.eval()), logits(policy.model))
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_folder_with_one_file_is_that_file_and_the_version_is_its_content(
    tmp_path: Path,
) -> None:
    save_gguf(tmp_path / "small.gguf")
    by_file, by_folder = Policy.load(tmp_path / "small.gguf"), Policy.load(str(tmp_path))
    assert by_file.base_version.startswith("small@")
    assert by_file.base_version.split("@")[1] == by_folder.base_version.split("@")[1]
    shutil.copy(tmp_path / "small.gguf", tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files \(other.gguf, small.gguf\)"):
        Policy.load(tmp_path)
    with pytest.raises(ModelError, match="no model folder or GGUF file"):
        Policy.load("missing.gguf")


def test_base_weights_are_read_again_after_training(tmp_path: Path) -> None:
    save_gguf(tmp_path / "small.gguf")
    policy = Policy.load(tmp_path / "small.gguf")
    before = logits(policy.model)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.05)
    assert not torch.equal(logits(policy.model), before)
    with policy.at(policy.base_version):
        assert torch.equal(logits(policy.model), before)


def test_it_can_be_planned_without_being_loaded(tmp_path: Path) -> None:
    written = save_gguf(tmp_path / "small.gguf")
    example = dspy.Example(question="where?", answer="there").with_inputs("question")
    program = dspy.Predict("question -> answer")
    config = FSTConfig.make(max_rollouts=64)
    plan = plan_of_files(tmp_path / "small.gguf", program, [example] * 4, config, device="cpu")
    assert plan.model.startswith("small")
    assert plan.parameters == sum(p.numel() for p in written.parameters())


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "big.gguf", vocabulary=10**8, layers=400)
    with pytest.raises(ModelError, match="describes a model of"):
        Policy.load(tmp_path / "big.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="cannot load the model"):
        Policy.load(tmp_path / "broken.gguf")


@pytest.mark.parametrize("by_folder", [False, True])
def test_a_part_of_a_model_is_not_read_as_the_whole(tmp_path: Path, by_folder: bool) -> None:
    # A third layer is in the header, and its weights would be in the other file.
    save_gguf(tmp_path / "m-00001-of-00002.gguf", layers=3)
    with pytest.raises(ModelError, match=r"one of the 2 parts .* --merge"):
        Policy.load(tmp_path if by_folder else tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"lack 9 of its weights \(model.layers.2"):
        Policy.load(tmp_path / "m.gguf")


def test_without_the_package_that_reads_them_it_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gguf(tmp_path / "small.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        Policy.load(tmp_path / "small.gguf")


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_program_over_one_is_saved_and_loaded(tmp_path: Path, lora: LoraConfig | None) -> None:
    save_gguf(tmp_path / "small.gguf")
    lm = fst_dspy.LocalLM(str(tmp_path / "small.gguf"), temperature=0.0, max_tokens=8)
    program = dspy.Predict("question -> answer")
    policy = lm.policy
    if lora is not None:
        policy.add_lora(lora, seed=0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.02)
    program.set_lm(lm.at(policy.keep()))
    fst_dspy.save(program, tmp_path / "bundle")
    base = None if lora is None else tmp_path / "small.gguf"
    loaded = fst_dspy.load(tmp_path / "bundle", base=base, program=program.deepcopy())
    (found,) = loaded.predictors()
    assert found.lm.version == program.lm.version
    ask = [{"role": "user", "content": "hi"}]
    assert found.lm(messages=ask) == program.lm(messages=ask)
    if lora is not None:
        with pytest.raises(ModelError, match=r"local folder.*base="):
            fst_dspy.load(tmp_path / "bundle", program=program.deepcopy())
