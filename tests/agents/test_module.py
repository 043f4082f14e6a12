from __future__ import annotations

import asyncio
import copy
import threading
import weakref

import dspy
import pytest
from dspy.utils import DummyLM
from environments import Hall

import fst_dspy
from fst_dspy.errors import MetricError, ProgramError


def answers(*texts: str) -> DummyLM:
    return DummyLM([{"action": text} for text in texts])


def play(program: dspy.Module, lm: dspy.BaseLM, **fields):
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        return program(**fields)


def test_an_episode_is_played_turn_by_turn_until_the_environment_is_done():
    pred = play(fst_dspy.env(Hall), answers("right", "up", "left", "left"), way="left")
    assert [(t.action, t.result, t.status, t.reward) for t in pred.turns] == [
        ("right", "a wall", "ok", 0.0),
        ("up", "ValueError: there are no stairs", "error", 0.0),
        ("left", "you are out", "ok", 1.0),
    ]
    assert (pred.done, pred.reward, pred.action) == (True, 1.0, "left")
    assert [turn.observation for turn in pred.turns[:2]] == ["you stand in a hall", "a wall"]


def test_an_answer_that_cannot_be_read_is_an_invalid_turn_and_the_episode_goes_on():
    pred = play(fst_dspy.env(Hall), answers("nowhere", "left"), way="left")
    assert [turn.status for turn in pred.turns] == ["invalid", "ok"]
    assert "action" in pred.turns[0].result


def test_it_is_cut_off_after_max_turns_and_the_environment_closed():
    before = Hall.closed
    program = fst_dspy.env(Hall, max_turns=2)
    pred = play(program, answers("right", "right", "left"), way="left")
    assert (len(pred.turns), pred.done) == (2, False)
    assert Hall.closed == before + 2  # the one that was probed, too


def test_the_environment_is_closed_whatever_happens():
    class Lost(Hall):
        def go(self, direction: str) -> str:
            raise ConnectionError("the server is down")

    program, before = fst_dspy.env(Lost), Hall.closed
    with pytest.raises(ConnectionError):
        play(program, answers("left"), way="left")
    assert Hall.closed == before + 1


def test_the_model_is_told_its_actions_and_what_happened():
    lm = answers("right", "left")
    play(fst_dspy.env(Hall), lm, way="left")
    first, second = (entry["messages"] for entry in lm.history)
    assert "Your action is the direction: Go in a direction." in first[0]["content"]
    assert "must exactly match" in first[0]["content"]  # a Literal
    assert "(nothing yet)" in first[-1]["content"]
    assert "1. right -> a wall" in second[-1]["content"]


def test_an_action_without_effect_leaves_what_was_seen_and_says_why():
    def seen(signature: str) -> list[str]:
        lm = answers("right", "up", "nowhere", "left")
        pred = play(fst_dspy.env(Hall, signature), lm, way="left")
        assert [turn.observation for turn in pred.turns[1:]] == ["a wall"] * 3
        return [entry["messages"][-1]["content"] for entry in lm.history]

    told, error = seen("observation, history -> action"), "ValueError: there are no stairs"
    assert all("a wall" in text for text in told[1:])
    assert f"2. up -> {error}" in told[2]
    assert told[2].count(error) == 1  # the history says it
    forgetful = seen("observation -> action")
    assert f"{error}\na wall" in forgetful[2]
    assert error not in forgetful[3]
    assert "The answer did not state the fields action as asked.\na wall" in forgetful[3]


