"""Random models of the families that people use: calls, tools, steps, saving and loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
import transformers
from chat_families import FAMILIES, family_tokenizer, save_family
from dspy import lm15
from helpers import Echo
from tiny_models import SHAPE, make_tokenizer

import fst_dspy
from fst_dspy import LocalLM
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError, ModelError
from fst_dspy.lm.kept_weights import KeptWeights
from fst_dspy.lm.predictors import check_trained
from fst_dspy.lm.requests import prompt_ids
from fst_dspy.model.endings import eos_ids
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.logprobs import sampled_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.pretrained import quantized
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

TOOL = lm15.FunctionTool(
    "add",
    "Adds.",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp("families") / name, name)
        return made[name]

    return folder


def text_of(lm: LocalLM, request: lm15.Request) -> str:
    return lm.policy.tokenizer.decode(prompt_ids(lm.policy, request))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
def test_a_step_then_saved_and_loaded_it_answers_the_same(
    name: str, lora: LoraConfig | None, folder_of, tmp_path: Path
) -> None:
    lm = LocalLM(str(folder_of(name)), temperature=0.0, max_tokens=6)
    if lora is not None:
        lm.policy.add_lora(lora, seed=0)
    before = lm.policy.version()
    slow = SlowConfig(learning_rate=1e-2, lora=lora)
    trainer = SlowTrainer(lm.policy, slow, SamplingConfig(), total_steps=1, seed=0)
    rows = [TrainingRow((5, 6, 7), (8, 9, n), (-5.0,) * 3, 1.0 - n % 2 * 2) for n in (10, 11)]
    trainer.advance(rows)
    assert lm.policy.version() != before
    program = Echo()
    program.set_lm(lm.at(lm.policy.keep()))
    answer = program.say.lm("where?")
    fst_dspy.save(program, tmp_path / "bundle")
    loaded = fst_dspy.load(tmp_path / "bundle", program=Echo(), base=str(folder_of(name)))
    assert loaded.say.lm("where?") == answer
    assert loaded.say.lm.policy is not lm.policy


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma3", "phi3"])
def test_the_token_behind_an_answer_ends_it_though_no_settings_name_it(
    name: str, folder_of
) -> None:
    lm = LocalLM(str(folder_of(name)))
    end = lm.policy.tokenizer.convert_tokens_to_ids(FAMILIES[name].turn_end)
    lm.policy.model.config.eos_token_id = None
    lm.policy.model.generation_config = None
    lm.policy.tokenizer.eos_token = "<|pad|>"
    assert end in eos_ids(lm.policy)
    bare = lm.policy.tokenizer = family_tokenizer(name, named=False)
    assert bare.convert_tokens_to_ids(FAMILIES[name].turn_end) in eos_ids(lm.policy)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.calls])
def test_a_call_and_its_result_go_back_into_the_prompt(name: str, folder_of) -> None:
    lm = LocalLM(str(folder_of(name)))
    assert lm.supports_function_calling
    call = lm15.ToolCallPart("a1b2c3d4e", "add", {"a": 1, "b": 2})
    result = lm15.ToolResultPart("a1b2c3d4e", (lm15.TextPart("the sum is 3"),), name="add")
    request = lm15.Request(
        model=lm.model,
        system="Be brief.",
        messages=(
            lm15.Message.user("1 + 2?"),
            lm15.Message(role="assistant", parts=(call,)),
            lm15.Message(role="tool", parts=(result,)),
        ),
        tools=(TOOL,),
    )
    text = text_of(lm, request)
    text = text.replace('"a": 1', "a:1")  # Gemma 4 has no quotes around names
    places = [text.rindex(part) for part in ("1 + 2?", "a:1", "the sum is 3")]
    assert places == sorted(places)
    assert "Adds." in text


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.calls])
def test_tools_that_a_template_lacks_are_refused(name: str, folder_of) -> None:
    lm = LocalLM(str(folder_of(name)))
    assert not lm.supports_function_calling
    request = lm15.Request(model=lm.model, messages=(lm15.Message.user("?"),), tools=(TOOL,))
    with pytest.raises(dspy.LMError, match="has no tools"):
        lm(request)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_program_runs_on_each_under_dspys_adapters(name: str, folder_of) -> None:
    lm = LocalLM(str(folder_of(name)), max_tokens=4)
    for adapter in (dspy.ChatAdapter(use_json_adapter_fallback=False), dspy.XMLAdapter()):
        with (
            dspy.context(lm=lm, adapter=adapter),
            pytest.raises(dspy.utils.exceptions.AdapterParseError),
        ):
            dspy.Predict("question -> answer")(question="where?")


STATES = {
    "Mamba": {"state_size": 8},
    "Mamba2": dict(FAMILIES["mamba2"].extra),
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_bias": True},
}


@pytest.mark.parametrize("kind", STATES)
def test_states_that_padding_would_change_are_read_again_as_they_were(
    kind: str, tmp_path: Path
) -> None:
    sizes = {**SHAPE, **STATES[kind], "vocab_size": 320, "num_hidden_layers": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    policy = Policy.load(tmp_path)
    for settings in (policy.model.generation_config, policy.model.config):
        settings.eos_token_id = None  # to run on
    prompts = [tuple(range(5, 5 + length)) for length in (3, 9, 30)]
    results = generate(policy, [GenerationRequest(ids, 6, seed=len(ids)) for ids in prompts])
    rows = [
        TrainingRow(ids, result.completion_ids_T, result.logprobs_T, 1.0)
        for ids, result in zip(prompts, results, strict=True)
    ]
    for row, again in zip(rows, sampled_logprobs(policy, rows), strict=True):
        assert again == pytest.approx(row.logprobs_T, abs=1e-4)
    slow = SlowConfig(learning_rate=1e-2)
    trainer = SlowTrainer(policy, slow, SamplingConfig(), total_steps=1, seed=0)
    assert trainer.advance(rows).drift < 1e-4


@pytest.mark.parametrize("kind", ["Rwkv", "RecurrentGemma", "OpenAIGPT"])
def test_a_model_that_gives_no_cache_is_refused_as_it_is_loaded(kind: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "attention_hidden_size": 32, "lru_width": 32}
    config = getattr(transformers, f"{kind}Config")(**SHAPE | sizes | {"vocab_size": 320})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{kind}.* does not take and give back a cache"):
        LocalLM(str(tmp_path))


@pytest.mark.parametrize("kind", ["Bert", "XLMRoberta"])
def test_an_encoder_is_refused_as_it_is_loaded(kind: str, tmp_path: Path) -> None:
    """transformers would load it as a decoder, and it would answer in silence, with nonsense."""
    config = getattr(transformers, f"{kind}Config")(
        **SHAPE | {"num_hidden_layers": 2, "vocab_size": 320}
    )
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{kind}.* looks ahead, as encoders do"):
        LocalLM(str(tmp_path))


def test_a_quantized_model_is_trained_by_adapters_alone(folder_of) -> None:
    program = Echo()
    program.set_lm(LocalLM(str(folder_of("qwen3"))))
    policy = program.say.lm.policy
    policy.model.is_quantized = True
    with pytest.raises(ConfigError, match=r"quantized.*lora=True"):
        check_trained(program, policy)
    check_trained(program, policy, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match=r"quantized.*lora=True"):
        KeptWeights(policy).start(policy.base_version, None, 0)


def test_adapters_over_a_model_in_eight_bits(folder_of, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    source = folder_of("qwen3")
    coarse = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    coarse.save_pretrained(tmp_path / "int8")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "int8")
    lm = LocalLM(str(tmp_path / "int8"), temperature=0.0, max_tokens=6)
    assert lm.policy.model.is_quantized
    assert LocalLM(str(tmp_path / "int8")).model == lm.model
    before, lora = lm("where?"), LoraConfig(rank=2)
    lm.policy.add_lora(lora, seed=0)
    slow = SlowConfig(learning_rate=1e-2, lora=lora)
    trainer = SlowTrainer(lm.policy, slow, SamplingConfig(), total_steps=1, seed=0)
    rows = [TrainingRow((5, 6, 7), (8, 9, n), (-5.0,) * 3, 1.0 - n % 2 * 2) for n in (10, 11)]
    trainer.advance(rows)
    assert lm.live()("where?") != before
    assert lm("where?", cache=False) == before


def bits_of(method: str) -> Any:
    """A quantization of transformers', where its package is installed."""
    pytest.importorskip(method)
    if method == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_model_is_quantized_as_it_is_loaded_and_so_is_what_is_saved_of_it(
    method: str, tmp_path: Path
) -> None:
    bits = bits_of(method)
    # Of 64 and more, for bitsandbytes' kernels.
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    source = str(save_family(tmp_path / "qwen3", "qwen3", **wide))
    lm = LocalLM(source, temperature=0.0, max_tokens=6, quantization_config=bits)
    plain = LocalLM(source)
    assert lm.policy.model.is_quantized and lm.model != plain.model
    program, lora = Echo(), LoraConfig(rank=2)
    with pytest.raises(ConfigError, match=r"quantized.*lora=True"):
        check_trained(program, lm.policy)
    lm.policy.add_lora(lora, seed=0)
    slow = SlowConfig(learning_rate=1e-2, lora=lora)
    trainer = SlowTrainer(lm.policy, slow, SamplingConfig(), total_steps=1, seed=0)
    rows = [TrainingRow((5, 6, 7), (8, 9, n), (-5.0,) * 3, 1.0 - n % 2 * 2) for n in (10, 11)]
    trainer.advance(rows)
    assert lm("where?", cache=False) != [] and lm.model == lm.policy.base_version
    program.set_lm(lm.at(lm.policy.keep()))
    answer = program.say.lm("where?")
    fst_dspy.save(program, tmp_path / "bundle")
    loaded = fst_dspy.load(tmp_path / "bundle", program=Echo(), base=source)
    assert loaded.say.lm("where?") == answer and loaded.say.lm.policy is not lm.policy
    # As DSPy saves a program: it names the weights, and how they came to be.
    state = LocalLM(source, quantization_config=bits).dump_state()
    assert method in json.dumps(state)


def test_bits_that_cannot_be_had_are_told(folder_of, monkeypatch) -> None:
    source = str(folder_of("qwen3"))
    with pytest.raises(ModelError, match="BitsAndBytesConfig"):
        LocalLM(source, quantization_config="int4")
    with pytest.raises(ModelError, match="not by 'gptq'"):
        LocalLM(source, quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        LocalLM(source, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_other_names_of_settings_and_a_folder_without_a_tokenizer(
    folder_of, tmp_path: Path
) -> None:
    source = folder_of("qwen3")
    lm = LocalLM(str(source), dtype="auto", max_completion_tokens=5, cache=False)
    assert lm.kwargs["max_tokens"] == 5
    lm("where?", max_completion_tokens=2)
    assert lm.history[-1]["usage"]["completion_tokens"] <= 2
    shutil.copytree(source, tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="without a tokenizer"):
        LocalLM(str(tmp_path / "bare"))
