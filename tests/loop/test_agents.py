"""Agents in the joint loop: turns are counted, budgeted, told, and gone on with after a kill."""

from __future__ import annotations

import json

import dspy
import pytest
from environments import Hall
from helpers import kill_before_steps
from tiny_compile import SETTINGS

import fst_dspy
from fst_dspy.errors import ConfigError
from fst_dspy.loop.progress import cycle_line


class OneWord(dspy.ChatAdapter):
    """Takes whatever a random model writes for an action, or for none, by its first letter."""

    def format(self, signature, demos, inputs):
        return [{"role": "user", "content": f"{inputs['observation']} {inputs['history']}"[:40]}]

    def parse(self, signature, completion):
        names = ("left", "right", "up", "nowhere")
        return {"action": names[sum(map(ord, completion)) % 4]}


EXAMPLES = [
    dspy.Example(way=way, number=number).with_inputs("way", "number")
    for number in range(6)
    for way in ("left", "right")
]


def compile_hall(folder, log_dir=None, optimizer=fst_dspy.FST, **settings):
    lm = fst_dspy.LocalLM(str(folder))
    fst = optimizer(
        fst_dspy.env_reward, seed=0, log_dir=log_dir, track_stats=True, **{**SETTINGS, **settings}
    )
    with dspy.context(lm=lm, adapter=OneWord()):
        program = fst_dspy.env(Hall, max_turns=3)
        return fst.compile(program, trainset=EXAMPLES[:8], valset=EXAMPLES[8:]).detailed_results


@pytest.mark.parametrize("credit", ["rollout", "turn"])
def test_an_agent_is_trained_and_its_turns_counted(tiny_qwen3, credit):
    result = compile_hall(tiny_qwen3, credit=credit)
    last = result.records[-1]
    assert last.turns.turns >= last.total_rollouts.total
    assert last.turns.steps == last.turns.turns - last.turns.invalid > 0
    assert last.turns.invalid > 0
    assert f"environment steps {last.turns.steps:,}" in cycle_line(last)
    assert "of actions invalid" in cycle_line(last)
    assert result.base_version != last.weights_version


def test_a_budget_of_environment_steps_ends_the_run(tiny_qwen3):
    result = compile_hall(tiny_qwen3, max_cycles=None, max_env_steps=70)
    counted = [record.turns.steps for record in result.records]
    assert len(counted) > 2 and 30 < counted[-1] <= 70  # no step that would go beyond
    with pytest.raises(ConfigError, match="max_env_steps must be positive"):
        fst_dspy.FST(fst_dspy.env_reward, max_env_steps=0)


def test_what_a_search_for_a_context_does_counts_towards_the_budget(tiny_qwen3, tmp_path):
    settings = {"max_cycles": None, "max_env_steps": 90, "first_cycle_iterations": 1}
    result = compile_hall(tiny_qwen3, tmp_path, fst_dspy.FSTDistill, **settings)
    searched = result.search.records[-1].turns
    assert 0 < searched.steps < result.records[0].turns.steps
    assert result.records[-1].turns.steps <= 90
    again = compile_hall(tiny_qwen3, tmp_path, fst_dspy.FSTDistill, **settings)
    assert again.records == result.records


@pytest.mark.parametrize(
    ("limit", "counted"), [("max_env_turns", "turns"), ("max_env_seconds", "seconds")]
)
def test_so_do_turns_and_the_time_that_environments_take(tiny_qwen3, limit, counted):
    least = 1e-6 if counted == "seconds" else 4
    result = compile_hall(tiny_qwen3, max_cycles=3, **{limit: least})
    assert getattr(result.records[-1].turns, counted) >= least
    assert result.records[-1].cycle < 3


def test_a_killed_run_goes_on_to_the_same_turns(tiny_qwen3, tmp_path, monkeypatch):
    whole = compile_hall(tiny_qwen3, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_before_steps(patch, 3)
        with pytest.raises(RuntimeError, match="killed"):
            compile_hall(tiny_qwen3, tmp_path / "killed")
    again = compile_hall(tiny_qwen3, tmp_path / "killed")
    for before, after in zip(whole.records, again.records, strict=True):
        assert (before.turns.steps, before.turns.invalid) == (
            after.turns.steps,
            after.turns.invalid,
        )
        assert before.weights_version == after.weights_version
    rollouts = (tmp_path / "killed" / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(rollouts[-1])["turns"][0]["observation"] == "you stand in a hall"
