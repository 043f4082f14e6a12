"""Environments as people write them for TRL, of every kind: they run, or a word says why not."""

from __future__ import annotations

import dataclasses
import enum
from typing import Literal, Optional

import dspy
import numpy as np
import pydantic
import pytest
from dspy.utils import DummyLM
from typing_extensions import TypedDict

import fst_dspy
from fst_dspy.agents import contract
from fst_dspy.errors import ProgramError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(pydantic.BaseModel):
    x: int
    colour: Colour


class Base:
    def reset(self, **fields):
        self.seen, self.done, self.reward = [], False, 0.0

    def paint(self, colour: Colour, at: Point, sizes: list[int], note: Optional[str] = None):  # noqa: UP045
        """Paint."""
        self.seen.append((colour, at.x, at.colour, sizes, note))
        return {"painted": colour.value}

    async def wait(self, how: Literal["long", "short"]) -> int:
        """Wait."""
        return len(how)

    @staticmethod
    def rules() -> str:
        """Read the rules."""
        return "no running"

    @classmethod
    def made(cls):
        raise AssertionError("TRL does not call it, nor do we")

    def _private(self):
        raise AssertionError

    @property
    def costly(self):
        raise AssertionError


class Child(Base):
    def wait(self, how: str) -> str:
        """Wait otherwise."""
        self.done = True
        return f"waited {how}"


def played(factory, actions, signature="observation -> action", **fields):
    program = fst_dspy.env(factory, signature, max_turns=len(actions))
    lm = DummyLM([{"action": action} for action in actions])
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        pred = program(**fields)
    return pred, "\n".join(m["content"] for call in lm.history for m in call["messages"])


def test_typed_arguments_are_told_and_taken():
    paint = "paint('red', {'x': 1, 'colour': 'blue'}, ['3'])"
    pred, shown = played(Base, [paint, "wait('long')", "rules()", "paint('green', {}, [])"])
    assert [turn.status for turn in pred.turns] == ["ok", "ok", "ok", "invalid"]
    assert [turn.result for turn in pred.turns[:3]] == ["{'painted': 'red'}", "4", "no running"]
    assert "paint(colour: one of 'red', 'blue', at: {'x': int, 'colour': one of" in shown
    assert "'red' or 'blue'" in pred.turns[3].result


@dataclasses.dataclass
class Pen:
    colour: Colour
    width: int = 1


class Box(TypedDict):
    pens: list[Pen]


@dataclasses.dataclass
class Frame:
    pen: Pen
    inner: Frame | None = None


class Node(pydantic.BaseModel):
    value: int
    kids: list[Node] = []
    by_name: dict[str, Node] = {}


NODE = "{'value': int, 'kids': list[Node], 'by_name': dict[str, Node]}"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (list[Colour], "list[one of 'red', 'blue']"),
        (Colour | None, "one of 'red', 'blue' or None"),
        (dict[str, Pen], "dict[str, {'colour': one of 'red', 'blue', 'width': int}]"),
        (Box, "{'pens': list[{'colour': one of 'red', 'blue', 'width': int}]}"),
        (list[int], "list[int]"),
        (Literal["red"], "Literal['red']"),
        (Node, NODE),
        (tuple[Node, Node], f"tuple[{NODE}, {NODE}]"),
        (Frame, "{'pen': {'colour': one of 'red', 'blue', 'width': int}, 'inner': Frame or None}"),
    ],
)
def test_of_types_within_others_the_model_is_told_too(kind, told):
    def draw(self, what, more=1): ...

    draw.__annotations__ = {"what": kind, "more": int}
    _, shown = played(broken_by(draw=draw), ["nothing"])
    assert f"draw(what: {told}, more: int)" in shown.replace("typing.", "")


def test_of_an_inherited_method_that_is_the_childs():
    pred, shown = played(Child, ["wait(how='on')"])
    assert (pred.done, pred.turns[0].result) == (True, "waited on")
    assert "Wait otherwise." in shown and "made" not in shown and "_private" not in shown


@pytest.mark.parametrize(
    ("begins", "seen"),
    [
        (None, ""),
        ("a hall", "a hall"),
        ([{"type": "text", "text": "a"}, {"type": "image", "image": 1}], "a\n[image: not shown]"),
        ({"place": "hall"}, "{'place': 'hall'}"),
        ([], "[]"),
        (np.zeros(3), "[0. 0. 0.]"),
        (
            {"at": (np.int64(3), np.ones(2)), "who": ["a", None]},
            "{'at': (3, [1. 1.]), 'who': ['a', None]}",
        ),
        ([{"type": "key", "colour": "red"}], "[{'type': 'key', 'colour': 'red'}]"),
        ([{"type": "text"}], "[{'type': 'text'}]"),
    ],
)
def test_reset_may_return_anything_in_words(begins, seen):
    class Begins(Base):
        async def reset(self):
            return begins

    pred, _ = played(Begins, ["rules()"], unknown="of no interest to it")
    assert pred.turns[0].observation == seen


