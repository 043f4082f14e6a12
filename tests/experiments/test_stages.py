"""Arms of several stages: steps of dspy.BetterTogether, which come to two compiles in a row."""

import json

import dspy
import pytest
from experiment_runs import TINY, job_of, run
from places import PROGRAM
from training_helpers import Events

from fst_dspy import FST, LocalLM
from fst_dspy.errors import StoreError
from fst_dspy.files import read_json
from fst_dspy.tasks import load_task

pytestmark = pytest.mark.slow
CHANNELS = {"sequential": ("gepa_only", "rl_only"), "sequential_reverse": ("rl_only", "gepa_only")}


def compiled_by_hand(folder, arms, rollouts):
    """Two compiles in a row, the second on what the first one left of the budget."""
    task, results, left = load_task(PROGRAM, 0), [], rollouts // 2
    program = task.program
    with dspy.context(lm=LocalLM(str(folder))):
        for arm in arms:
            options = {**TINY, "max_rollouts": left}
            fst = FST(task.metric, arm=arm, seed=0, track_stats=True, **options)
            program = fst.compile(program, trainset=task.trainset, valset=task.valset)
            results.append(program.detailed_results)
            left = rollouts - results[-1].rollouts.total
    return results


@pytest.mark.parametrize("arm", CHANNELS)
def test_the_steps_of_better_together_come_to_two_compiles_in_a_row(arm, tiny_qwen3, tmp_path):
    job, events = job_of(tiny_qwen3, arm), Events()
    with dspy.context(callbacks=[events]):
        outcome = run(tmp_path, job)
    started = [name for _, name, when in events.compiles if when == "start"]
    assert [name for name in started if not name.startswith("_")] == [
        "BetterTogether",
        "FST",
        "FST",
    ]
    by_hand = compiled_by_hand(tiny_qwen3, CHANNELS[arm], job.rollouts)
    for stage, expected in zip(outcome.stages, by_hand, strict=True):
        found = read_json(tmp_path / job.name / stage / "result.json")
        assert found["best"] == json.loads(json.dumps(expected.to_dict()["best"]))
        assert len(found["records"]) == len(expected.records)
    # BetterTogether has run no rollouts that are not counted here.
    assert outcome.rollouts == by_hand[0].rollouts.plus(by_hand[1].rollouts)
    assert outcome.trained_version == by_hand[1].best.version


def test_a_step_that_fails_fails_the_job_and_goes_on_the_next_time(tiny_qwen3, tmp_path):
    """BetterTogether would log it and return what the step before it came to."""
    job = job_of(tiny_qwen3, "sequential")
    in_the_way = tmp_path / job.name / "1-rl_only"
    in_the_way.parent.mkdir()
    in_the_way.write_text("not a folder")
    with pytest.raises(StoreError, match="1-rl_only"):
        run(tmp_path, job)
    cycles = tmp_path / job.name / "0-gepa_only" / "cycles.jsonl"
    written = cycles.read_bytes()
    in_the_way.unlink()
    outcome = run(tmp_path, job)
    assert outcome.stages == ("0-gepa_only", "1-rl_only") and outcome.rollouts.slow > 0
    assert cycles.read_bytes() == written
