from __future__ import annotations

from dataclasses import replace

import pytest

from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.credit import turn_returns, turns_of_calls
from fst_dspy.types import Call, Group, Rollout, Turn


def turn(reward: float, calls: int) -> Turn:
    return Turn("seen", "done", "shown", reward, "ok", 0.0, calls)


def rollout(rewards: list[float], calls: int | None = None, reward: float | None = None) -> Rollout:
    made = len(rewards) if calls is None else calls
    call = Call("act", (1,), (2,), (-0.5,), "x", "stop", 1.0)
    return Rollout(
        example_id="e",
        candidate_id="c",
        calls=(call,) * made,
        traces=(),
        reward=sum(rewards) if reward is None else reward,
        feedback="",
        failure=None,
        policy_version=0,
        turns=tuple(turn(value, n + 1) for n, value in enumerate(rewards)),
    )


def test_what_is_gained_from_a_turn_on_is_discounted():
    assert turn_returns(rollout([1.0, 0.0, 4.0]), 0.5) == [2.0, 2.0, 4.0]
    assert turn_returns(rollout([1.0, 0.0, 4.0]), 1.0) == [5.0, 4.0, 4.0]


def test_a_metric_of_ones_own_pays_at_the_last_turn():
    assert turn_returns(rollout([1.0, 1.0], reward=5.0), 1.0) == [5.0, 4.0]
    assert turn_returns(rollout([], calls=2, reward=0.5), 0.9) == [0.5]


def test_calls_belong_to_the_turn_that_they_were_made_in():
    played = rollout([0.0, 0.0], calls=4)  # turns end after calls 1 and 2; two more come after
    assert turns_of_calls(played) == [0, 1, 1, 1]


def test_a_call_is_not_blamed_for_what_happened_before_it():
    # The first turn alone decides the reward: 1 or 0 at once. What follows gains nothing.
    group = Group("e", (rollout([1.0, 0.0]), rollout([0.0, 0.0])))
    whole = [row.advantage for row in group_rows([group], "none")]
    by_turn = [row.advantage for row in group_rows([group], "none", credit="turn")]
    assert whole == [0.5, 0.5, -0.5, -0.5]
    assert by_turn == [0.5, 0.0, -0.5, 0.0]


def test_a_turn_that_one_rollout_alone_came_to_is_compared_with_the_first():
    group = Group("e", (rollout([0.0, 0.0, 3.0]), rollout([1.0])))
    by_turn = [row.advantage for row in group_rows([group], "none", credit="turn")]
    assert by_turn == [1.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_without_turns_both_kinds_of_credit_are_the_same_but_for_rounding(scale):
    group = Group("e", tuple(rollout([], calls=2, reward=value) for value in (0.0, 1.0, 0.5)))
    whole = [row.advantage for row in group_rows([group], scale)]
    by_turn = [row.advantage for row in group_rows([group], scale, credit="turn")]
    assert by_turn == pytest.approx(whole, abs=1e-6)


def test_equal_returns_have_no_advantage_at_any_scale():
    group = Group("e", (rollout([0.0, 1.0]), rollout([0.0, 1.0])))
    assert {row.advantage for row in group_rows([group], "group", credit="turn")} == {0.0}


def test_an_action_that_was_none_earns_nothing_of_what_came_later():
    # Both end alike; the first rollout's first action was none, and its second did what counts.
    first = replace(turn(0.0, 1), status="invalid")
    talked = replace(rollout([0.0, 1.0]), turns=(first, turn(1.0, 2)))
    lost = replace(rollout([0.0, -1.0]), turns=(first, turn(-1.0, 2)))
    assert turn_returns(talked, 1.0) == [0.0, 1.0]
    assert turn_returns(lost, 1.0) == [-1.0, -1.0]
    group = Group("e", (talked, rollout([0.0, 1.0])))
    by_turn = [row.advantage for row in group_rows([group], "none", credit="turn")]
    assert by_turn == [-0.5, 0.0, 0.5, 0.0]
