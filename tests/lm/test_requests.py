"""Settings of a LocalLM on their way into prompt and sampling, and answers on their way back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest
from chat_families import save_family
from dspy import lm15
from helpers import Echo, RawAdapter, vowels

import fst_dspy
from fst_dspy import FST, LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ConfigError
from fst_dspy.lm.predictors import bound_to, check_trained
from fst_dspy.lm.requests import prepare, prompt_ids
from fst_dspy.model.endings import kept_tokens, texts_of
from fst_dspy.model.generate import GenerationRequest, GenerationResult
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate

OFF = {"enable_thinking": False}
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3 with the chat template of the real ones."""
    return str(save_family(tmp_path_factory.mktemp("families") / "qwen3", "qwen3"))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that reach an engine."""
    requests: list[Any] = []
    real = fst_dspy.LocalEngine.complete

    def complete(engine: Any, request: Any) -> Any:
        requests.append(request)
        return real(engine, request)

    monkeypatch.setattr(fst_dspy.LocalEngine, "complete", complete)
    return requests


def prompt_of(lm: LocalLM, request: lm15.Request) -> str:
    return lm.policy.tokenizer.decode(prompt_ids(lm.policy, request))


def test_variables_of_the_template_per_lm_and_per_call(qwen3: str, seen: list[Any]) -> None:
    lm = LocalLM(qwen3, max_tokens=4, chat_template_kwargs=OFF)
    lm("hi")
    lm("hi", chat_template_kwargs={"enable_thinking": True})
    asyncio.run(lm.acall("hi", cache=False))
    lm.copy(chat_template_kwargs={"enable_thinking": True})("hey")
    ends = [prompt_of(lm, request).endswith(EMPTY_THOUGHT) for request in seen]
    assert ends == [True, False, True, False]


def test_they_are_part_of_the_caches_key(qwen3: str, seen: list[Any]) -> None:
    lm = LocalLM(qwen3, max_tokens=4)
    for options in (None, OFF, {"enable_thinking": True}, OFF, None):
        lm("hi", chat_template_kwargs=options)
    assert len(seen) == 3


def test_they_come_back_with_a_saved_program_and_a_bundle(qwen3: str, tmp_path: Path) -> None:
    settings = {"chat_template_kwargs": OFF, "top_k": 7, "repetition_penalty": 1.2}
    program = Echo()
    program.set_lm(LocalLM(qwen3, max_tokens=4, frequency_penalty=0.5, **settings))
    program.save(tmp_path / "program.json")
    fst_dspy.save(program, tmp_path / "bundle")
    loaded = Echo()
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    for found in (loaded, fst_dspy.load(tmp_path / "bundle", program=Echo(), base=qwen3)):
        assert found.say.lm.kwargs == program.say.lm.kwargs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enable_thinkin": False}, "no 'enable_thinkin'.*it has 'enable_thinking'"),
        ({"tokenize": False}, "no 'tokenize'"),
        ("off", "must be a dict"),
        ({"enable_thinking": {1, 2}}, "plain values"),
    ],
)
def test_variables_that_the_template_does_not_read_are_refused(
    qwen3: str, options: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        LocalLM(qwen3, chat_template_kwargs=options)
    with pytest.raises(ConfigError, match=said):
        LocalLM(qwen3)("hi", chat_template_kwargs=options)


def test_dspys_reasoning_is_the_thought_of_a_model_that_thinks(
    qwen3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Think(dspy.Signature):
        question: str = dspy.InputField()
        reasoning: dspy.Reasoning = dspy.OutputField()
        answer: str = dspy.OutputField()

    lm = LocalLM(qwen3, max_tokens=40, temperature=0.0)
    written = "<think>\nHm.\n</think>\n\n[[ ## answer ## ]]\nsilver\n\n[[ ## completed ## ]]"
    _says(lm, written, monkeypatch)
    with dspy.context(lm=lm):
        prediction = dspy.Predict(Think)(question="where?")
    assert (prediction.reasoning.content, prediction.answer) == ("Hm.", "silver")
    assert lm.supports_reasoning
    assert not LocalLM(lm.policy, chat_template_kwargs=OFF).supports_reasoning
    asked = lm15.Request(
        model=lm.model,
        messages=(lm15.Message.user("?"),),
        config=lm15.Config(reasoning=lm15.Reasoning("off")),
    )
    assert prompt_of(lm, asked).endswith(EMPTY_THOUGHT)
    with pytest.raises(dspy.LMError, match="says that it must not"):
        lm("hi", reasoning_effort="low", chat_template_kwargs=OFF)


def test_a_thought_that_is_cut_off_is_told_with_what_to_do(
    qwen3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = LocalLM(qwen3, max_tokens=3)
    _says(lm, "<think>\nHm, a visa ticket", monkeypatch, finish="length")
    with caplog.at_level(logging.WARNING, "fst_dspy"):
        assert lm("hi")[0]["text"] == ""
    assert "in the middle of its thought; raise max_tokens" in caplog.text
    assert "enable_thinking" in caplog.text


def test_native_tool_calls_reach_the_program(qwen3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    class UseTools(dspy.Signature):
        question: str = dspy.InputField()
        tools: list[dspy.Tool] = dspy.InputField()
        calls: dspy.ToolCalls = dspy.OutputField()

    lm = LocalLM(qwen3, max_tokens=60)
    said = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    _says(lm, said, monkeypatch)
    with dspy.context(lm=lm, adapter=dspy.XMLAdapter(use_native_function_calling=True)):
        found = dspy.Predict(UseTools)(question="1 + 2?", tools=[dspy.Tool(add)])
    assert [(call.name, call.args) for call in found.calls.tool_calls] == [
        ("add", {"a": 1, "b": 2})
    ]


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties_sample_and_do_not_train(qwen3: str, penalty: str) -> None:
    lm = LocalLM(qwen3, max_tokens=30, temperature=0.0, **{penalty: 2.0})
    plain = LocalLM(lm.policy, max_tokens=30, temperature=0.0)
    assert lm("hi", cache=False) != plain("hi", cache=False)
    program = Echo()
    program.set_lm(lm)
    data = [dspy.Example(question=f"{n}?").with_inputs("question") for n in range(4)]
    with pytest.raises(ConfigError, match=f"'say' samples with {penalty}=2.0"):
        FST(metric=vowels, auto=None).compile(program, trainset=data[:2], valset=data[2:])
    program.set_lm(plain)
    check_trained(program, plain.policy)
    program.say.config = {penalty: 1.5}
    with pytest.raises(ConfigError, match=penalty):
        check_trained(program, plain.policy)


@pytest.mark.parametrize(
    "name",
    ["temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty"],
)
def test_numbers_of_numpy_are_numbers(qwen3: str, name: str) -> None:
    """As of ``np.linspace``."""
    lm = LocalLM(qwen3, max_tokens=4, seed=1)
    assert lm("hi", cache=False, **{name: np.float64(0.3)}) == lm("hi", cache=False, **{name: 0.3})


@pytest.mark.parametrize("compiled", [False, True])
def test_streams_of_a_field_word_by_word(compiled: bool) -> None:
    lm = LocalLM("embedded", temperature=0.0)
    program: Any = dspy.Predict("question -> answer")
    program.set_lm(lm)
    if compiled:
        program = bound_to(program, seed_candidate(program), lm)
    streaming = dspy.streamify(program, stream_listeners=[dspy.streaming.StreamListener("answer")])

    async def listen() -> list[Any]:
        return [item async for item in streaming(question="where does a visa ticket go?")]

    *pieces, prediction = asyncio.run(listen())
    assert isinstance(prediction, dspy.Prediction)
    assert "".join(piece.chunk for piece in pieces).strip() == prediction.answer
    with dspy.context(lm=lm):
        assert program(question="where does a visa ticket go?").answer == prediction.answer


def _says(lm: LocalLM, text: str, monkeypatch: pytest.MonkeyPatch, finish: str = "stop") -> None:
    """Have a random model say a text, so that what becomes of it can be seen."""
    ids = tuple(lm.policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    result = GenerationResult(ids, (-1.0,) * len(ids), text, finish)
    monkeypatch.setattr(lm.policy, "generator", lambda policy, requests: [result] * len(requests))


def test_the_adapters_end_is_the_rows_end_in_a_rollouts_context(qwen3: str) -> None:
    lm = LocalLM(qwen3)
    request = lm15.Request(model=lm.model, messages=(lm15.Message.user("hi"),))
    ends = {}
    for adapter in (None, dspy.XMLAdapter(), RawAdapter()):
        with dspy.context(adapter=adapter):
            end = prepare(lm.policy, request, 0).generation.end
        ends[type(adapter).__name__] = end and (end.marker, end.thought)
    own = ("[[ ## completed ## ]]", ("<think>", "</think>"))
    assert ends == {"NoneType": own, "XMLAdapter": None, "RawAdapter": own}


@pytest.mark.parametrize("in_rollout", [False, True])
def test_a_field_named_as_the_adapters_end_does_not_end_the_answer(
    qwen3: str, monkeypatch: pytest.MonkeyPatch, in_rollout: bool
) -> None:
    lm, program = LocalLM(qwen3, cache=False), dspy.Predict("task -> completed: bool, notes")
    fields = {"completed": True, "notes": "fine"}
    said = dspy.ChatAdapter().format_assistant_message_content(program.signature, fields)
    tokenizer = lm.policy.tokenizer
    kept = []

    def generator(policy: Policy, requests: list[GenerationRequest]) -> list[GenerationResult]:
        (request,) = requests
        ids = tokenizer(f"{said.rstrip()}\nAnd so on.", add_special_tokens=False)["input_ids"]
        ids = tuple(ids[: kept_tokens(tokenizer, ids, request.end)])
        kept.extend(texts_of(policy, [ids], [request]))
        return [GenerationResult(ids, (-1.0,) * len(ids), kept[-1], "stop")]

    monkeypatch.setattr(lm.policy, "generator", generator)
    if in_rollout:
        example = dspy.Example(task="a").with_inputs("task")
        runner = RolloutRunner(program, lambda *_: 1.0, lm, SamplingConfig(), 0)
        jobs = [RolloutJob(example, seed_candidate(program))]
        (rollout,) = runner.run(jobs, channel="slow", salt=0)
        found = rollout.traces[0].outputs
    else:
        with dspy.context(lm=lm):
            found = dict(program(task="a"))
    assert found == fields and [text.rstrip() for text in kept] == [said.rstrip()]
