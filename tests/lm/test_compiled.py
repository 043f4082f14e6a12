"""A compiled program is one of its class: it looks like it, and copies of it are their own."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dspy
import pytest
from helpers import RawAdapter
from long_model import DESKS, Router, save_long_model

from fst_dspy import LocalLM
from fst_dspy.bundle.saving import make_savable
from fst_dspy.lm.asked import wanted_format
from fst_dspy.lm.compiled import follows
from fst_dspy.lm.predictors import bound_to
from fst_dspy.student.adapter import end_lines, end_marker
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.student.modules import copy_program


class Clerk(dspy.Module):
    """Answers tickets."""

    made: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        Clerk.made.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.say = dspy.Predict("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        """Answer a ticket."""
        return self.say(question=question)


class Later(dspy.Module):
    """An async one."""

    def __init__(self) -> None:
        super().__init__()
        self.say = dspy.Predict("question -> answer")

    async def aforward(self, question: str) -> dspy.Prediction:
        """Answer a ticket in time."""
        return await self.say.acall(question=question)


class Fixed(dspy.Module):
    """Says which it is."""

    def forward(self, question: str) -> dspy.Prediction:
        return dspy.Prediction(answer="fixed")


@pytest.fixture
def compiled(tiny_qwen3: Any) -> Callable[[dspy.Module], dspy.Module]:
    lm = LocalLM(str(tiny_qwen3), max_tokens=4, cache=False)

    def compile_it(program: dspy.Module) -> dspy.Module:
        with dspy.context(lm=lm, adapter=RawAdapter()):
            found = bound_to(program, seed_candidate(program), lm)
        make_savable(found, None)
        return found

    return compile_it


COPIES = {
    "copy": copy.copy, "deepcopy": copy.deepcopy, "DSPy's": lambda program: program.deepcopy(),
    "a rollout's": copy_program,
    "cloudpickle": lambda program: cloudpickle.loads(cloudpickle.dumps(program)),
}  # fmt: skip


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_any_kind_runs_itself(way: str, compiled: Any) -> None:
    program = compiled(Clerk())
    twin = COPIES[way](program)
    assert isinstance(twin, Clerk) and type(twin) is type(program)
    assert set(vars(twin)) == set(vars(program))
    twin.say = Fixed()
    assert twin(question="x").answer == twin.forward("x").answer == "fixed"
    assert twin.save.__self__ is twin
    with dspy.context(adapter=RawAdapter()):
        assert program(question="x").answer != "fixed"


def test_its_methods_look_like_those_of_its_class(compiled: Any) -> None:
    program, later = compiled(Clerk()), compiled(Later())
    assert (program.forward.__name__, program.forward.__doc__) == ("forward", "Answer a ticket.")
    assert inspect.signature(program.forward) == inspect.signature(Clerk().forward)
    tool, own = (dspy.Tool(one.forward) for one in (program, Clerk()))
    assert (tool.name, tool.desc, tool.args) == (own.name, own.desc, own.args)
    assert "forward" in dspy.ReAct("question -> answer", tools=[program.forward]).tools
    assert inspect.iscoroutinefunction(later.aforward)
    assert not hasattr(program, "aforward") and not hasattr(later, "forward")
    assert type(program).forward is Clerk.forward


def test_its_class_has_the_name_of_the_students_which_is_as_it_was(compiled: Any) -> None:
    one, other = compiled(Clerk()), compiled(Clerk())
    assert type(one) is type(other) is type(compiled(one)) and issubclass(type(one), Clerk)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(one), name) == getattr(Clerk, name)
    assert not Clerk.made and type(Clerk()) is Clerk
    made = type(one)()  # as a program may in its forward
    made.say = Fixed()
    assert made(question="x").answer == "fixed"


def test_a_forward_of_the_instance_is_run_and_may_be_changed(compiled: Any) -> None:
    student = Clerk()
    student.forward = lambda ticket: student.say(question=ticket)
    program = compiled(student)
    program.say = Fixed()
    assert program(ticket="x").answer == "fixed"
    assert list(inspect.signature(program.forward).parameters) == ["ticket"]
    program.forward = lambda: "changed"
    assert program() == "changed"
    del program.forward
    assert program(question="x").answer == "fixed"
    with pytest.raises(AttributeError):
        del program.forward


def test_a_forward_that_is_patched_for_a_while_is_its_own_again(compiled: Any) -> None:
    program = compiled(Clerk())
    program.say = Fixed()
    original = program.forward

    @functools.wraps(original)
    def patched(program: Any, **inputs: Any) -> Any:
        return original(**inputs), "traced"

    program.forward = types.MethodType(patched, program)  # as DSPy's bootstrap_trace_data does
    assert program(question="x")[1] == "traced"
    program.forward = original
    assert program(question="x").answer == "fixed" and "forward" not in vars(program)


def test_a_tool_of_it_in_an_agent_is_copied_with_the_agent(compiled: Any) -> None:
    program = compiled(Clerk())
    agent = dspy.ReAct("question -> answer", tools=[program.forward])
    pickled = cloudpickle.loads(cloudpickle.dumps(agent))
    for twin in (copy.deepcopy(agent), copy_program(agent), pickled):
        func = twin.tools["forward"].func
        assert func.__self__ is not program
        func.__self__.say = Fixed()
        assert func("x").answer == "fixed"


@pytest.mark.parametrize("make", [Clerk, lambda: dspy.Predict("question -> answer")])
def test_an_optimizer_that_begins_with_it_keeps_its_weights(make: Any, compiled: Any) -> None:
    program = compiled(make())
    examples = [dspy.Example(question="x", answer="y").with_inputs("question")]
    shown = dspy.LabeledFewShot(k=1).compile(program, trainset=examples)
    (before,), (after,) = program.predictors(), shown.predictors()
    assert len(after.demos) == 1 and not before.demos
    assert after.lm.model == before.lm.model and follows(after)


def test_an_async_one_runs_as_dspy_runs_them(compiled: Any) -> None:
    later, program = compiled(Later()), compiled(Clerk())
    with dspy.context(adapter=RawAdapter()):
        assert isinstance(asyncio.run(copy.copy(later).acall(question="x")).answer, str)
        asked = dspy.asyncify(program)(question="x")
        assert isinstance(asyncio.run(asked).answer, str)


# --- without a hash -------------------------------------------------------------------------------


@dataclasses.dataclass
class Record(dspy.Module):
    """A program that is equal to others by its values."""

    size: int = 3

    def __post_init__(self) -> None:
        self.route = Router().route

    def forward(self, ticket: str) -> dspy.Prediction:
        return self.route(ticket=ticket)


@dataclasses.dataclass
class Own(dspy.ChatAdapter):
    """An adapter that is equal to others by its values, however they end their answers."""

    end: str = dataclasses.field(default="completed", compare=False)

    def __post_init__(self) -> None:
        super().__init__(use_json_adapter_fallback=False)

    def user_message_output_requirements(self, signature: Any) -> str:
        return self.ended(super().user_message_output_requirements(signature))

    def format_assistant_message_content(self, *args: Any, **kwargs: Any) -> str:
        return self.ended(super().format_assistant_message_content(*args, **kwargs))

    def ended(self, text: str) -> str:
        return text.replace("completed", self.end)


def test_programs_and_adapters_need_no_hash(tmp_path: Path, caplog: Any) -> None:
    lm, program = LocalLM(str(save_long_model(tmp_path / "long")), max_tokens=60), Record()
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        compiled = bound_to(program, seed_candidate(program), lm, structured=True)
    one, other, signature = Own(), Own("over"), program.route.signature
    assert one == other and end_marker(one) != end_marker(other)
    for adapter in (one, other, one):
        with dspy.context(adapter=adapter):
            assert compiled(ticket="visa").desk in DESKS
            assert end_lines(adapter, signature) == 1
            assert wanted_format(adapter, signature).count(adapter.end) == 1
    told = [r.message for r in caplog.records if "Record was compiled under" in r.message]
    assert len(told) == 2 and "under Own(" in told[0]
