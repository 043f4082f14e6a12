"""What an agent is told: all that the environment has shown, as it was when it was shown."""

from __future__ import annotations

from typing import Any, Literal

import dspy
import numpy as np
import pydantic
import pytest
from dspy.utils import DummyLM
from environments import Hall

import fst_dspy
from fst_dspy.errors import ProgramError
from fst_dspy.rollouts.checks import check_input

CHAT = dspy.ChatAdapter(use_json_adapter_fallback=False)


def play(program: dspy.Module, *answers: Any, **fields: Any) -> tuple[dspy.Prediction, list[str]]:
    """An episode, and the text of each call's messages."""
    lm = DummyLM([a if isinstance(a, dict) else {"action": a} for a in answers])
    with dspy.context(lm=lm, adapter=CHAT):
        pred = program(**fields)
    return pred, ["\n\n".join(m["content"] for m in one["messages"]) for one in lm.history]


class Counter:
    """By TRL's documentation: the task is in what ``reset`` returns."""

    def reset(self, target: int, **kwargs: Any) -> str:
        self.count, self.target, self.reward, self.done = 0, target, 0.0, False
        return f"Increment the counter until it reaches {target}."

    def increment(self, step: int) -> int:
        """Increment the counter.

        Args:
            step: By how much,
                never more than 5.

        Returns:
            The new count, which is no argument: 7.
        """
        if step > 5:
            raise ValueError("too much")
        self.count += step
        self.reward = float(self.count == self.target)
        return self.count


def test_what_was_seen_first_stays_in_the_history() -> None:
    told = play(fst_dspy.env(Counter, max_turns=3), "3", "9", "4", target=7)[1]
    assert all("until it reaches 7" in text for text in told)
    assert "2. 9 -> ValueError: too much" in told[2]


def test_long_results_are_told_whole() -> None:
    class Page(Hall):
        def go(self, direction: Literal["left", "right", "up"]) -> str:
            """Go in a direction."""
            return "word " * 200 + "end"

    told = play(fst_dspy.env(Page, max_turns=3), "left", "left", "left", way="right")[1]
    assert told[2].count("word end") == 3  # two in the history, one before the eyes


def test_a_history_of_dspys_tells_what_went_wrong_and_what_was_thought() -> None:
    class Act(dspy.Signature):
        observation: str = dspy.InputField()
        history: dspy.History = dspy.InputField()
        reasoning: str = dspy.OutputField()
        action: str = dspy.OutputField()

    actions = ("right", "up", "left")
    answers = [{"reasoning": f"thought {n}", "action": a} for n, a in enumerate(actions)]
    pred, told = play(fst_dspy.env(Hall, Act), *answers, way="left")
    assert [turn.said for turn in pred.turns] == [{"reasoning": f"thought {n}"} for n in range(3)]
    assert "ValueError: there are no stairs\na wall" in told[2]
    assert "thought 0" in told[2] and "thought 1" in told[2]
    assert "None" not in told[2]


def test_arguments_are_told_with_what_their_docstring_says_of_them() -> None:
    told = play(fst_dspy.env(Counter, max_turns=1), "3", target=7)[1][0]
    assert "step: By how much, never more than 5." in told
    assert "The new count" not in told


def test_what_the_environment_changes_in_place_is_told_as_it_was() -> None:
    class Board:
        def reset(self) -> list[int]:
            self.board, self.done = [0, 0], False
            return self.board

        def mark(self, cell: int) -> list[int]:
            """Mark a cell."""
            self.board[cell] = 1
            self.done = all(self.board)
            return self.board

    pred, _ = play(fst_dspy.env(Board), "0", "1")
    assert [(turn.observation, turn.result) for turn in pred.turns] == [
        ("[0, 0]", "[1, 0]"),
        ("[1, 0]", "[1, 1]"),
    ]
    program = fst_dspy.env(Board, "observation: list[int] -> action")
    lm = DummyLM([{"action": "0"}, {"action": "1"}])
    with dspy.context(lm=lm, adapter=CHAT, trace=[]):
        program()
        assert [inputs["observation"] for _, inputs, _ in dspy.settings.trace] == [[0, 0], [1, 0]]


