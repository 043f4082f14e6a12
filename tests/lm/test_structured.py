"""``LocalLM(structured=True)``: plain calls, saved programs, threads, schemas; what stays free."""

from __future__ import annotations

import asyncio
import datetime
import decimal
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
import torch
from chat_families import save_family
from dspy import lm15
from held_answers import allowed_after, drawn_answer
from long_model import DESKS, Router, save_long_model

import fst_dspy
from fst_dspy import LocalLM
from fst_dspy.grammar.answers import grammar_of_json_schema
from fst_dspy.lm.asked import grammar_of_caller, held_to
from fst_dspy.lm.predictors import bound_to
from fst_dspy.lm.templates import Prompt, render
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import vocabulary
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.types import Grammar

# A random model now and then goes on with white space until it is cut off.
pytestmark = pytest.mark.usefixtures("repeatable_sampling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long_model(tmp_path_factory.mktemp("structured") / "tiny-long")


def lm_of(folder: Path, **settings: Any) -> LocalLM:
    return LocalLM(str(folder), max_tokens=60, **settings)


@pytest.mark.parametrize(
    "adapter", [None, dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter()]
)
def test_a_random_model_answers_in_the_format(folder: Path, adapter: Any) -> None:
    # Hot, so that what a random model happens to like does not hide the others.
    with dspy.context(lm=lm_of(folder, structured=True, temperature=2.0), adapter=adapter):
        answers = {Router()(ticket=f"visa {n}").desk for n in range(16)}
    assert answers <= set(DESKS) and len(answers) > 1


def test_without_it_the_same_model_does_not(folder: Path) -> None:
    with dspy.context(lm=lm_of(folder)), pytest.raises(Exception, match="failed to parse"):
        Router()(ticket="visa")


def test_calls_of_no_predictor_are_free(folder: Path) -> None:
    lm = lm_of(folder, structured=True)
    (text,) = lm("say something")
    assert "[[ ##" not in text


def test_only_the_format_that_the_prompt_asks_for_holds(folder: Path) -> None:
    """Whatever calls, what is asked for stands in the prompt."""
    lm = lm_of(folder)
    router = Router()
    chat, xml = dspy.ChatAdapter(), dspy.XMLAdapter()
    signature, inputs = router.route.signature, {"ticket": "visa"}
    with dspy.context(caller_modules=[router, router.route]):
        messages = chat.format(signature, [], inputs)
        grammar = grammar_of_caller(lm.policy, messages)
        assert grammar is not None and "[[ ## desk ## ]]" in grammar
        # A second try through JSON, which DSPy makes behind the settings' back.
        again = dspy.JSONAdapter().format(signature, [], inputs)
        assert '\\"desk\\"' in (grammar_of_caller(lm.policy, again) or "")
        assert grammar_of_caller(lm.policy, xml.format(signature, [], inputs)) is None
        other = signature.append("why", dspy.OutputField(), str)
        assert grammar_of_caller(lm.policy, chat.format(other, [], inputs)) is None
    with dspy.context(caller_modules=[router]):
        assert grammar_of_caller(lm.policy, messages) is None


def test_threads_and_tasks_are_held_as_well(folder: Path) -> None:
    lm, router = lm_of(folder, structured=True, cache=False), Router()

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(router.route.acall(ticket=f"key {n}") for n in range(4)))

    with dspy.context(lm=lm):
        jobs = [(router, {"ticket": f"visa {n}"}) for n in range(4)]
        found = [*dspy.Parallel(num_threads=4)(jobs), *asyncio.run(all_at_once())]
    assert all(prediction.desk in DESKS for prediction in found)


def test_answers_held_and_free_are_not_mixed_up_in_the_cache(folder: Path) -> None:
    free = lm_of(folder, temperature=0.0)
    held = free.copy(structured=True)
    with dspy.context(lm=free), pytest.raises(Exception, match="failed to parse"):
        Router()(ticket="visa")
    with dspy.context(lm=held):
        assert Router()(ticket="visa").desk in DESKS


def test_a_saved_program_and_a_compiled_one_remember_it(folder: Path, tmp_path: Path) -> None:
    program = Router()
    program.set_lm(lm_of(folder, structured=True))
    program.save(tmp_path / "program.json")
    loaded = Router()
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert loaded(ticket="visa").desk in DESKS
    plain = Router()
    lm = lm_of(folder)
    plain.set_lm(lm)
    compiled = bound_to(plain, seed_candidate(plain), lm, structured=True)
    assert compiled(ticket="visa").desk in DESKS
    assert "structured" not in plain.route.lm.kwargs


