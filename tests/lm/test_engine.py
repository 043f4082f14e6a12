"""Engines: requests to responses, batching of concurrent calls, and the barrier for rollouts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from dspy import lm15

import fst_dspy.lm.engine as engine_module
import fst_dspy.lm.requests as calls_module
from fst_dspy.errors import ModelError
from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine
from fst_dspy.lm.requests import prompt_ids
from fst_dspy.model.policy import Policy


@pytest.fixture
def policy(tiny_lfm2: Path) -> Policy:
    return Policy.load(tiny_lfm2)


def ask(policy: Policy, text: str, version: str | None = None, **config: Any) -> lm15.Request:
    return lm15.Request(
        model=version or policy.live_id,
        messages=(lm15.Message.user(text),),
        config=lm15.Config(**{"max_tokens": 12, **config}),
    )


def move(policy: Policy) -> None:
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.5)


def test_messages_go_through_the_chat_template(policy: Policy) -> None:
    request = lm15.Request(
        model=policy.live_id,
        system="Be brief.",
        messages=(
            lm15.Message.user("hi"),
            lm15.Message.assistant("hello"),
            lm15.Message.user((lm15.TextPart("how "), lm15.TextPart("are you"))),
        ),
    )
    assert policy.tokenizer.decode(prompt_ids(policy, request)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nhow are you<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_response_carries_text_usage_ids_and_logprobs(policy: Policy) -> None:
    request = ask(policy, "hi", seed=3, logprobs=0)
    response = LocalEngine(policy).complete(request)
    data = response.provider_data
    assert data is not None and response.logprobs is not None
    assert tuple(data["prompt_ids"]) == prompt_ids(policy, request)
    assert policy.tokenizer.decode(data["completion_ids"], skip_special_tokens=True) == (
        response.text or ""
    )
    assert [t.token_id for t in response.logprobs] == data["completion_ids"]
    assert [t.logprob for t in response.logprobs] == data["logprobs"]
    assert response.usage.input_tokens == len(data["prompt_ids"])
    assert response.usage.output_tokens == len(data["completion_ids"])
    assert response.usage.total_tokens == len(data["prompt_ids"]) + len(data["completion_ids"])


def test_a_seed_repeats_an_answer_and_none_varies_it(policy: Policy) -> None:
    engine = LocalEngine(policy)
    seeded = {engine.complete(ask(policy, "hi", seed=3)).text for _ in range(3)}
    fresh = {engine.complete(ask(policy, "hi")).text for _ in range(3)}
    assert len(seeded) == 1 and len(fresh) == 3


def test_an_empty_completion_is_an_empty_text(policy: Policy) -> None:
    with torch.no_grad():  # a final norm of zero makes every token equally likely
        policy.model.model.embedding_norm.weight.zero_()
    policy.model.generation_config.eos_token_id = list(range(len(policy.tokenizer)))
    request = ask(policy, "hi", temperature=0)  # of equals, the first: the pad token
    response = LocalEngine(policy).complete(request)
    assert not response.text and response.finish_reason == "stop"
    assert response.usage.output_tokens == 1


def test_the_request_names_the_weights(policy: Policy) -> None:
    engine = LocalEngine(policy)
    base = engine.complete(ask(policy, "hi", temperature=0)).text
    move(policy)
    moved = engine.complete(ask(policy, "hi", temperature=0)).text
    assert moved != base
    named = {
        version: engine.complete(ask(policy, "hi", version, temperature=0)).text
        for version in (policy.base_version, policy.version())
    }
    assert list(named.values()) == [base, moved]
    with pytest.raises(lm15.UnsupportedModelError, match="not at hand"):
        engine.complete(ask(policy, "hi", f"{policy.name}@000000000000"))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"probabilities": "required"}, "probabilities"),
        ({"extensions": {"verbosity": "low"}}, "verbosity"),
        ({"extensions": {"metadata": {"user": "me"}}}, "user"),
        ({"tool_choice": lm15.ToolChoice("required")}, "tool_choice"),
        ({"reasoning": lm15.Reasoning("low")}, "does not think"),
        ({"logprobs": 3}, "logprobs of other tokens"),
    ],
)
def test_settings_it_lacks_are_refused_not_dropped(
    policy: Policy, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(lm15.UnsupportedFeatureError, match=named):
        LocalEngine(policy).complete(ask(policy, "hi", **config))


def test_images_are_refused(policy: Policy) -> None:
    engine = LocalEngine(policy)
    image = lm15.Message.user((lm15.ImagePart(url="https://example.org/x.png"),))
    with pytest.raises(lm15.UnsupportedFeatureError, match="image"):
        engine.complete(lm15.Request(model=policy.live_id, messages=(image,)))


@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_stream_brings_the_whole_response_in_pieces(policy: Policy, logprobs: int | None) -> None:
    engine = LocalEngine(policy)
    request = ask(policy, "hi", temperature=0, logprobs=logprobs)
    whole = engine.complete(request)

    async def awaited() -> list[Any]:
        return [event async for event in AsyncLocalEngine(engine).stream(request)]

    for events in (list(engine.stream(request)), asyncio.run(awaited())):
        joined = lm15.materialize_response(iter(events), request)
        assert joined.message == whole.message
        assert joined.logprobs == whole.logprobs
        assert joined.finish_reason == whole.finish_reason
        assert len(events) > 3


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has calls wait long enough for all threads to get their turn on a busy machine."""
    return lambda: monkeypatch.setattr(engine_module, "GATHER_SECONDS", 0.3)


