"""LocalLM as DSPy uses it: calls, cache, copies, saving, adapters."""

from __future__ import annotations

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dspy
import pytest
import torch
from dspy import lm15
from dspy.utils.exceptions import ContextWindowExceededError

import fst_dspy.lm.engine as engine_module
import fst_dspy.lm.requests as calls_module
from fst_dspy.config import LoraConfig
from fst_dspy.errors import ConfigError, ModelError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.model.policy import Policy


@pytest.fixture
def lm(tiny_qwen3: Path) -> LocalLM:
    return LocalLM(str(tiny_qwen3), max_tokens=16)


def move(policy: Policy, by: float = 1.5) -> None:
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(by)


def test_how_to_load_what_is_loaded_is_refused(lm: LocalLM) -> None:
    with pytest.raises(ConfigError, match=r"dtype and trust_remote_code would change nothing"):
        LocalLM(lm.policy, dtype="bfloat16", trust_remote_code=True)
    assert LocalLM(lm.policy, dtype=None, trust_remote_code=False).policy is lm.policy


def test_defaults(tiny_qwen3: Path) -> None:
    lm = LocalLM(str(tiny_qwen3))
    assert lm.model == lm.version == lm.policy.base_version
    assert lm.kwargs["temperature"] == 1.0 and lm.kwargs["max_tokens"] == 64
    assert lm.engine.policy is lm.policy
    for unset in (None, "", 3):  # as of an environment variable that is not set
        with pytest.raises(ModelError, match=f"a hub id, not {unset!r}"):
            LocalLM(unset)
    with pytest.raises(ModelError, match="no model folder"):
        LocalLM("./nowhere")


