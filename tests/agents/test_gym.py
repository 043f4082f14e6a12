from __future__ import annotations

import sys
import types
from typing import Literal

import dspy
import numpy as np
import pytest
from dspy.utils import DummyLM
from environments import Hall

import fst_dspy
from fst_dspy.errors import ProgramError

gymnasium = pytest.importorskip("gymnasium")


def test_an_id_is_enough():
    program = fst_dspy.env("FrozenLake-v1", max_turns=3)
    with dspy.context(lm=DummyLM([{"action": "2"}] * 3), adapter=dspy.ChatAdapter()):
        pred = program(seed=1)
    assert [turn.action for turn in pred.turns] == ["2"] * len(pred.turns)
    assert pred.reward == 0.0


def test_actions_have_names_and_observations_words():
    make = fst_dspy.gym_factory(
        "FrozenLake-v1",
        actions=("left", "down", "right", "up"),
        describe=lambda place, environment: f"field {place}",
        is_slippery=False,
    )
    environment = make()
    assert environment.reset(seed=1) == "field 0"
    assert [environment.act(step) for step in ("down", "down", "right", "right")] == [
        "field 4", "field 8", "field 9", "field 10",
    ]  # fmt: skip
    environment.act("down")
    environment.act("right")
    assert (environment.done, environment.reward) == (True, 1.0)
    with pytest.raises(ValueError, match="over"):
        environment.act("right")
    environment.close()


def test_minigrids_own_actions_and_mission_are_used():
    pytest.importorskip("minigrid")
    environment = fst_dspy.gym_factory("MiniGrid-GoToDoor-5x5-v0")()
    environment.reset(seed=1)
    assert environment.mission.startswith("go to the")
    assert "forward" in str(environment.fst_tools()["act"].__annotations__["action"])
    environment.close()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("NoSuchGame-v9", {}, "cannot make"),
        ("FrozenLake-v1", {"actions": ("left", "right")}, "has 4 actions"),
        ("MountainCarContinuous-v0", {}, "not discrete"),
    ],
)
def test_what_does_not_fit_is_told(name, settings, said):
    with pytest.raises(ProgramError, match=said):
        fst_dspy.gym_factory(name, **settings)()


def test_an_environment_of_gymnasiums_is_adapted_whoever_makes_it():
    program = fst_dspy.env(lambda: gymnasium.make("FrozenLake-v1"), max_turns=2)
    with dspy.context(lm=DummyLM([{"action": "2"}] * 2), adapter=dspy.ChatAdapter()):
        pred = program(seed=1)
    assert [turn.status for turn in pred.turns] == ["ok"] * len(pred.turns)
    assert pred.reward == 0.0


def test_so_it_is_in_a_process_of_its_own():
    program = fst_dspy.env(lambda: gymnasium.make("FrozenLake-v1"), max_turns=1, processes=True)
    with dspy.context(lm=DummyLM([{"action": "2"}]), adapter=dspy.ChatAdapter()):
        assert program(seed=1).turns[0].status == "ok"


def test_gymnasium_may_be_in_the_middle_of_its_import_by_another_thread(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", types.ModuleType("gymnasium"))
    program = fst_dspy.env(Hall)
    with dspy.context(lm=DummyLM([{"action": "left"}]), adapter=dspy.ChatAdapter()):
        assert program(way="left").reward == 1.0


class Spaced(gymnasium.Env):
    """Shows which number it was given."""

    observation_space = gymnasium.spaces.Discrete(9)

    def __init__(self, space):
        self.action_space = space

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return action, np.array([0.5]), False, False, {}  # as some give rewards


def test_actions_are_counted_from_where_they_start():
    program = fst_dspy.env(lambda: Spaced(gymnasium.spaces.Discrete(3, start=-1)), max_turns=2)
    with dspy.context(lm=DummyLM([{"action": "-1"}, {"action": "1"}]), adapter=dspy.ChatAdapter()):
        pred = program(seed=np.int64(3))  # as a generator of numpy's draws them
    assert [(turn.action, turn.result) for turn in pred.turns] == [("-1", "-1"), ("1", "1")]
    assert pred.reward == 1.0


@pytest.mark.parametrize("space", [gymnasium.spaces.MultiBinary(3), gymnasium.spaces.Box(0, 1)])
def test_actions_that_are_not_discrete_are_refused(space):
    with pytest.raises(ProgramError, match="not discrete"):
        fst_dspy.env(lambda: Spaced(space))


def test_pictures_within_other_observations_are_refused_when_it_is_made():
    spaces = gymnasium.spaces
    picture = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    for whole in (spaces.Tuple([picture]), spaces.Dict(seen=spaces.Dict(camera=picture))):

        class Seeing(Spaced):
            observation_space = whole

        with pytest.raises(ProgramError, match=r"shows pictures \((0|camera) of"):
            fst_dspy.env(lambda: Seeing(spaces.Discrete(2)))


def test_a_wrapper_may_leave_actions_out():
    pytest.importorskip("minigrid")

    class Fewer(gymnasium.ActionWrapper):
        def __init__(self, environment):
            super().__init__(environment)
            self.action_space = gymnasium.spaces.Discrete(3)

        def action(self, action):
            return action

    environment = fst_dspy.gym_factory("MiniGrid-Empty-5x5-v0", wrap=Fewer)()
    assert environment.fst_tools()["act"].__annotations__["action"] == Literal["0", "1", "2"]
    environment.close()