def test_calls_from_threads_are_batched_and_one_bad_call_fails_alone(
    policy: Policy, patient: Callable[[], None]
) -> None:
    engine = LocalEngine(policy)
    texts = [f"question {i}" for i in range(16)]
    alone = [engine.complete(ask(policy, text, seed=1)).text for text in texts]
    before = engine.batches
    patient()

    def call(text: str) -> Any:
        try:
            return engine.complete(ask(policy, text, seed=1)).text
        except lm15.ContextLengthError as error:
            return error

    with ThreadPoolExecutor(17) as pool:
        answers = list(pool.map(call, [*texts, "x" * 2000]))
    assert answers[:-1] == alone
    assert "holds 512 tokens" in str(answers[-1])
    assert engine.batches - before < 8


def test_awaited_calls_are_batched(policy: Policy, patient: Callable[[], None]) -> None:
    engine = LocalEngine(policy)
    served = AsyncLocalEngine(engine)
    texts = [f"question {i}" for i in range(24)]

    async def gather() -> list[lm15.Response]:
        return await asyncio.gather(*(served.complete(ask(policy, t, seed=1)) for t in texts))

    alone = [engine.complete(ask(policy, text, seed=1)).text for text in texts]
    before = engine.batches
    patient()
    answers = [response.text for response in asyncio.run(gather())]
    assert engine.batches - before < 12
    assert answers == alone


def test_a_failure_in_generation_reaches_every_caller(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(policy)

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(calls_module, "generate", fail)
    with ThreadPoolExecutor(4) as pool:
        errors = list(pool.map(lambda i: _error_of(engine, ask(policy, str(i))), range(4)))
    assert [str(error) for error in errors] == ["out of memory"] * 4
    monkeypatch.undo()
    assert engine.complete(ask(policy, "hi")).finish_reason


def _error_of(engine: Any, request: lm15.Request) -> BaseException | None:
    try:
        engine.complete(request)
    except Exception as error:
        return error
    return None


def test_a_saved_engine_loads_once_and_only_with_its_own_weights(tiny_lfm2: Path) -> None:
    engine = LocalEngine(Policy.load(tiny_lfm2))
    state = engine.dump_state()
    first, second = LocalEngine.load_state(state), LocalEngine.load_state(state)
    assert first is second and first.policy.base_version == engine.policy.base_version
    assert AsyncLocalEngine.load_state(AsyncLocalEngine(engine).dump_state()).engine is first
    with pytest.raises(ModelError, match="now hold"):
        LocalEngine.load_state({**state, "base_version": "tiny-lfm2@000000000000"})