def test_attributes_are_read_anew_each_turn_and_may_be_called_actions() -> None:
    class Text:
        def reset(self) -> str:
            self.inventory, self.actions, self.done = "nothing", ["take lamp"], False
            return "a cellar"

        def do(self, move: str) -> str:
            """Do something."""
            self.inventory, self.actions = "a lamp", ["light lamp"]
            return "taken"

    program = fst_dspy.env(Text, "observation, inventory, actions -> action", max_turns=2)
    first, second = play(program, "take lamp", "light lamp")[1]
    assert "nothing" in first and "take lamp" in first
    assert "a lamp" in second and "light lamp" in second and "nothing" not in second


@pytest.mark.parametrize("one", [np.bool_(True), np.array(1.0), np.float32(1.0), 1, True])
def test_a_reward_is_a_number_of_any_kind(one: Any) -> None:
    class Paid(Hall):
        def go(self, direction: Literal["left", "right", "up"]) -> str:
            """Go in a direction."""
            self.reward, self.done = one, True
            return "you are out"

    pred, _ = play(fst_dspy.env(Paid), "left", way="left")
    assert (pred.reward, pred.turns[0].reward) == (1.0, 1.0)


def test_a_reward_that_is_no_number_yet_is_none_and_does_not_spoil_the_turns() -> None:
    class Late(Hall):
        def reset(self, way: str, **fields: object) -> str:
            said = super().reset(way)
            self.reward = float("nan")
            return said

        def get_reward(self) -> float:
            return 0.5

    pred, _ = play(fst_dspy.env(Late, max_turns=2), "right", "left", way="left")
    assert pred.reward == 0.5
    assert [turn.reward for turn in pred.turns] == [0.0, 1.0]


def test_the_action_is_the_field_of_that_name_or_else_the_last() -> None:
    program = fst_dspy.env(Hall, "observation -> action, confidence: float")
    pred, _ = play(program, {"action": "left", "confidence": "0.5"}, way="left")
    assert (pred.reward, pred.turns[0].said) == (1.0, {"confidence": "0.5"})
    with pytest.raises(ProgramError, match="the output field 'feedback' has the name"):
        fst_dspy.env(Hall, "observation -> feedback, action")


def test_labels_are_no_episode_and_the_metric_says_nothing_of_them() -> None:
    with pytest.raises(AttributeError):
        fst_dspy.env_reward(None, dspy.Prediction(level=1))
    train = [dspy.Example(way="left", level=n).with_inputs("way") for n in range(4)]
    program = fst_dspy.env(Hall)
    program.set_lm(fst_dspy.LocalLM("embedded"))
    check_input(program, fst_dspy.env_reward, train, None)


class Point(pydantic.BaseModel):
    x: int
    colour: Literal["red", "blue"] = "red"


@pytest.mark.parametrize("kind", [str, dspy.History])
def test_an_action_stands_in_the_history_as_it_is_written(kind: Any) -> None:
    class Wall(Hall):
        def go(self, at: Point) -> str:  # type: ignore[override]
            """Paint."""
            return "painted"

    signature = dspy.Signature("observation, history, -> plan: list[int], action")
    signature = signature.with_updated_fields("history", type_=kind)
    answers = [{"plan": "[1, 2]", "action": '{"x": 1}'}] * 2
    pred, told = play(fst_dspy.env(Wall, signature, max_turns=2), *answers, way="left")
    assert pred.turns[0].action == '{"x":1,"colour":"red"}'
    assert pred.turns[0].said == {"plan": "[1,2]"}
    assert '{"x":1,"colour":"red"}' in told[1] and "x=1" not in told[1]


def test_a_history_may_be_a_list_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    program = fst_dspy.env(Hall, "observation, history: list[str] -> action")
    told = play(program, "right", "left", way="left")[1]
    assert '["0. you stand in a hall", "1. right -> a wall"]' in told[1]
    assert "Type mismatch" not in caplog.text
