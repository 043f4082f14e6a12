"""What is asked of any engine: the decode loop, and vLLM's adapter with a stand-in for vLLM.

The stand-in has weights of its own, which move only when it is told to sync them, reads adapters
from the folder that a request names, and decodes with them; it takes what vLLM's own signatures
take. What is tested is the adapter's part, not vLLM.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
import torch
from helpers import Echo, RawAdapter, questions, sampled_logprobs, vowels
from peft import PeftModel
from tiny_compile import SETTINGS
from vllm_calls import LLM_ARGUMENTS, LORA_RANKS, LoRARequest, SamplingParams

from fst_dspy import FST, distributed
from fst_dspy.config import LoraConfig
from fst_dspy.errors import ConfigError, PromptTooLongError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.loop.joint import Run
from fst_dspy.model import vllm_engine
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.hardware import total_memory
from fst_dspy.model.policy import Policy
from fst_dspy.model.vllm_engine import (
    RANKS,
    Adapters,
    AllWeights,
    VllmGenerator,
    engine_arguments,
    use_vllm,
)


class StandIn:
    """TRL's ``VLLMGeneration`` and vLLM's ``LLM``, as far as they are used, over a copy of the
    weights."""

    def __init__(self, folder: Path, trained: Policy) -> None:
        self.folder, self.own, self.trained = folder, Policy.load(folder), trained
        self.llm = self
        self.syncs = 0
        self.read: dict[int, Any] = {}

    def sync_weights(self) -> None:
        self.syncs += 1
        self.own.load_trainable_state(self.trained.trainable_state())

    def generate(self, prompts, /, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert not use_tqdm and all(p.logprobs == 0 for p in sampling_params)
        requests = [
            GenerationRequest(
                tuple(prompt["prompt_token_ids"]), p.max_tokens, p.temperature, p.top_p,
                tuple(p.stop), p.seed, p.top_k or None, p.frequency_penalty, p.presence_penalty,
                p.repetition_penalty,
            )
            for prompt, p in zip(prompts, sampling_params, strict=True)
        ]  # fmt: skip
        with self.adapted(lora_request):
            results = generate(self.own, requests)
        processed = [
            # What vLLM gives of a token that was drawn by other rules is not its log-probability.
            tuple(0.0 for _ in r.logprobs_T) if q.top_p < 1 or q.top_k or q.is_penalised
            else r.logprobs_T
            for q, r in zip(requests, results, strict=True)
        ]  # fmt: skip
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=list(result.completion_ids_T),
                        logprobs=[
                            {token: SimpleNamespace(logprob=value)}
                            for token, value in zip(result.completion_ids_T, given_T, strict=True)
                        ],
                        finish_reason=result.finish_reason,
                    )
                ]
            )
            for result, given_T in zip(results, processed, strict=True)
        ]

    @contextmanager
    def adapted(self, request):
        if request is None:
            yield
            return
        if request.lora_int_id not in self.read:  # as vLLM: what has been read stays
            base = Policy.load(self.folder).model
            self.read[request.lora_int_id] = PeftModel.from_pretrained(base, request.lora_path)
        plain, self.own.model = self.own.model, self.read[request.lora_int_id].eval()
        try:
            yield
        finally:
            self.own.model = plain


def stand_in(folder: Path, policy: Policy) -> StandIn:
    """Generate with it."""
    vllm = StandIn(folder, policy)
    policy.generator = VllmGenerator(AllWeights(vllm), SamplingParams)
    return vllm


@pytest.fixture(params=["loop", "vllm"])
def engine(request, tiny_qwen3):
    """A policy, and what generates for it."""
    policy = Policy.load(tiny_qwen3)
    if request.param == "vllm":
        stand_in(tiny_qwen3, policy)
    return policy, policy.generator or generate


def requests_for(policy, count=6, **settings):
    prompt = tuple(policy.tokenizer.encode("where does it go?", add_special_tokens=False))
    return [GenerationRequest(prompt[: 2 + n], 12, seed=n, **settings) for n in range(count)]


def check_logprobs(policy, requests, results):
    for request, result in zip(requests, results, strict=True):
        expected = sampled_logprobs(policy, request, result)
        assert result.logprobs_T == pytest.approx(expected.tolist(), abs=1e-4)


def move(policy):
    state = policy.trainable_state()
    policy.load_trainable_state({name: value + 0.05 for name, value in state.items()})


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_ids_logprobs_and_text_of_each_request_in_order(engine, temperature):
    policy, run = engine
    requests = requests_for(policy, temperature=temperature)
    results = run(policy, requests)
    assert results == run(policy, requests)
    check_logprobs(policy, requests, results)
    for result in results:
        assert 1 <= len(result.completion_ids_T) <= 12
        text = policy.tokenizer.decode(result.completion_ids_T, skip_special_tokens=True)
        assert result.text == text
        assert result.finish_reason in ("stop", "length")


def test_weights_that_moved_are_sampled_from(engine):
    policy, run = engine
    requests = requests_for(policy)
    run(policy, requests)
    before = policy.keep()
    move(policy)
    results = run(policy, requests)
    check_logprobs(policy, requests, results)
    with policy.at(before):
        check_logprobs(policy, requests, run(policy, requests))
    assert run(policy, requests) == results
    if policy.generator is not None:  # on the first call and on every change, not on every call
        assert policy.generator.weights.vllm.syncs == 4
        run(policy, requests)
        assert policy.generator.weights.vllm.syncs == 4


def test_weights_that_moved_are_not_hashed_to_be_brought_over(engine, monkeypatch):
    policy, run = engine
    if policy.generator is None:
        pytest.skip("the built-in engine brings nothing over")
    requests = requests_for(policy)
    run(policy, requests)
    syncs = policy.generator.weights.vllm.syncs
    monkeypatch.setattr("fst_dspy.model.policy._hash", lambda *_: pytest.fail("hashed"))
    move(policy)
    run(policy, requests)
    assert policy.generator.weights.vllm.syncs == syncs + 1


def test_stop_strings_and_limits(engine):
    policy, run = engine
    whole = run(policy, requests_for(policy, 1))[0]
    stop = whole.text[1:3]
    cut = run(policy, requests_for(policy, 1, stop=(stop,)))[0]
    assert stop and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    room = policy.context_length
    long = GenerationRequest((5,) * (room - 3), 50)
    assert len(run(policy, [long])[0].completion_ids_T) <= 3
    with pytest.raises(PromptTooLongError):
        run(policy, [GenerationRequest((5,) * room, 5)])


def test_a_language_model_answers_through_it(engine):
    policy, _ = engine
    lm = LocalLM(policy, cache=False)
    answer = lm("hello", max_tokens=5, temperature=0.0)
    assert len(answer) == 1


def test_vllm_is_refused_beside_fsdp(tiny_qwen3, monkeypatch):
    monkeypatch.setattr(distributed, "uses_fsdp", lambda: True)
    with pytest.raises(ConfigError, match="FSDP"):
        use_vllm(Policy.load(tiny_qwen3))


def test_what_vllm_cannot_do_is_refused(tiny_qwen3):
    policy = Policy.load(tiny_qwen3)
    stand_in(tiny_qwen3, policy)
    run = policy.generator
    with pytest.raises(ConfigError, match="likeliest"):
        run(policy, requests_for(policy, 1, temperature=0.001))
    with pytest.raises(ConfigError, match="GPU"):
        use_vllm(policy)
    policy.add_lora(LoraConfig(rank=2), seed=0)
    with pytest.raises(ConfigError, match=r"use_vllm\(policy, lora=True\)"):
        run(policy, requests_for(policy, 1))


@pytest.fixture
def as_if_installed(monkeypatch):
    """vLLM and a GPU, as far as ``use_vllm`` looks; gives the dtype that TRL's engine has."""
    from trl.generation import vllm_generation

    model_config = SimpleNamespace(dtype=torch.bfloat16)
    made = SimpleNamespace(llm=SimpleNamespace(model_config=model_config))
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", lambda **_: made)
    monkeypatch.setattr("accelerate.Accelerator", lambda: None)
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    monkeypatch.setattr(vllm_engine, "global_rng_kept", lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams))
    return model_config