class Asking(Router):
    """Makes a predictor as it runs, and asks it through two language models."""

    def forward(self, ticket: str) -> dspy.Prediction:
        made = dspy.Predict("ticket -> sure: bool")
        with dspy.context(lm=dspy.settings.lm.copy(temperature=1.5)):
            sure = made(ticket=ticket).sure
        return dspy.Prediction(**self.route(ticket=ticket), sure=sure, again=made(ticket=ticket))


def test_what_a_compiled_program_makes_as_it_runs_is_held_too(folder: Path, tmp_path: Path) -> None:
    lm, program = lm_of(folder), Asking()
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=adapter):
        compiled = bound_to(program, seed_candidate(program), lm, structured=True)
        assert compiled(ticket="visa").desk in DESKS
        fst_dspy.save(compiled, tmp_path / "bundle")
        assert fst_dspy.load(tmp_path / "bundle", Asking())(ticket="visa").desk in DESKS
        with pytest.raises(Exception, match="failed to parse"):
            program(ticket="visa")


def test_a_call_with_another_signature_is_free_which_is_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predictor = dspy.Predict("ticket -> ladder: bool")
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm_of(folder, structured=True), adapter=adapter):
        predictor(ticket="visa")
        for ticket in ("visa", "key"):
            with pytest.raises(Exception, match="failed to parse"):
                predictor(ticket=ticket, signature=dspy.Signature("ticket -> rung: bool"))
    (said,) = [r.getMessage() for r in caplog.records if r.name == "fst_dspy.lm.asked"]
    assert said.startswith("an answer is free: the predictor of 'ticket -> ladder' asks")


def test_a_request_of_lm15_is_held_and_rendered_as_a_call_is(folder: Path) -> None:
    """As adapters of DSPy 3.5 make them."""
    lm, router = lm_of(folder, structured=True), Router()
    system, *turns = dspy.ChatAdapter().format(router.route.signature, [], {"ticket": "visa"})
    request = lm15.Request(
        model=lm.model,
        system=system["content"],
        messages=tuple(lm15.Message.user(turn["content"]) for turn in turns),
        config=lm15.Config(max_tokens=60),
    )
    with dspy.context(caller_modules=[router, router.route]):
        text = lm(request).text
        again = asyncio.run(lm.acall(request=request)).text
    for answer in (text, again):
        read = dspy.ChatAdapter().parse(router.route.signature, answer)
        assert read["desk"] in DESKS
    assert "[[ ##" not in lm(request).text  # no predictor's


def test_where_the_prompt_opens_no_thought_the_model_may_begin_one(tmp_path: Path) -> None:
    policy = Policy.load(save_family(tmp_path / "qwen3", "qwen3"))
    marks, text = ("<think>", "</think>"), '%llguidance {}\nstart: "yes" | "no"'

    def held(said: str, **options: Any) -> Grammar | None:
        return held_to(policy, text, policy.tokenizer.encode(said), options)

    assert held("<|im_start|>assistant\n") == Grammar(text, thought=marks)
    assert held("<|im_start|>assistant\n<think>\n") == Grammar(text, thought=marks, opened=True)
    assert held("<think>\n\n</think>\n\n", enable_thinking=False) == Grammar(text)


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("gpt-oss", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"),
        ("gpt-oss", ""),
        ("gemma4", "<|channel>thought\nHm.\n"),
    ],
)
def test_an_answer_is_held_behind_its_channels(name: str, before: str, tmp_path: Path) -> None:
    policy = Policy.load(save_family(tmp_path / name, name))
    tokenizer, text = policy.tokenizer, '%llguidance {}\nstart: "yes" | "no"'
    final = {"gpt-oss": "<|channel|>final<|message|>", "gemma4": "<channel|>"}[name]
    asked = Prompt.of([{"role": "user", "content": "?"}], options={"enable_thinking": True})
    prompt = render(tokenizer, asked, tokenize=True, add_generation_prompt=True)
    grammar = held_to(policy, text, prompt, {"enable_thinking": True})
    assert grammar is not None
    said = tuple(tokenizer.encode(f"{before}{final}no"))
    for place in range(len(said)):
        assert said[place] in allowed_after(policy, grammar, said[:place])
    behind = allowed_after(policy, grammar, tuple(tokenizer.encode(before + final)))
    assert {tokenizer.decode([token]).strip("\n")[:1] for token in behind} <= {"y", "n", ""}


