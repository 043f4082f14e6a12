"""What is written of rollouts comes back whole, and long prompts are written once."""

import json
from dataclasses import replace

import pytest

from fst_dspy.errors import StoreError
from fst_dspy.fast.pool import RolloutPool, pool_from_json
from fst_dspy.run.records import rollout_from_json
from fst_dspy.run.rollout_log import pack, unpack
from fst_dspy.types import Call, Grammar, PredictorTrace, Rollout

PROMPT = tuple(range(1000, 3000))


def call(prompt, completion=(7, 8), predictor="solve"):
    return Call(predictor, prompt, completion, (-0.5,) * len(completion), "text", "stop", 1.0)


def rollout(calls, inputs=None):
    traces = [PredictorTrace("solve", inputs or {"page": "long " * 200}, {"answer": "7"}, "text")]
    return Rollout("e", "c", tuple(calls), tuple(traces), 1.0, "", None, 0)


def agent(first, turns):
    """Each turn's prompt goes on from the turn before."""
    calls, prompt = [], PROMPT
    for turn in range(turns):
        calls.append(call(prompt, (first, turn), f"step{turn}"))
        prompt = (*prompt, first, turn, *range(20))
    return calls


def through_json(rows):
    text = json.dumps(rows, default=vars)
    return json.loads(text), len(text)


@pytest.mark.parametrize(
    "rollouts",
    [
        [rollout([call(PROMPT, (n,))]) for n in range(8)],
        [rollout(agent(n, 10)) for n in range(4)],
        [rollout([call((1, 2)), call(())], {"x": 1}), rollout([call((1, 2))], {"x": True})],
        [rollout([call((*PROMPT, n)), call((n, *PROMPT))]) for n in range(3)],
    ],
)
def test_rollouts_come_back_whole(rollouts):
    rows, _ = through_json(pack(rollouts))
    assert [rollout_from_json(row) for row in unpack(rows)] == rollouts


@pytest.mark.parametrize("thought", [None, ("<think>", "</think>")])
def test_what_a_call_was_held_to_comes_back_too(thought):
    held = replace(call(PROMPT), grammar=Grammar("start: /a/", False, thought, bool(thought)))
    ((row,), _) = through_json(pack([rollout([held])]))
    assert rollout_from_json(next(iter(unpack([row])))).calls == (held,)


def test_a_prompt_or_input_is_written_once_for_a_group():
    _, one = through_json(pack([rollout([call(PROMPT)])]))
    _, group = through_json(pack([rollout([call(PROMPT, (n,))]) for n in range(8)]))
    assert group < 1.4 * one
    _, agents = through_json(pack([rollout(agent(n, 20)) for n in range(8)]))
    assert agents < 8 * one  # of 160 calls; they were 160 prompts


def test_each_step_stands_for_itself():
    rows = [{"step": step, **row} for step in (1, 2) for row in pack([rollout([call(PROMPT)])] * 2)]
    assert [tuple(row["calls"][0]["prompt_ids_T"]) for row in unpack(rows)] == [PROMPT] * 4
    moved = [{**row, "step": 3} for row in rows[1:2]]  # its group is elsewhere
    with pytest.raises(StoreError, match="refers to what"):
        list(unpack(moved))


@pytest.mark.parametrize(
    "change", [{"prompt_of": 5}, {"prompt_shared": 10**9}, {"prompt_of": -1}, {"prompt_shared": -1}]
)
def test_a_reference_to_nothing_is_told(change):
    rows = pack([rollout([call(PROMPT)])] * 2)
    rows[1]["calls"][0] |= change
    with pytest.raises(StoreError, match="refers to what is not there"):
        list(unpack(rows))


def test_what_earlier_versions_wrote_is_read():
    rollouts = [rollout([call(PROMPT)])] * 2
    rows, _ = through_json([vars(r) for r in rollouts])
    assert [rollout_from_json(row) for row in unpack(rows)] == rollouts
    assert list(pool_from_json(rows).rollouts) == rollouts


def test_a_pool_comes_back_from_a_checkpoint():
    pool = RolloutPool().plus([rollout([call(PROMPT)]) for _ in range(5)])
    rows, size = through_json(pack(pool.rollouts))
    assert pool_from_json(rows) == pool
    assert size < 2600