def test_weights_of_another_rounding_than_the_policys_are_refused(tiny_qwen3, as_if_installed):
    policy = Policy.load(tiny_qwen3, device="cpu", dtype="bfloat16")
    as_if_installed.dtype = torch.float16
    with pytest.raises(ConfigError, match="load it with dtype='float16'"):
        use_vllm(policy)
    as_if_installed.dtype = torch.bfloat16
    use_vllm(policy)
    assert isinstance(policy.generator, VllmGenerator)
    policy.source["quantization_config"] = {"load_in_4bit": True}
    with pytest.raises(ConfigError, match="as it is stored"):
        use_vllm(policy, lora=True)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.5}, {"top_k": 2, "temperature": 0.7}, {"repetition_penalty": 1.5}],
    ids=["top_p", "top_k", "penalty"],
)
def test_what_is_learned_from_is_the_whole_distribution(engine, settings):
    policy, run = engine
    requests = requests_for(policy, **settings)
    check_logprobs(policy, requests, run(policy, requests))


def adapted(folder: Path, rank: int = 2) -> tuple[Policy, StandIn]:
    """A policy with adapters, served as such."""
    policy = Policy.load(folder)
    policy.add_lora(LoraConfig(rank=rank), seed=0)
    vllm = StandIn(folder, policy)
    policy.generator = VllmGenerator(
        Adapters(vllm, LoRARequest, LoraConfig(rank=8)), SamplingParams
    )
    move(policy)
    return policy, vllm


