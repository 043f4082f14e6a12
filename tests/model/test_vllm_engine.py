"""What is asked of any engine: the decode loop, and vLLM's adapter with a stand-in for vLLM.

The stand-in has weights of its own, which move only when it is told to sync them, and decodes with
them: what is tested is the adapter's part, not vLLM.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import sampled_logprobs

from fst_dspy import distributed
from fst_dspy.config import LoraConfig
from fst_dspy.errors import ConfigError, PromptTooLongError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.vllm_engine import VllmGenerator, use_vllm


class StandIn:
    """TRL's ``VLLMGeneration``, as far as it is used, over a copy of the weights."""

    def __init__(self, folder: Path, trained: Policy) -> None:
        self.own, self.trained = Policy.load(folder), trained
        self.llm = self
        self.syncs = 0

    def sync_weights(self) -> None:
        self.syncs += 1
        self.own.load_trainable_state(self.trained.trainable_state())

    def generate(self, prompts, sampling_params, use_tqdm):
        requests = [
            GenerationRequest(
                tuple(prompt["prompt_token_ids"]), p.max_tokens, p.temperature,
                stop=tuple(p.stop), seed=p.seed,
            )
            for prompt, p in zip(prompts, sampling_params, strict=True)
        ]  # fmt: skip
        assert all(p.logprobs == 0 for p in sampling_params)
        assert all(0 <= p.seed < 2**63 for p in sampling_params)
        results = generate(self.own, requests)
        return [
            SimpleNamespace(
                outputs=[
                    SimpleNamespace(
                        token_ids=list(result.completion_ids_T),
                        logprobs=[
                            {token: SimpleNamespace(logprob=value)}
                            for token, value in zip(
                                result.completion_ids_T, result.logprobs_T, strict=True
                            )
                        ],
                        finish_reason=result.finish_reason,
                    )
                ]
            )
            for result in results
        ]


@pytest.fixture(params=["loop", "vllm"])
def engine(request, tiny_qwen3):
    """A policy, and what generates for it."""
    policy = Policy.load(tiny_qwen3)
    if request.param == "vllm":
        policy.generator = VllmGenerator(StandIn(tiny_qwen3, policy), SimpleNamespace)
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
        assert policy.generator.vllm.syncs == 4
        run(policy, requests)
        assert policy.generator.vllm.syncs == 4


def test_weights_that_moved_are_not_hashed_to_be_brought_over(engine, monkeypatch):
    policy, run = engine
    if policy.generator is None:
        pytest.skip("the built-in engine brings nothing over")
    requests = requests_for(policy)
    run(policy, requests)
    syncs = policy.generator.vllm.syncs
    monkeypatch.setattr("fst_dspy.model.policy._hash", lambda *_: pytest.fail("hashed"))
    move(policy)
    run(policy, requests)
    assert policy.generator.vllm.syncs == syncs + 1


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
    run = VllmGenerator(StandIn(tiny_qwen3, policy), SimpleNamespace)
    with pytest.raises(ConfigError, match="top_p"):
        run(policy, requests_for(policy, 1, top_p=0.5))
    with pytest.raises(ConfigError, match="likeliest"):
        run(policy, requests_for(policy, 1, temperature=0.001))
    with pytest.raises(ConfigError, match="GPU"):
        use_vllm(policy)
    policy.add_lora(LoraConfig(rank=2), seed=0)
    with pytest.raises(ConfigError, match="adapters"):
        run(policy, requests_for(policy, 1))
