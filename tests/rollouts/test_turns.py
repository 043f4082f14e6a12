"""Turns of agents in rollouts: kept, counted, and lost with what they ran on."""

from __future__ import annotations

import dataclasses
import json

import dspy
import pytest
from environments import Fragile, Hall

import fst_dspy
from fst_dspy.config import SamplingConfig
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.run.records import rollout_from_json
from fst_dspy.student.candidate import seed_candidate


class OneWord(dspy.ChatAdapter):
    """Takes whatever a random model writes for an action of the episode, by its length."""

    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": "go"}]

    def parse(self, signature, completion):
        names = ("left", "right", "up")
        return {"action": names[len(completion) % 3]}


class Push(OneWord):
    def parse(self, signature, completion):
        return {"action": "push"}


@pytest.fixture
def lm(tiny_qwen3):
    return fst_dspy.LocalLM(str(tiny_qwen3))


def run(lm, program, examples, adapter, **sampling):
    with dspy.context(lm=lm, adapter=adapter):
        config = SamplingConfig(max_tokens=3, **sampling)
        runner = RolloutRunner(program, fst_dspy.env_reward, lm, config, seed=0)
        jobs = [RolloutJob(example, seed_candidate(program)) for example in examples]
        return runner, runner.run(jobs, channel="slow", salt=0)


def test_turns_are_kept_with_the_rollout_and_counted(lm):
    examples = [dspy.Example(way=way).with_inputs("way") for way in ("left", "right", "up") * 4]
    runner, rollouts = run(lm, fst_dspy.env(Hall, max_turns=3), examples, OneWord())
    assert all(rollout.turns for rollout in rollouts)
    for rollout in rollouts:
        assert [turn.calls for turn in rollout.turns] == list(range(1, len(rollout.calls) + 1))
        assert rollout.reward == sum(turn.reward for turn in rollout.turns)
    counts = runner.turns
    assert counts.turns == counts.steps == sum(len(rollout.turns) for rollout in rollouts)
    assert counts.errors == sum(t.status == "error" for r in rollouts for t in r.turns) > 0
    again = run(lm, fst_dspy.env(Hall, max_turns=3), examples, OneWord())[1]
    assert [r.calls for r in again] == [r.calls for r in rollouts]


@pytest.mark.parametrize("harm", ["crash", "hang", "offline"])
def test_an_environment_that_fails_takes_nobody_along(lm, harm):
    examples = [dspy.Example(harm=each).with_inputs("harm") for each in (harm, "no", "raise", "no")]
    program = fst_dspy.env(Fragile, max_turns=1, processes=True, step_timeout=3)
    _, rollouts = run(lm, program, examples, Push())
    lost, fine, raised, also = rollouts
    assert lost.failure.kind == "infrastructure"
    assert (fine.reward, also.reward) == (1.0, 1.0)
    assert raised.failure is None
    assert "ValueError: stuck" in raised.feedback


@pytest.mark.parametrize(
    ("harm", "kind"), [("hang", "timeout"), ("offline", "infrastructure"), ("slow", None)]
)
def test_nor_does_one_in_a_thread(lm, harm, kind):
    examples = [dspy.Example(harm=each).with_inputs("harm") for each in (harm, "no", "raise", "no")]
    program = fst_dspy.env(Fragile, max_turns=1)
    runner, rollouts = run(lm, program, examples, Push(), rollout_timeout=3.0)
    first, fine, raised, also = rollouts
    assert (first.failure.kind if first.failure else None) == kind
    assert (fine.reward, also.reward) == (1.0, 1.0)
    assert "ValueError: stuck" in raised.feedback
    assert runner.counts.slow == 4
    assert runner.turns.errors == 1
    if kind is None:
        assert (first.reward, first.turns[0].status) == (1.0, "ok")
        assert first.turns[0].seconds >= 1.0


def test_turns_are_read_back_from_a_run_folder(lm):
    examples = [dspy.Example(way="left").with_inputs("way")]
    _, (rollout,) = run(lm, fst_dspy.env(Hall, max_turns=2), examples, OneWord())
    assert (
        rollout_from_json(json.loads(json.dumps(dataclasses.asdict(rollout)))).turns
        == rollout.turns
    )