# As peft asks for it when adapters are read.
former_name = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@former_name
def test_adapters_are_served_as_they_are_trained(tiny_qwen3):
    policy, vllm = adapted(tiny_qwen3)
    run, requests = policy.generator, requests_for(policy)
    first = run(policy, requests)
    check_logprobs(policy, requests, first)
    assert run(policy, requests) == first and list(vllm.read) == [1] and vllm.syncs == 0
    before = policy.keep()
    move(policy)
    check_logprobs(policy, requests, run(policy, requests))
    assert list(vllm.read) == [1, 2]
    with policy.at(policy.base_version):
        base = run(policy, requests)
        check_logprobs(policy, requests, base)
    with policy.at(before):
        assert run(policy, requests) == first
    assert list(vllm.read) == [1, 2, 3]
    plain = Policy.load(tiny_qwen3)
    assert base == generate(plain, requests)


@former_name
def test_adapters_of_another_shape_and_weights_without_any(tiny_qwen3):
    policy, _ = adapted(tiny_qwen3, rank=4)
    run, requests = policy.generator, requests_for(policy)
    version, expected = policy.keep(), run(policy, requests)
    policy.restore(policy.base_version)
    check_logprobs(policy, requests, run(policy, requests))  # not yet trained
    with policy.at(version):
        assert policy.lora_of(version) == LoraConfig(rank=4)
        assert run(policy, requests) == expected
    move(policy)
    with pytest.raises(ConfigError, match="stay as they are"):
        run(policy, requests)
    policy.restore(policy.base_version)
    policy.add_lora(LoraConfig(rank=16), seed=0)
    with pytest.raises(ConfigError, match=r"rank=16"):
        run(policy, requests)


class Begun(Exception):
    """A compile is about to run its first rollout."""


def begun_with(policy, monkeypatch, **settings):
    """The parts of a compile that is ended before its first rollout."""

    def end(run):
        raise Begun(run.parts)

    monkeypatch.setattr(Run, "loop", end)
    fst = FST(vowels, seed=0, **{**SETTINGS, **settings})
    with dspy.context(lm=LocalLM(policy), adapter=RawAdapter()), pytest.raises(Begun) as begun:
        fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    return begun.value.args[0]


def test_a_compile_trains_what_the_engine_serves_and_is_refused_before_it_begins(
    tiny_qwen3, monkeypatch
):
    policy = Policy.load(tiny_qwen3)
    vllm, lora = StandIn(tiny_qwen3, policy), LoraConfig(rank=4)
    policy.generator = VllmGenerator(AllWeights(vllm), SamplingParams, 0.75)
    parts = begun_with(policy, monkeypatch)
    assert parts.spec.config.slow.lora is None
    assert parts.plan.machine_memory == pytest.approx(total_memory("cpu") / 4, rel=0.01)
    with pytest.raises(ConfigError, match="no room for adapters"):
        begun_with(policy, monkeypatch, lora=True)
    policy.generator = VllmGenerator(Adapters(vllm, LoRARequest, lora), SamplingParams)
    with pytest.raises(ConfigError, match="stay as they are"):
        begun_with(policy, monkeypatch, lora=False)
    with pytest.raises(ConfigError, match="room for adapters of rank 8"):
        begun_with(policy, monkeypatch, lora=LoraConfig(rank=9))
    assert begun_with(policy, monkeypatch).spec.config.slow.lora == lora


def test_the_engine_is_asked_for_what_vllm_has(tiny_qwen3):
    policy = Policy.load(tiny_qwen3)
    found = engine_arguments(policy, str(tiny_qwen3), LoraConfig(rank=12), 0.3)
    assert found.keys() <= LLM_ARGUMENTS
    assert found["max_lora_rank"] == 16 and set(RANKS) <= set(LORA_RANKS)
    with pytest.raises(ConfigError, match="rank 256"):
        engine_arguments(policy, str(tiny_qwen3), LoraConfig(rank=300), 0.3)
