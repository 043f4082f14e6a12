"""Bundles through litellm: every setting honoured or refused, in its own words."""

from __future__ import annotations

import asyncio
import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import dspy
import litellm
import pytest
from bundles import adapted
from chat_families import save_family
from dspy.utils.exceptions import ContextWindowExceededError

import fst_dspy
from fst_dspy.litellm_provider import register

pytestmark = pytest.mark.slow

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def trained(tiny_qwen3):
    return adapted(tiny_qwen3)


@pytest.fixture(scope="module")
def model(trained, tiny_qwen3, tmp_path_factory):
    """A bundle that needs no base: adapters merged, saved as a full model."""
    folder = tmp_path_factory.mktemp("litellm")
    fst_dspy.export(trained, folder / "merged")
    program = trained.deepcopy()
    program.say.lm = fst_dspy.LocalLM(str(folder / "merged"))
    fst_dspy.save(program, folder / "bundle")
    register()
    register()
    return f"fst/{folder / 'bundle'}"


def ask(model, messages=HELLO, **settings):
    return litellm.completion(model=model, messages=messages, **settings)


def text(response):
    return response.choices[0].message.content


def test_an_answer_is_that_of_the_trained_weights(model, trained, tiny_qwen3, tmp_path):
    response = ask(model, temperature=0, max_tokens=12)
    lm = trained.say.lm
    expected = lm(
        dspy.lm15.Request(
            model=lm.model,
            messages=(dspy.lm15.Message.user("hello"),),
            system="Be brief.",
            config=dspy.lm15.Config(temperature=0.0, max_tokens=12),
        )
    )
    assert text(response) == expected.message.parts[0].text
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 12
    assert response.usage.prompt_tokens == expected.usage.input_tokens > 10
    assert response.usage.total_tokens == 12 + response.usage.prompt_tokens
    fst_dspy.save(trained, tmp_path / "lora")
    settings = {"temperature": 0, "max_tokens": 12}
    with pytest.raises(litellm.NotFoundError, match="pass base="):
        ask(f"fst/{tmp_path / 'lora'}", **settings)
    adapters = ask(f"fst/{tmp_path / 'lora'}", base=str(tiny_qwen3), **settings)
    assert text(adapters) == text(response)


def test_settings_are_honoured(model):
    assert text(ask(model, seed=1, max_tokens=16)) == text(ask(model, seed=1, max_tokens=16))
    assert text(ask(model, seed=1, max_tokens=16)) != text(ask(model, seed=2, max_tokens=16))
    assert len({text(ask(model, max_tokens=16)) for _ in range(3)}) > 1
    greedy = text(ask(model, temperature=0, max_tokens=16))
    assert text(ask(model, top_p=1e-6, max_tokens=16)) == greedy
    assert len(greedy) > 2
    cut = ask(model, temperature=0, max_tokens=16, stop=[greedy[2]])
    assert text(cut) == greedy[: greedy.index(greedy[2])]
    assert cut.choices[0].finish_reason == "stop"
    many = ask(model, n=3, seed=1, max_tokens=16)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in many.choices}) == 3
    assert many.usage.completion_tokens <= 48
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    plain = [{"role": "user", "content": "hello"}]
    assert text(ask(model, parts, temperature=0)) == text(ask(model, plain, temperature=0))


def test_a_bundle_is_asked_as_its_program_was(tmp_path):
    """Thoughts, which were off as it was trained, are no more for a service to switch off."""
    program = dspy.Predict("question -> answer")
    how = {"enable_thinking": False}
    program.set_lm(
        fst_dspy.LocalLM(str(save_family(tmp_path / "model", "qwen3")), chat_template_kwargs=how)
    )
    fst_dspy.save(program, tmp_path / "bundle")
    register()
    tokens = ask(f"fst/{tmp_path / 'bundle'}", max_tokens=1).usage.prompt_tokens
    tokenizer = program.lm.policy.tokenizer
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, **how)
    assert tokens == len(expected["input_ids"])


