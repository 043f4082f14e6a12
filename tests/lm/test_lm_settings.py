"""Settings of a ``LocalLM``: what no call would take is refused before the weights are read."""

from __future__ import annotations

import asyncio

import dspy
import pytest
from dspy import lm15

import fst_dspy
from fst_dspy.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temprature": 1}, "no setting 'temprature'; did you mean 'temperature'"),
        ({"top": 1}, "did you mean 'stop'|did you mean 'top_k'|did you mean 'top_p'"),
        ({"wibble": 1}, "no setting 'wibble'; known: .*temperature"),
        ({"temperature": -1}, r"temperature must be in \[0, 2\]"),
        ({"temperature": "1"}, "temperature must be numeric"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -5}, "max_tokens"),
        ({"repetition_penalty": -1}, "repetition_penalty must be a finite number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a finite number"),
        ({"frequency_penalty": 9}, "frequency_penalty"),
        ({"structured": "false"}, "structured must be True or False"),
        ({"model_type": "text"}, "chat template, and takes no model_type='text'"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_no_call_would_take_is_refused_before_weights_are_read(settings, said):
    with pytest.raises(ConfigError, match=said):
        fst_dspy.LocalLM("a folder that does not exist", **settings)


def test_a_copy_is_checked_likewise():
    lm = fst_dspy.LocalLM("embedded", top_k=5, num_retries=0, reasoning_effort=None, n=1)
    assert lm.copy(temperature=0.5, rollout_id=3).kwargs["rollout_id"] == 3
    with pytest.raises(ConfigError, match="did you mean 'top_p'"):
        lm.copy(topp=0.9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"min_p": 0.1}, "no setting 'min_p'; known: .*temperature"),
        ({"temperature": float("nan")}, r"temperature must be in \[0, 2\]"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a finite number"),
    ],
)
def test_a_call_and_a_predictors_config_are_checked_likewise(settings, said):
    lm = fst_dspy.LocalLM("embedded", max_tokens=4)
    with pytest.raises(ConfigError, match=said):
        lm("hello", **settings)
    with pytest.raises(ConfigError, match=said):
        asyncio.run(lm.acall("hello", **settings))
    with dspy.context(lm=lm), pytest.raises(ConfigError, match=said):
        dspy.Predict("question -> answer", **settings)(question="why?")


def said(lm: fst_dspy.LocalLM, **settings) -> list[str]:
    return lm("blue or red?", cache=False, **settings)


def test_a_seed_gives_different_answers_and_the_same_ones_again():
    lm = fst_dspy.LocalLM("embedded", temperature=2.0, max_tokens=6, seed=1)
    four = said(lm, n=4)
    assert len(set(four)) == 4
    assert said(lm, n=4) == four
    assert said(lm) == said(lm) == four[:1]


def test_so_it_does_for_what_best_of_n_tries():
    lm = fst_dspy.LocalLM("embedded", temperature=2.0, max_tokens=6, seed=1)
    tried = [said(lm, rollout_id=number)[0] for number in range(4)]
    assert len(set(tried)) == 4
    assert [said(lm, rollout_id=number)[0] for number in range(4)] == tried


async def _awaited(lm: fst_dspy.LocalLM) -> list[str]:
    return await lm.acall("blue or red?", cache=False, n=3)


def test_so_it_does_where_it_is_awaited():
    lm = fst_dspy.LocalLM("embedded", temperature=2.0, max_tokens=6, seed=1)
    assert asyncio.run(_awaited(lm)) == said(lm, n=3)


def test_answers_of_one_call_are_generated_together():
    lm = fst_dspy.LocalLM("embedded", temperature=2.0, max_tokens=6, cache=False, n=3)
    engine = lm.engine
    awaited = lambda text: asyncio.run(lm.acall(text))  # noqa: E731
    for ask, number in ((lm, 3), (awaited, 3), (lm.copy(n=None), 1)):
        before = engine.batches
        assert len(set(ask("blue or red?"))) == number
        assert engine.batches == before + 1
    with dspy.context(lm=lm.copy(structured=True, max_tokens=64)):
        before = engine.batches
        told = dspy.Predict("question -> answer", n=2)(question="blue or red?")
        assert len(told.completions.answer) == 2
        assert engine.batches == before + 1
    before = engine.batches
    lm(lm15.Request(model=lm.model, messages=(lm15.Message.user("blue or red?"),)))
    assert engine.batches == before + 1
    with pytest.raises(dspy.utils.exceptions.ContextWindowExceededError):
        lm("blue or red? " * 5000)
    assert len(lm("blue or red?")) == 3


class Bare(dspy.Adapter):
    """With the two methods that every adapter has."""

    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": "\n".join(map(str, inputs.values()))}]

    def parse(self, signature, completion):
        return dict.fromkeys(signature.output_fields, completion)


def test_an_adapter_of_which_no_format_is_known_is_answered_freely():
    lm = fst_dspy.LocalLM("embedded", max_tokens=4, structured=True)
    with dspy.context(lm=lm, adapter=Bare()):
        assert isinstance(dspy.Predict("question -> answer")(question="x").answer, str)


def test_what_two_step_adapter_extracts_is_held():
    lm = fst_dspy.LocalLM("embedded", max_tokens=60, structured=True)
    said = dspy.utils.DummyLM([{"text": "It is so."}])  # the embedded model may say nothing
    with dspy.context(lm=said, adapter=dspy.TwoStepAdapter(lm)):
        found = dspy.Predict("question -> ok: bool")(question="x").ok
    assert isinstance(found, bool)