@pytest.mark.parametrize(
    "begins",
    [
        [{"type": "image", "image": 1}],
        np.zeros((64, 64, 3)),
        {"mission": "go", "seen": [np.zeros((64, 64, 3))]},
        pytest.param("PIL", id="PIL"),
    ],
)
def test_pictures_are_refused_with_a_word(begins):
    if isinstance(begins, str):
        begins = pytest.importorskip("PIL.Image").new("RGB", (4, 4))

    class Begins(Base):
        def reset(self):
            return begins

    with pytest.raises(ProgramError, match="pictures cannot be shown to the model yet"):
        played(Begins, ["rules()"])


def test_a_gymnasium_of_pixels_is_refused_when_it_is_made():
    gymnasium = pytest.importorskip("gymnasium")

    class Pixels(gymnasium.Wrapper):
        observation_space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    with pytest.raises(ProgramError, match=r"observation of \(64, 64, 3\).*describe="):
        fst_dspy.env(fst_dspy.gym_factory("FrozenLake-v1", wrap=Pixels))
    told = fst_dspy.gym_factory("FrozenLake-v1", wrap=Pixels, describe=lambda seen, env: "ice")
    assert fst_dspy.env(told) is not None


def rewarded(**members):
    return type("Rewarded", (Base,), members)


@pytest.mark.parametrize(
    ("kind", "reward"),
    [
        (rewarded(reset=lambda self: setattr(self, "reward", 0.5)), 0.5),
        (rewarded(reset=lambda self: None, reward=property(lambda self: 0.25)), 0.25),
        (rewarded(reset=lambda self: None, reward=lambda self: 1), 1.0),
        (rewarded(reset=lambda self: None, reward=np.array([0.75])), 0.75),
        (rewarded(reset=lambda self: None, reward=float("nan")), None),
        (rewarded(reset=lambda self: None, get_reward=lambda self: 2, reward=0.5), 2.0),
        (rewarded(reset=lambda self: None), None),
    ],
)
def test_a_reward_may_be_an_attribute_a_property_or_a_method(kind, reward):
    assert "reward" not in contract.tools_of(kind())
    pred, _ = played(kind, ["rules()"])
    assert pred.reward == reward


def test_done_and_feedback_that_are_methods_are_tools():
    class Says(Base):
        def done(self) -> str:
            """Say that it is done."""
            return "well"

        def feedback(self) -> str:
            """Give feedback."""
            return "thanks"

        def reset(self): ...

    pred, _ = played(Says, ["done()", "feedback()"])
    assert [turn.result for turn in pred.turns] == ["well", "thanks"]
    assert (pred.done, pred.feedback) == (False, "")
    pred = fst_dspy.env(Says, max_turns=1, processes=True)
    with dspy.context(lm=DummyLM([{"action": "done()"}]), adapter=dspy.ChatAdapter()):
        assert pred().turns[0].result == "well"


def broken_by(**members):
    return type("Broken", (), {"reset": lambda self, **fields: None, **members})


def fails(self):
    raise OSError("no licence")


def unwritable(self, x: np.ndarray): ...


def unnamed(self, x, /): ...


def unreadable(self, x): ...


unreadable.__annotations__ = {"x": "Nowhere"}


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (broken_by(__init__=fails), "cannot be made: OSError: no licence"),
        ({"good": Base, "bad": broken_by(__init__=fails)}, "'bad' cannot be made"),
        (broken_by(), "has no tool"),
        (type("NoReset", (), {"act": fails}), r"has no reset\(\)"),
        ({}, "needs a factory"),
        (broken_by(act=unwritable), "is a numpy.ndarray, which cannot be written"),
        (broken_by(act=unnamed), "has no name to be called by"),
        (broken_by(act=unreadable), "cannot be read: name 'Nowhere'"),
    ],
)
def test_what_cannot_be_served_is_refused_when_it_is_made(factory, said):
    with pytest.raises(ProgramError, match=said):
        fst_dspy.env(factory)


def test_a_field_that_reset_needs_and_the_example_lacks_is_named():
    class Needs(Base):
        def reset(self, seed: int, level: int = 1): ...

    with pytest.raises(ProgramError, match=r"needs 'seed', and the example has 'way'"):
        played(Needs, ["rules()"], way="left")


class Steered:
    """A tool of one argument, whose values are texts."""

    def reset(self):
        self.done, self.reward = False, 0.0

    def steer(self, way: Literal["0", "1"]) -> str:
        """Steer."""
        self.done, self.reward = True, float(way)
        return "steered"


class Way(enum.Enum):
    LEFT = "0"
    RIGHT = "1"


@pytest.mark.parametrize("kind", [int, Way, Literal[0, 1]])
def test_an_action_of_a_type_of_the_users_own_is_understood(kind):
    signature = dspy.Signature("observation -> action").with_updated_fields("action", type_=kind)
    with dspy.context(lm=DummyLM([{"action": "1"}]), adapter=dspy.ChatAdapter()):
        pred = fst_dspy.env(Steered, signature)()
    assert ([turn.status for turn in pred.turns], pred.reward) == (["ok"], 1.0)
    assert pred.turns[0].action == "1"


