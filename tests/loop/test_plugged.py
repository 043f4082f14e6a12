"""What users plug in, in whole runs: budgets, callbacks, stop callbacks, objectives, seeds."""

import json
import logging

import dspy
import pytest
from gepa.utils import MaxMetricCallsStopper
from helpers import Echo, questions, vowels
from tiny_compile import SETTINGS, raw_adapter  # noqa: F401

from fst_dspy import FST, FSTDistill, LocalLM
from fst_dspy.errors import ConfigError, MetricError, StoreError
from fst_dspy.student.candidate import predictor_names

UNLIMITED = {"max_cycles": None}


class Listener:
    def __init__(self):
        self.heard = []

    def __getattr__(self, method):
        if not method.startswith("on_"):
            raise AttributeError(method)
        return lambda event: self.heard.append((method, event))

    def of(self, method):
        return [event for name, event in self.heard if name == method]


def objectives(gold, pred, trace=None, pred_name=None, pred_trace=None):
    said = vowels(gold, pred)
    both = {"early": said.score, "short": 1.0 / (1 + len(pred.answer))}
    return dspy.Prediction(score=said.score, feedback=said.feedback, objective_scores=both)


def compiled(folder, metric=vowels, trainset=None, seeds=None, kind=FST, **settings):
    fst = kind(metric, track_stats=True, **{**SETTINGS, **settings})
    with dspy.context(lm=LocalLM(str(folder))):
        train, val = trainset or questions(6), questions(4, 6)
        program = fst.compile(Echo(), trainset=train, valset=val, seed_candidates=seeds)
    return program.detailed_results


def test_full_evals_are_over_training_and_validation_examples(tiny_qwen3):
    result = compiled(tiny_qwen3, max_full_evals=3, **UNLIMITED)
    assert result.config.budget.max_rollouts == 3 * (6 + 4)
    spent = [record.total_rollouts.total for record in result.records]
    assert len(spent) > 1 and 30 - 8 - 4 < spent[-1] <= 30 and result.stopped is None


@pytest.mark.parametrize("reuse", [True, False])
def test_callbacks_hear_a_whole_run_and_change_nothing(tiny_qwen3, tmp_path, reuse):
    listener = Listener()
    settings = {"reuse": reuse, "max_rollouts": 500}
    result = compiled(tiny_qwen3, callbacks=[listener], log_dir=tmp_path / "run", **settings)
    quiet = compiled(tiny_qwen3, **settings)
    assert [r.val_score for r in result.records] == [r.val_score for r in quiet.records]
    assert result.population == quiet.population
    (begun,), (ended,) = listener.of("on_optimization_start"), listener.of("on_optimization_end")
    assert begun["seed_candidate"] == result.seed_candidate.components
    assert ended["total_metric_calls"] == result.rollouts.total
    best = [e for e in listener.of("on_valset_evaluated") if e["is_best_program"]]
    scores = [event["average_score"] for event in best]
    assert [pytest.approx(r.val_score) in scores for r in result.records] == [True] * len(
        result.records
    )
    stats = result.records[-1].proposals
    assert len(listener.of("on_candidate_accepted")) == stats["accepted"]
    assert len(listener.of("on_iteration_start")) == stats["iterations"]
    assert {e["run_dir"] for e in listener.of("on_state_saved")} == {str(tmp_path / "run")}
    last = listener.of("on_budget_updated")[-1]
    assert last["metric_calls_remaining"] == 500 - last["metric_calls_used"]