def test_async_calls(model):
    async def both():
        one = litellm.acompletion(model=model, messages=HELLO, temperature=0, max_tokens=8)
        two = litellm.acompletion(model=model, messages=HELLO, temperature=0, max_tokens=8, n=2)
        return await asyncio.gather(one, two)

    one, two = asyncio.run(both())
    expected = text(ask(model, temperature=0, max_tokens=8))
    assert text(one) == text(two) == expected and len(two.choices) == 2


def test_a_stream_is_one_chunk(model):
    expected = ask(model, temperature=0, max_tokens=8)
    chunks = list(ask(model, temperature=0, max_tokens=8, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text(expected)
    assert chunks[-1].choices[0].finish_reason == "length"

    async def consume():
        stream = await litellm.acompletion(
            model=model, messages=HELLO, temperature=0, max_tokens=8, stream=True
        )
        return [chunk async for chunk in stream]

    chunks = asyncio.run(consume())
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text(expected)


@pytest.mark.parametrize(
    ("messages", "settings", "error", "message"),
    [
        (HELLO, {"top_k": 5}, litellm.BadRequestError, "not top_k"),
        (HELLO, {"logprobs": True}, litellm.BadRequestError, "not logprobs"),
        (HELLO, {"response_format": {"type": "json_object"}}, litellm.BadRequestError, "response"),
        (HELLO, {"temperature": 3.5}, litellm.BadRequestError, "temperature"),
        (HELLO, {"n": 2, "stream": True}, litellm.BadRequestError, "leave out n"),
        (HELLO, {"n": 0}, litellm.BadRequestError, "above 0, not 0"),
        (HELLO, {"n": -1}, litellm.BadRequestError, "above 0, not -1"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            {},
            litellm.BadRequestError,
            'needs a "text"',
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            {},
            litellm.BadRequestError,
            'needs a "text"',
        ),
        (
            [{"role": "user", "content": "hi " * 2000}],
            {},
            litellm.ContextWindowExceededError,
            "512",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            {},
            litellm.BadRequestError,
            "text only",
        ),
        (
            [{"role": "tool", "tool_call_id": "1", "content": "x"}],
            {},
            litellm.BadRequestError,
            "no tools",
        ),
    ],
)
def test_what_a_local_model_lacks_is_refused(model, messages, settings, error, message):
    with pytest.raises(error, match=message):
        for _ in [*ask(model, messages, **settings)]:
            pass


def test_a_folder_that_is_no_bundle_is_not_found(model, tmp_path):
    with pytest.raises(litellm.NotFoundError, match="no bundle folder"):
        ask(f"fst/{tmp_path / 'nowhere'}")
    with pytest.raises(litellm.NotFoundError, match="is not a bundle"):
        ask(f"fst/{tmp_path}")


def test_a_replaced_bundle_is_loaded_again(tiny_qwen3, tiny_llama, tmp_path):
    register()
    found = []
    for folder in (tiny_qwen3, tiny_llama):
        program = dspy.Predict("question -> answer")
        program.lm = fst_dspy.LocalLM(str(folder))
        fst_dspy.save(program, tmp_path / "bundle")
        found.append(text(ask(f"fst/{tmp_path / 'bundle'}", temperature=0, max_tokens=8)))
        assert text(ask(f"fst/{tmp_path / 'bundle'}", temperature=0, max_tokens=8)) == found[-1]
    assert found[0] != found[1]


def test_dspy_calls_a_bundle_through_litellm(model):
    lm = dspy.LM(model, temperature=0, max_tokens=8, cache=False)
    (answer,) = lm("hello")
    plain = [{"role": "user", "content": "hello"}]
    assert answer == text(ask(model, plain, temperature=0, max_tokens=8))
    assert lm.history[-1]["usage"]["completion_tokens"] > 0
    assert asyncio.run(lm.acall("hello")) == [answer]
    with pytest.raises(ContextWindowExceededError):
        lm("hi " * 2000)