def test_history_may_be_dspys_own():
    class Act(dspy.Signature):
        observation: str = dspy.InputField()
        history: dspy.History = dspy.InputField()
        action: str = dspy.OutputField()

    lm = answers("right", "left")
    play(fst_dspy.env(Hall, Act), lm, way="left")
    roles = [message["role"] for message in lm.history[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_other_inputs_come_from_the_example_or_the_environment():
    class Mission(Hall):
        def reset(self, way: str) -> str:
            self.mission = f"find the {way} exit"
            return super().reset(way)

    lm = answers("left")
    play(fst_dspy.env(Mission, "mission, observation -> action"), lm, way="left")
    assert "find the left exit" in lm.history[-1]["messages"][-1]["content"]
    with pytest.raises(ProgramError, match="'weather' is neither a field"):
        play(fst_dspy.env(Hall, "weather, observation -> action"), lm, way="left")


def test_of_several_environments_each_example_plays_its_own_and_sees_its_actions():
    class Lift(Hall):
        def press(self, floor: int) -> str:
            """Press a button."""
            self.done, self.reward = True, float(floor)
            return "up"

    program = fst_dspy.env({"hall": Hall, "lift": Lift})
    lm = answers("press(floor=7)", "left")
    assert play(program, lm, environment="lift", way="left").reward == 7.0
    assert "press(floor: int)" in lm.history[-1]["messages"][-1]["content"]
    assert play(program, lm, environment="hall", way="left").reward == 1.0
    assert "press" not in lm.history[-1]["messages"][-1]["content"]
    with pytest.raises(ProgramError, match="must name one of 'hall', 'lift'"):
        play(program, lm, environment="attic", way="left")


def test_which_environment_it_is_may_be_an_input():
    program = fst_dspy.env({"hall": Hall}, "environment, observation -> action")
    lm = answers("left")
    assert play(program, lm, environment="hall", way="left").reward == 1.0
    assert "[[ ## environment ## ]]\nhall" in lm.history[-1]["messages"][-1]["content"]


def test_an_environment_is_in_one_episode_at_a_time():
    class Shared(Hall):
        def reset(self, way: str) -> str:
            if way == "both":
                play(program, answers("left"), way="left")
            return super().reset(way)

    one = Shared()
    program = fst_dspy.env(lambda: one)
    for _ in range(2):  # one after the other does no harm
        assert play(program, answers("left"), way="left").reward == 1.0
    with pytest.raises(ProgramError, match="two episodes were given one Shared at once"):
        play(program, answers("left"), way="both")
    assert play(program, answers("left"), way="left").reward == 1.0


def test_a_program_does_not_keep_the_environment_that_it_was_made_with():
    class Locked(Hall):
        def __init__(self) -> None:
            made.append(weakref.ref(self))
            self.lock = threading.Lock()

    made = []
    for agent in (None, dspy.ReAct):
        program = fst_dspy.env(Locked, "observation -> action", agent=agent)
        assert made[-1]() is None
        copy.deepcopy(program)


def test_what_an_episode_comes_back_to_is_answered_anew_and_the_episode_as_before(tiny_qwen3):
    class Same(dspy.ChatAdapter):
        def format(self, signature, demos, inputs):
            return [{"role": "user", "content": "the same"}]

        def parse(self, signature, completion):
            return {"action": f"said {completion}"}

    lm = fst_dspy.LocalLM(str(tiny_qwen3), max_tokens=4, seed=0)
    program = fst_dspy.env(Hall, "observation -> action", max_turns=4)
    with dspy.context(lm=lm, adapter=Same()):
        first, second = ([turn.action for turn in program(way="left").turns] for _ in range(2))
    assert len(set(first[1:])) > 1  # what is seen is the same from the second turn on
    assert first == second
    greedy = lm.copy(temperature=0.0)
    with dspy.context(lm=greedy, adapter=Same()):
        program(way="left")
    assert all("rollout_id" not in entry["kwargs"] for entry in greedy.history)


def test_it_is_awaited_without_a_warning(caplog):
    program = fst_dspy.env(Hall)
    with dspy.context(lm=answers("left"), adapter=dspy.ChatAdapter()):
        assert asyncio.run(program.acall(way="left")).reward == 1.0
    assert "discouraged" not in caplog.text


def test_an_agent_keeps_a_history_of_its_own(caplog):
    left = {"next_thought": "!", "next_tool_name": "go", "next_tool_args": {"direction": "left"}}
    program = fst_dspy.env(Hall, agent=dspy.ReAct)
    assert play(program, DummyLM([left]), way="left").reward == 1.0
    assert "Missing" not in caplog.text
    assert fst_dspy.env(Hall, agent=dspy.ReActV2) is not None


def test_react_acts_with_the_environments_tools():
    lm = DummyLM(
        [
            {"next_thought": "?", "next_tool_name": "go", "next_tool_args": '{"direction": "up"}'},
            {
                "next_thought": "!",
                "next_tool_name": "go",
                "next_tool_args": '{"direction": "left"}',
            },
        ]
    )
    program = fst_dspy.env(Hall, "observation -> answer", agent=dspy.ReAct, max_turns=5)
    pred = play(program, lm, way="left")
    assert [turn.status for turn in pred.turns] == ["error", "ok"]
    assert (pred.reward, pred.done) == (1.0, True)


def test_an_agents_tool_outside_an_episode_says_so():
    program = fst_dspy.env(Hall, "observation -> answer", agent=dspy.ReAct)
    with pytest.raises(RuntimeError, match="no episode is running"):
        program.agent.tools["go"](direction="left")


def test_the_metric_is_the_environments_reward_with_what_went_wrong():
    pred = play(fst_dspy.env(Hall, max_turns=3), answers("up", "nowhere", "right"), way="left")
    found = fst_dspy.env_reward(None, pred)
    assert found.score == 0.0
    assert found.feedback.splitlines() == [
        "the way out was left",
        "Turn 1, 'up': ValueError: there are no stairs",
        f"Turn 2, {pred.turns[1].action!r}: {pred.turns[1].result}",
        "The episode was cut off after 3 turns with reward 0.",
    ]
    with pytest.raises(MetricError, match="gives no reward"):
        fst_dspy.env_reward(None, dspy.Prediction(reward=None, turns=()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fst_dspy.env(Hall, max_turns=0), "at least 1"),
        (lambda: fst_dspy.env(Hall, step_timeout=3), "needs processes=True"),
        (lambda: fst_dspy.env(3), "got int"),
        (lambda: fst_dspy.env({}), "a factory"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make, said):
    with pytest.raises(ProgramError, match=said):
        make()


def test_of_a_history_too_long_for_the_model_it_is_shown_the_later_part():
    class Short(DummyLM):
        def __call__(self, prompt=None, messages=None, **settings):
            if "1. right" in messages[-1]["content"] and "3. right" in messages[-1]["content"]:
                raise dspy.ContextWindowExceededError(message="too long")
            return super().__call__(prompt, messages=messages, **settings)

    lm = Short([{"action": text} for text in ("right", "right", "right", "left")])
    pred = play(fst_dspy.env(Hall), lm, way="left")
    assert (len(pred.turns), pred.done) == (4, True)
    last = lm.history[-1]["messages"][-1]["content"]
    assert "0. you stand in a hall" in last
    assert (
        last.count("right ->") == 2
    )  # the first, where many environments put the task, and the last
