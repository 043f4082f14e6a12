from __future__ import annotations

import pytest

from fst_dspy.agents import contract
from fst_dspy.agents.actions import ActionForm, InvalidActionError
from fst_dspy.agents.event_loop import EventLoop
from fst_dspy.errors import ProgramError


class Base:
    def reset(self, level=0, **fields):
        return [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]

    def move(self, steps: int, fast: bool = False) -> str:
        """Move on.

        Args:
            steps: How many.
        """
        return f"moved {steps} {fast}"

    def _hidden(self):
        raise AssertionError

    @property
    def costly(self):
        raise AssertionError("properties are not to be looked at")


class Game(Base):
    reward = 0.5

    def look(self) -> str:
        """Look around."""
        return "nothing"

    async def get_reward(self):
        return 0.75

    def close(self):
        raise RuntimeError("closed badly")


def test_public_methods_are_the_tools_and_properties_are_not_evaluated():
    assert list(contract.tools_of(Game())) == ["move", "look"]


def test_an_environment_without_reset_or_tools_is_refused():
    class Nothing:
        def reset(self): ...

    with pytest.raises(ProgramError, match="no tool"):
        contract.tools_of(Nothing())
    with pytest.raises(ProgramError, match="no reset"):
        contract.tools_of(object())


def test_reset_is_given_the_fields_that_it_takes():
    class Strict(Base):
        def reset(self, level):
            return f"level {level}"

    assert contract.reset(Strict(), {"level": 3, "answer": "x"}, EventLoop()) == "level 3"


def test_content_blocks_are_read_as_their_texts():
    assert contract.as_text(Game().reset()) == "a\n[image: not shown]\nb"
    assert contract.as_text(None) == ""


def test_the_environments_own_reward_may_be_awaited_and_wins_over_the_attribute():
    assert contract.final_reward(Game(), EventLoop()) == 0.75
    assert contract.reward_so_far(Game()) == 0.5
    assert contract.reward_so_far(Base()) is None


def test_errors_on_closing_are_of_no_use_to_anybody():
    contract.close(Game(), EventLoop())


def test_of_several_environments_the_example_names_its_own():
    factories = {"a": Game, "b": Base}
    assert contract.factory_for(factories, "b") is Base
    with pytest.raises(ProgramError, match="must name one of 'a', 'b'"):
        contract.factory_for(factories, "c")
    with pytest.raises(ProgramError, match="needs a field 'environment'"):
        contract.factory_for(factories, None)


@pytest.mark.parametrize(
    ("written", "tool", "arguments"),
    [
        ("move(steps=2)", "move", {"steps": 2}),
        ("move(2, True)", "move", {"steps": 2, "fast": True}),
        ("move(2, fast=true)", "move", {"steps": 2, "fast": True}),
        (" move('3') ", "move", {"steps": 3}),
        ("look()", "look", {}),
        ("look", "look", {}),
    ],
)
def test_a_call_is_read_with_typed_arguments(written, tool, arguments):
    form = ActionForm.of(contract.tools_of(Game()))
    assert form.kind == "call"
    assert form.read(written) == (tool, arguments)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("jump()", "must be one of move, look"),
        ("move()", "lacks steps"),
        ("move(steps=1, up=2)", "has no up"),
        ("move(steps='many')", "steps='many' is wrong"),
        ("move(steps=__import__('os'))", "not written as a call"),
        ("move(steps=two)", "not written as a call"),
        ("I would move", "not written as a call"),
        ("move(**{'steps': 1})", "not written as a call"),
        ("move(1, 2, 3)", "has 2 arguments, not 3"),
        ("look(1)", "has 0 arguments, not 1"),
        ("move(1, steps=2)", "has each argument once"),
        ("move(steps=1, steps=2)", "not written as a call"),
        ("(" * 500, "not written as a call"),
        ("", "not written as a call"),
    ],
)
def test_what_is_no_action_says_what_would_be_one(written, said):
    with pytest.raises(InvalidActionError, match=said):
        ActionForm.of(contract.tools_of(Game())).read(written)


def test_tools_without_arguments_are_called_by_name():
    class Buttons:
        def reset(self): ...
        def left(self): ...
        def right(self): ...

    form = ActionForm.of(contract.tools_of(Buttons()))
    assert form.kind == "name"
    assert form.annotation.__args__ == ("left", "right")
    assert form.read("left") == ("left", {}) == form.read("left()")


def test_the_description_names_the_tools_with_their_first_paragraph_and_arguments():
    said = ActionForm.of(contract.tools_of(Game())).description
    assert (
        "- move(steps: int, fast: bool): Move on.\n  steps: How many.\n- look: Look around." in said
    )