class Move(pydantic.BaseModel):
    steps: int
    fast: bool = False


class Walk(Base):
    def walk(self, steps: int, fast: bool = False) -> str:
        """Walk."""
        return f"{steps} {fast}"


class OneTool:
    def reset(self):
        return ""

    def walk(self, steps: int, fast: bool = False) -> str:
        """Walk."""
        return f"{steps} {fast}"


def test_a_model_may_be_the_arguments_of_the_only_tool():
    signature = dspy.Signature("observation -> action").with_updated_fields("action", type_=Move)
    answer = DummyLM([{"action": '{"steps": 2, "fast": true}'}])
    with dspy.context(lm=answer, adapter=dspy.ChatAdapter()):
        pred = fst_dspy.env(OneTool, signature, max_turns=1)()
    assert pred.turns[0].result == "2 True"


@pytest.mark.parametrize("kind", [int, bool, Move, list[str], Literal["fly"]])
def test_a_type_whose_values_are_no_actions_is_refused(kind):
    signature = dspy.Signature("observation -> action").with_updated_fields("action", type_=kind)
    with pytest.raises(ProgramError, match="make it a str"):
        fst_dspy.env(Walk, signature)


def test_of_several_environments_a_type_that_none_can_read_is_refused_too():
    signature = dspy.Signature("observation -> action").with_updated_fields("action", type_=Move)
    with pytest.raises(ProgramError, match="make it a str"):
        fst_dspy.env({"base": Base, "walk": Walk}, signature)
    narrow = signature.with_updated_fields("action", type_=Literal["rules()", "0"])
    assert fst_dspy.env({"base": Base, "steered": Steered}, narrow) is not None


def test_agents_arguments_that_do_not_fit_are_invalid_turns():
    def asks(**arguments):
        return {"next_thought": "?", "next_tool_name": "steer", "next_tool_args": arguments}

    lm = DummyLM([asks(wheel="0"), asks(way="7"), asks(way="1"), {"reasoning": "", "answer": "x"}])
    program = fst_dspy.env(Steered, "observation -> answer", agent=dspy.ReAct, max_turns=5)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        pred = program()
    assert [turn.status for turn in pred.turns] == ["invalid", "invalid", "ok"]
    assert "wheel" in pred.turns[0].action and pred.reward == 1.0
    assert "wheel" in fst_dspy.env_reward(None, pred).feedback


def test_a_connection_that_breaks_under_an_agent_loses_the_rollout():
    class Offline(Steered):
        def steer(self, way: str) -> str:
            """Steer."""
            raise ConnectionError("the server is down")

    lm = DummyLM([{"next_thought": "?", "next_tool_name": "steer", "next_tool_args": {"way": "1"}}])
    program = fst_dspy.env(Offline, "observation -> answer", agent=dspy.ReAct)
    with (
        dspy.context(lm=lm, adapter=dspy.ChatAdapter()),
        pytest.raises(ConnectionError, match="the server is down"),
    ):
        program()


def test_an_agent_is_not_given_two_tools_of_one_name():
    class Other(Steered):
        def steer(self, degrees: int) -> str:
            """Steer."""
            return ""

    factories = {"a": Steered, "b": Other}
    with pytest.raises(ProgramError, match="'steer' with different arguments"):
        fst_dspy.env(factories, "observation -> answer", agent=dspy.ReAct)


def test_an_agents_own_tool_does_not_take_the_place_of_the_environments():
    class Exam(Steered):
        def finish(self, answer: str) -> str:
            """Hand in."""
            return "handed in"

    with pytest.raises(ProgramError, match="'finish', which ReAct has of its own"):
        fst_dspy.env(Exam, "observation -> answer", agent=dspy.ReAct)


def test_what_agents_write_of_their_arguments_is_what_a_model_writes():
    def asks(**arguments):
        return {"next_thought": "?", "next_tool_name": "paint", "next_tool_args": arguments}

    class Once(Base):
        def paint(self, colour: Colour, at: Point, sizes: list[int]):
            """Paint."""
            self.done = True

    lm = DummyLM([asks(colour="red", at={"x": 1, "colour": "blue"}, sizes=[2])])
    program = fst_dspy.env(Once, "observation -> answer", agent=dspy.ReAct)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        (turn,) = program().turns
    assert turn.action == """paint(colour='red', at={"x":1,"colour":"blue"}, sizes=[2])"""


def test_reset_is_told_what_it_lacks_whatever_else_it_takes():
    class Asking(Base):
        def reset(self, prompt, **fields):
            return prompt

    with dspy.context(lm=DummyLM([])), pytest.raises(ProgramError, match="needs 'prompt'"):
        fst_dspy.env(Asking)(question="?")