def test_calls_in_every_form(lm: LocalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (text,) = lm("hi")
        assert isinstance(text, str) and lm("hi") == [text]  # cached
        assert len({*lm("hi", n=3, cache=False)}) == 3
        assert lm("hi", seed=5, cache=False) == lm("hi", seed=5, cache=False)
        assert lm("hi", temperature=0, cache=False) == lm("hi", temperature=0, cache=False)
        assert asyncio.run(lm.acall("hey", seed=5)) == lm("hey", seed=5, cache=False)
        request = lm15.Request(model=lm.model, messages=(lm15.Message.user("hi"),))
        response = lm(request)
        assert response.provider_data["completion_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the dict form is DSPy's to retire
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
        (text,) = lm(messages=messages)
        assert isinstance(text, str)


def test_usage_and_history_are_filled(lm: LocalLM) -> None:
    lm("hi", cache=False)
    usage = lm.history[-1]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_the_cache_never_returns_an_answer_of_other_weights(tiny_qwen3: Path) -> None:
    lm = LocalLM(str(tiny_qwen3), max_tokens=16, temperature=0)
    base = lm("hi")
    move(lm.policy)
    moved = lm.live()("hi")
    assert moved != base
    assert lm("hi") == lm("hi", cache=False) == base  # still the weights it is bound to
    trained = lm.at(lm.policy.keep())
    assert trained("hi") == moved and trained.model != lm.model
    move(lm.policy)
    assert lm.live()("hi") != moved
    assert trained("hi") == trained("hi", cache=False) == moved
    with pytest.raises(ModelError, match="not at hand"):
        lm.at("other@000000000000")


def test_live_follows_the_weights_and_is_not_cached(lm: LocalLM) -> None:
    live = lm.live()
    assert live.model == "tiny-qwen3@live" and live.cache is False
    lm.policy.add_lora(LoraConfig(rank=2), seed=0)
    assert live.version == lm.policy.version() != lm.version == lm.policy.base_version


def test_copies_share_engine_and_policy(lm: LocalLM) -> None:
    program = dspy.Predict("question -> answer")
    program.lm = lm
    copied = program.deepcopy().lm
    assert copied is not lm and copied.engine is lm.engine and copied.policy is lm.policy
    warm = lm.copy(temperature=0.3)
    assert warm.kwargs["temperature"] == 0.3 and lm.kwargs["temperature"] == 1.0
    assert isinstance(warm, LocalLM) and warm.policy is lm.policy
    assert LocalLM(lm.policy).policy is lm.policy


def test_a_program_is_saved_with_its_model_and_loaded(lm: LocalLM, tmp_path: Path) -> None:
    program = dspy.Predict("question -> answer")
    program.lm = lm.copy(temperature=0.0)
    path = str(tmp_path / "program.json")
    program.save(path)
    loaded = dspy.Predict("question -> answer")
    loaded.load(path, allow_unsafe_lm_state=True)
    assert isinstance(loaded.lm, LocalLM) and loaded.lm.model == lm.model
    assert loaded.lm.policy is not lm.policy
    assert loaded.lm("hi", cache=False) == program.lm("hi", cache=False)
    assert asyncio.run(loaded.lm.acall("hi", cache=False)) == program.lm("hi", cache=False)


def test_a_program_on_trained_weights_says_that_they_are_not_in_the_file(
    lm: LocalLM, tmp_path: Path
) -> None:
    move(lm.policy, 1.25)  # to weights that no other test's policy may still hold
    program = dspy.Predict("question -> answer")
    program.lm = lm.at(lm.policy.keep())
    path = str(tmp_path / "program.json")
    program.save(path)
    loaded = dspy.Predict("question -> answer")
    loaded.load(path, allow_unsafe_lm_state=True)  # this process has them
    assert loaded.lm.policy is lm.policy and loaded.lm.model == program.lm.model
    lm.policy.forget(program.lm.model)
    lm.policy.restore(lm.policy.base_version)
    with pytest.raises(ModelError, match="does not hold them"):
        dspy.Predict("question -> answer").load(path, allow_unsafe_lm_state=True)


def test_a_long_prompt_fails_once_with_the_limit(
    lm: LocalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    real = calls_module.check_prompt

    def counted(policy: Policy, ids: tuple[int, ...]) -> None:
        tries.append(len(ids))
        real(policy, ids)

    monkeypatch.setattr(calls_module, "check_prompt", counted)
    refused = pytest.raises(ContextWindowExceededError, match="holds 512 tokens")
    with dspy.context(lm=lm), refused:
        dspy.Predict("question -> answer")(question="why? " * 600)
    assert len(tries) == 1


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_adapters_work_on_the_answer(
    lm: LocalLM, adapter: dspy.Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model writes no fields, so what it wrote is replaced after generation."""
    prompts: list[str] = []
    real = calls_module.generate

    def scripted(policy: Policy, requests: list) -> list:
        prompts.extend(policy.tokenizer.decode(r.prompt_ids_T) for r in requests)
        text = "[[ ## answer ## ]]\nsilver\n\n[[ ## completed ## ]]"
        if isinstance(adapter, dspy.JSONAdapter):
            text = '{"answer": "silver"}'
        return [replace(result, text=text) for result in real(policy, requests)]

    monkeypatch.setattr(calls_module, "generate", scripted)
    with dspy.context(lm=lm, adapter=adapter):
        assert dspy.Predict("question -> answer")(question="visa?").answer == "silver"
    assert len(prompts) == 1 and "visa?" in prompts[0] and "<|im_start|>system" in prompts[0]


def test_concurrent_programs_are_batched(lm: LocalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for all threads to get their turn on a busy machine.
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 0.3)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda i: lm(f"question {i}", cache=False), range(12)))
    assert 1 <= lm.engine.batches < 6

    async def gather() -> None:
        await asyncio.gather(*(lm.acall(f"question {i}", cache=False) for i in range(12)))

    before = lm.engine.batches
    asyncio.run(gather())
    assert 1 <= lm.engine.batches - before < 8


@pytest.mark.parametrize(
    ("given", "dtype"), [("fp16", "float16"), ("half", "float16"), ("BF16", "bfloat16")]
)
def test_dtypes_by_the_names_people_give_them(tiny_qwen3: Path, given: str, dtype: str) -> None:
    assert LocalLM(str(tiny_qwen3), dtype=given).policy.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int8"}, "in which weights are trained"),
        ({"device": "tpu"}, "give 'cpu', 'cuda'"),
        ({"device": "gpu:7"}, "no device 'gpu:7' on this machine"),
    ],
)
def test_devices_and_dtypes_that_there_are_not(
    tiny_qwen3: Path, settings: dict[str, str], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        LocalLM(str(tiny_qwen3), **settings)