@pytest.mark.parametrize("arm", ["fst", "gepa_only", "rl_only"])
def test_a_stop_callback_ends_the_run(tiny_qwen3, arm, tmp_path, caplog):
    whole = compiled(tiny_qwen3, arm=arm, max_cycles=3)
    limit = whole.records[-2].total_rollouts.total - 1
    more = {"arm": arm, "max_cycles": 30, "log_dir": tmp_path / "run"}
    stopper = MaxMetricCallsStopper(limit)
    with caplog.at_level(logging.INFO):
        result = compiled(tiny_qwen3, stop_callbacks=stopper, **more)
    assert result.stopped == "the stop callback MaxMetricCallsStopper returned True"
    assert f"the run ends: {result.stopped}" in caplog.text
    assert limit <= result.rollouts.total < whole.rollouts.total + 60
    assert len(result.records) <= len(whole.records)
    rows = (tmp_path / "run" / "cycles.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["proposals"]["stopped"] == result.stopped
    again = compiled(tiny_qwen3, stop_callbacks=stopper, **more)
    assert again.records == result.records, "it has ended"
    more["max_cycles"] = len(result.records) + 1
    assert len(compiled(tiny_qwen3, **more).records) > len(result.records), "and can go on"


def test_objective_scores_are_kept_and_make_the_front(tiny_qwen3, tmp_path):
    more = {"frontier_type": "cartesian", "log_dir": tmp_path / "run"}
    for reuse in (True, False):
        more["log_dir"] = tmp_path / f"run {reuse}"
        result = compiled(tiny_qwen3, objectives, reuse=reuse, **more)
        rows = (more["log_dir"] / "rollouts.jsonl").read_text().splitlines()
        whole = [row for row in map(json.loads, rows) if row["failure"] is None]
        assert whole and all(set(r["objective_scores"]) == {"early", "short"} for r in whole)
        cells = [cell for row in result.population.objective_K_V for cell in row]
        assert cells and all(set(cell) == {"early", "short"} for cell in cells)
        again = compiled(tiny_qwen3, objectives, reuse=reuse, **more)
        assert again.population == result.population


def test_a_metric_without_objectives_is_told_before_any_work(tiny_qwen3):
    with pytest.raises(MetricError, match="frontier_type='objective' needs"):
        compiled(tiny_qwen3, frontier_type="objective")

    def late(gold, pred, trace=None):
        if not pred.answer:  # what is made of an example's own labels
            raise ValueError("no answer")
        return 0.5

    with pytest.raises(MetricError, match="frontier_type='hybrid' needs"):
        compiled(tiny_qwen3, late, frontier_type="hybrid")
    assert compiled(tiny_qwen3, late, frontier_type="hybrid", arm="rl_only", max_cycles=1)


SEEDS = [{"say": "Answer in early letters."}, {"say": "Be brief."}]


def test_all_seeds_are_scored_first_and_begin_the_population(tiny_qwen3, tmp_path):
    listener = Listener()
    more = {"log_dir": tmp_path / "run", "population_size": 4}
    result = compiled(tiny_qwen3, seeds=SEEDS, callbacks=[listener], **more)
    first = result.records[0]
    assert len(first.candidate_ids) == len(first.val_scores) == 3
    assert first.candidate_ids[0] == result.seed_candidate.id
    assert first.rollouts.total == 3 * 4
    texts = [e["candidate"]["say.instructions"] for e in listener.of("on_valset_evaluated")[:3]]
    assert texts == ["Say something.", "Answer in early letters.", "Be brief."]
    assert compiled(tiny_qwen3, seeds=SEEDS, **more).records == result.records
    for other in (None, SEEDS[:1], [*SEEDS, {"say": "Hm."}]):
        with pytest.raises(StoreError, match="start"):
            compiled(tiny_qwen3, seeds=other, **more)


@pytest.mark.parametrize("reuse", [True, False])
def test_a_good_seed_is_not_dropped_unseen(tiny_qwen3, reuse):
    def likes(gold, pred, trace=None):
        return vowels(gold, pred).score

    seeds = [{"say": f"Variant {n}."} for n in range(3)]
    result = compiled(
        tiny_qwen3,
        likes,
        seeds=seeds,
        reuse=reuse,
        population_size=4,
        first_cycle_iterations=1,
        max_cycles=1,
        steps_per_cycle=1,
    )
    opening = result.records[1]
    kept = set(opening.candidate_ids) & set(result.records[0].candidate_ids)
    assert len(kept) >= 2, "all of them were compared, and none is clearly worse"


def test_weights_alone_learn_under_the_best_seed_and_within_the_budget(tiny_qwen3):
    """The others were validated in every cycle, which the budget did not know of."""
    budget = 12 + 2 * (2 * 8 + 4)
    result = compiled(tiny_qwen3, seeds=SEEDS, arm="rl_only", max_rollouts=budget, **UNLIMITED)
    assert [record.rollouts.eval for record in result.records] == [12, 4, 4]
    assert len({record.candidate_ids for record in result.records}) == 1


def test_seeds_are_checked_before_any_work(tiny_qwen3):
    listener = Listener()
    with pytest.raises(ConfigError, match="names 'speak'; the predictors are"):
        compiled(tiny_qwen3, seeds=[{"speak": "x"}], callbacks=[listener])
    assert listener.heard == [] and predictor_names(Echo()) == ("say",)


def test_a_search_for_a_teacher_begins_with_the_seeds(tiny_qwen3):
    with pytest.raises(ConfigError, match="names 'speak'"):
        compiled(tiny_qwen3, seeds=[{"speak": "x"}], kind=FSTDistill)
    fst = FSTDistill(vowels, **SETTINGS)
    with dspy.context(lm=LocalLM(str(tiny_qwen3))), pytest.raises(ConfigError, match="teacher"):
        fst.compile(
            Echo(), trainset=questions(6), valset=questions(4, 6), teacher=Echo(),
            seed_candidates=SEEDS,
        )  # fmt: skip


def test_whole_trajectories_and_gepa_kwargs_run(tiny_qwen3):
    kwargs = {"reflection_minibatch_size": 2, "max_metric_calls": 60}
    settings = {k: v for k, v in SETTINGS.items() if k != "minibatch_size"}
    fst = FST(vowels, track_stats=True, gepa_kwargs=kwargs, reflection_context="trajectory",
              **{**settings, **UNLIMITED})  # fmt: skip
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        program = fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    assert 60 - 8 - 4 < program.detailed_results.rollouts.total <= 60
    assert program.detailed_results.config.fast.minibatch_size == 2