def test_a_model_that_could_think_and_does_not_answers_in_the_format(tmp_path: Path) -> None:
    size = {"max_position_embeddings": 2048}
    lm = lm_of(save_family(tmp_path / "qwen3", "qwen3", **size), structured=True, cache=False)
    thought = torch.tensor(lm.policy.tokenizer.encode("<think>"))
    head = lm.policy.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: logits.index_fill_(-1, thought, -99.0))
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        assert {Router()(ticket=f"visa {n}").desk for n in range(6)} <= set(DESKS)


class Answer(pydantic.BaseModel):
    """A user's own schema."""

    desk: Literal["silver", "gold"]
    sure: bool


@pytest.mark.parametrize(
    "given",
    [
        Answer,
        {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": Answer.model_json_schema()},
        },
    ],
    ids=["model", "schema"],
)
def test_a_response_format_holds_any_call(folder: Path, given: Any) -> None:
    lm = lm_of(folder)
    assert lm.supports_response_schema
    (text,) = lm("which desk?", response_format=given)
    Answer.model_validate_json(text)
    (record,) = lm("which desk?", response_format={"type": "json_object"}, temperature=0.3)[:1]
    assert record.startswith("{")


class Order(pydantic.BaseModel):
    """Types of which pydantic's schema says less, or more, than it reads."""

    at: datetime.datetime
    price: decimal.Decimal
    within: datetime.timedelta
    parts: dict[Literal["a", "b"], int] = {}


def test_a_model_is_held_to_what_pydantic_reads(folder: Path) -> None:
    lm = lm_of(folder, response_format=Order, cache=False)
    schemas = []
    real = fst_dspy.LocalEngine.complete

    def complete(engine: Any, request: Any) -> Any:
        schemas.append(request.config.response_format["schema"])
        return real(engine, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fst_dspy.LocalEngine, "complete", complete)
        lm("what?")
        asyncio.run(lm.acall("what?"))
    assert schemas[0] == schemas[1] and set(schemas[0]["required"]) == set(Order.model_fields)
    text = grammar_of_json_schema(schemas[0])
    assert text is not None
    for seed in range(6):
        answer = drawn_answer(lm.policy, Grammar(text), seed)
        assert answer is None or Order.model_validate_json(answer)
    matcher = vocabulary(lm.policy).matcher(text)
    order = Order(
        at=datetime.datetime(2024, 2, 29), price="1.50", within="P1DT2S", parts={"a": 1, "b": 2}
    )
    ids = lm.policy.tokenizer.encode(order.model_dump_json(indent=2), add_special_tokens=False)
    assert matcher.try_consume_tokens(ids) == len(ids)


def test_times_of_a_plain_schema_are_those_of_the_standard(folder: Path) -> None:
    policy = Policy.load(folder)
    text = grammar_of_json_schema({"type": "string", "format": "date-time"})
    assert text is not None
    said = {"2024-02-29T10:00:00Z": True, "2024-02-29t10:00:60z": False, "2024-02-29T10:00": False}
    for written, good in said.items():
        ids = policy.tokenizer.encode(f'"{written}"', add_special_tokens=False)
        assert (vocabulary(policy).matcher(text).try_consume_tokens(ids) == len(ids)) == good


def test_a_schema_that_cannot_be_held_to_is_refused(folder: Path) -> None:
    schema = {"type": "object", "$ref": "https://elsewhere.example/schema"}
    given = {"type": "json_schema", "json_schema": {"name": "far", "schema": schema}}
    with pytest.raises(Exception, match="cannot be held to this schema"):
        lm_of(folder)("which desk?", response_format=given)


def test_a_grammar_that_is_refused_is_the_error_of_its_own_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of no other call of its batch."""
    lm = lm_of(folder, structured=True)
    monkeypatch.setattr(
        "fst_dspy.lm.local_lm.grammar_of_caller",
        lambda policy, prompt: "start: nothing" if "spoilt" in str(prompt) else None,
    )

    async def both() -> list[Any]:
        asked = (lm15.Message.user(text) for text in ("spoilt", "whole"))
        calls = (lm.acall(request=lm15.Request(lm.model, (m,))) for m in asked)
        return await asyncio.gather(*calls, return_exceptions=True)

    spoilt, whole = asyncio.run(both())
    assert isinstance(spoilt, Exception) and "refuses a grammar" in str(spoilt)
    assert not isinstance(whole, Exception)
