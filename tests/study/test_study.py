"""Studies on tiny random models: real compiles, real Optuna storages, real killed workers."""

import io
import json
import math
import multiprocessing
import os
import pickle
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import dspy
import optuna
import pytest
from helpers import Echo, RawAdapter, questions, vowels, wait_for
from optuna.trial import TrialState
from places import PROGRAM
from rich.console import Console
from study_workers import held, held_model
from typer.testing import CliRunner

from fst_dspy import FST, LocalLM, Task
from fst_dspy.cli import app
from fst_dspy.cli.options import parse_settings
from fst_dspy.cli.study_report import report_study
from fst_dspy.config import AUTO, FSTConfig
from fst_dspy.errors import (
    ConfigError,
    FSTError,
    ModelError,
    ProgramError,
    StoreError,
    TrainingError,
)
from fst_dspy.files import read_jsonl
from fst_dspy.loop import joint
from fst_dspy.loop.progress import SilentProgress
from fst_dspy.study import (
    Categorical,
    Float,
    Int,
    Objective,
    Space,
    TunedFST,
    best_settings,
    default_space,
    front,
    hypervolume,
    importances,
    load_space,
    runner,
    tune,
)
from fst_dspy.study import tuned as tuned_module
from fst_dspy.study.objective import Measured, behind_median, budget_step, measure
from fst_dspy.study.outcome import draw_front, draw_importances
from fst_dspy.study.runner import StudyPlan, count_trials
from fst_dspy.study.space import draw_settings, usual_space
from fst_dspy.study.storage import (
    open_storage,
    retried_numbers,
    sqlite_url,
    unwatched,
    worker_alive,
)

pytestmark = pytest.mark.slow

SPACE = Space(
    (
        Float("learning_rate", 1e-4, 1e-1, log=True),
        Categorical("population_size", (1, 2)),
        Categorical("rollouts_per_candidate", (2, 4)),
    )
)
FIXED = {
    "on_no_signal": "warn",
    "steps_per_cycle": 1,
    "problems_per_step": 2,
    "first_cycle_iterations": 1,
    "cycle_iterations": 0,
    "minibatch_size": 2,
    "max_tokens": 6,
    "val_size": 3,
}
BUDGET = 50
RATES = Categorical("scale_rewards", ("group", "batch"))


def tune_tiny(model, folder, **change):
    options = {
        "space": SPACE,
        "objective": Objective(rollouts=BUDGET),
        "fixed": FIXED,
        "trials": 3,
        "folder": folder,
        "lm": str(model),
    }
    return tune(change.pop("task", PROGRAM), **{**options, **change})


def states(study):
    return [trial.state for trial in study.trials]


# --- the space -------------------------------------------------------------------------------


def test_the_default_space_has_the_defaults_and_every_end_of_it_makes_a_config():
    space = default_space()
    assert space.defaults().keys() == {parameter.name for parameter in space.parameters}
    made = FSTConfig.make(**space.defaults())
    small = FSTConfig.make(learning_rate=3e-4, lora=None)
    assert made == small, "the rate of a small model, whose weights are all trained"
    for end in (0, -1):
        ends = {p.name: p.ends[end] for p in space.parameters}
        FSTConfig.make(**{**ends, "rollouts_per_candidate": 2})


def test_the_learning_rate_of_a_space_is_that_of_the_model():
    assert default_space().for_size(960_000).parameters[0] == Float(
        "learning_rate", 3e-5, 1e-3, log=True
    )
    large = default_space().extend(Int("val_size", 16, 64, step=16)).for_size(135_000_000)
    assert large.defaults()["learning_rate"] == 5e-5
    # A tenth of the default of all weights, to three times that of adapters, which is ten times it.
    assert large.parameters[0] == Float("learning_rate", 5e-6, 1.7e-3, log=True)
    weights = default_space().without("lora_rank").for_size(135_000_000)
    assert weights.parameters[0] == Float("learning_rate", 5e-6, 1.7e-4, log=True)
    own = Float("learning_rate", 1e-5, 2e-5)
    assert default_space().extend(own).for_size(135_000_000).parameters[0] == own


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ((Float("learning_rte", 1e-5, 1e-3),), "did you mean 'learning_rate'"),
        ((Float("temperature", 0.0, 1.0),), "temperature must be above 0"),
        ((Int("steps_per_cycle", 8, 2),), "steps_per_cycle"),
        ((Int("max_rollouts", 8, 20),), "budget"),
        ((Int("val_size", 8, 20), Int("val_size", 8, 20)), "twice"),
        ((Float("epsilon_high", 1, 2, when={"loss_type": ["cispo"]}),), "must come before"),
        ((), "empty"),
        ((Categorical("scale_rewards", ("group", "grp")),), "scale_rewards"),
        ((Categorical("rollouts_per_candidate", (0, 1)),), "at least 1"),
        ((RATES, Float("epsilon_high", 1, 2, when={"scale_rewards": "group"})), "a list of values"),
        ((RATES, Float("epsilon_high", 1, 2, when={"scale_rewards": ["grp"]})), "never has one"),
    ],
)
def test_a_space_that_cannot_work_is_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        Space(parameters)


def test_derived_settings_make_valid_configs():
    config = FSTConfig.make(population_size=4, rollouts_per_candidate=3, lora_rank=8)
    assert config.slow.group_size == 12
    assert (config.slow.lora.rank, config.slow.lora.alpha) == (8, 16.0)
    assert FSTConfig.make(lora_rank=0).slow.lora is None
    with pytest.raises(ConfigError, match="not both"):
        FSTConfig.make(group_size=8, rollouts_per_candidate=2)


def test_a_conditional_parameter_is_drawn_only_where_it_applies():
    space = Space(
        (
            Categorical("loss_type", ("cispo", "dapo")),
            Float("epsilon_high", 1.0, 8.0, when={"loss_type": ("cispo",)}),
        )
    )
    study = optuna.create_study()
    drawn = [space.suggest(study.ask()) for _ in range(20)]
    assert {settings["loss_type"] for settings in drawn} == {"cispo", "dapo"}
    assert all(("epsilon_high" in s) == (s["loss_type"] == "cispo") for s in drawn)


def test_yaml_extends_or_replaces_the_default_space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "extends: default\n"
        "parameters:\n"
        "  learning_rate: {low: 1e-6, high: 1e-4, log: true}\n"
        "  val_size: {low: 16, high: 64, step: 16}\n"
        "  loss_type: [cispo, dapo]\n"
        "  temperature: null\n"
    )
    added = (Int("val_size", 16, 64, step=16), Categorical("loss_type", ("cispo", "dapo")))
    rate = Float("learning_rate", 1e-6, 1e-4, log=True)
    assert load_space(path) == default_space().without("temperature").extend(rate, *added)
    path.write_text("parameters:\n  lora_rank: {choices: [0, 8]}\n")
    assert load_space(path) == Space((Categorical("lora_rank", (0, 8)),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parameters: {learning_rte: {low: 1, high: 2}}", "did you mean 'learning_rate'"),
        ("parameters: {learning_rate: {low: a, high: 2}}", "not a number"),
        ("parameters: {learning_rate: {low: 1}}", "high"),
        ("parameters: {learning_rate: 3}", "low: ..., high: ..."),
        ("extends: other\nparameters: {val_size: [1]}", "extends: default"),
        ("- 1", "mapping under 'parameters'"),
        ("a: [", "cannot read"),
    ],
)
def test_yaml_that_is_no_space_is_refused(tmp_path, text, message):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_space(path)


# --- what is measured and pruned -------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"measures": ("sore",)}, "unknown measure"),
        ({"at_most": {"kl": 1.0}}, "unknown measure"),
        ({"at_least": {"kl": 1.0}}, "unknown measure"),
        ({"measures": ("score", "score")}, "once"),
        ({"rollouts": 0}, "at least 1"),
        ({"pruner": "best"}, "pruner must be"),
        ({"measures": ("score", "kl_to_base"), "pruner": "asha"}, "cannot prune with several"),
    ],
)
def test_an_objective_that_cannot_work_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**given)


def test_behind_the_median_in_every_objective_is_pruned_and_in_one_is_not():
    def reports(*values, step=40, short=False):
        return [{"step": step, "values": list(values), "short": short}]

    others = [reports(score, kl) for score, kl in ((0.2, 0.1), (0.4, 0.2), (0.6, 0.3), (0.8, 0.4))]
    both = ("maximize", "minimize")
    assert behind_median(reports(0.4, 0.3), others, both)
    assert not behind_median(reports(0.4, 0.2), others, both)
    assert not behind_median(reports(0.6, 0.4), others, both)
    assert not behind_median(reports(0.1, 0.9), others[:3], both)
    assert not behind_median(reports(0.1, 0.9, step=10), others, both)
    # Below a lower limit, leading in KL does not help; where most are below it, all may go on.
    assert behind_median(reports(0.1, 0.0, short=True), others, both)
    low = [reports(0.1, 0.0, short=True)] * 4
    assert not behind_median(reports(0.0, 0.0, short=True), low, both)
    assert budget_step(399, 1000) == 35 and budget_step(4000, 1000) == 100


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband", "none"])
def test_pruners_stop_what_is_behind_and_keep_the_best(pruner):
    study = optuna.create_study(
        direction="maximize",
        pruner=Objective(pruner=pruner).make_pruner(),
        sampler=optuna.samplers.RandomSampler(seed=0),
        study_name="a name, which decides hyperband's brackets",
    )
    for number in range(24):
        trial = study.ask()
        for step in range(0, 101, 5):
            trial.report((24 - number) * (1 + step), step)
            if trial.should_prune():
                assert step >= 20
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, (24 - number) * 101)
    assert study.best_trial.number == 0
    assert (TrialState.PRUNED in states(study)) == (pruner != "none")


def test_hypervolume_of_two_objectives():
    both = ("maximize", "minimize")
    assert hypervolume([(0.5, 0.5)], both, (0.0, 1.0)) == pytest.approx(0.25)
    points = [(0.5, 0.2), (0.8, 0.6), (0.4, 0.4), (0.9, 2.0)]
    area = 0.5 * 0.8 + (0.8 - 0.5) * 0.4
    assert hypervolume(points, both, (0.0, 1.0)) == pytest.approx(area)
    assert hypervolume([], both, (0.0, 1.0)) == 0.0


# --- studies ---------------------------------------------------------------------------------


def test_a_study_starts_with_the_defaults_and_its_best_settings_compile(tiny_qwen3, tmp_path):
    told = []
    study = tune_tiny(
        tiny_qwen3, tmp_path, trials=3, on_trial=lambda study, trial: told.append(trial.number)
    )
    assert states(study) == [TrialState.COMPLETE] * 3 and told == [0, 1, 2]
    # SPACE holds no default of population_size (4), and so leaves it to be drawn.
    assert study.trials[0].params["learning_rate"] == 3e-4  # that of small models
    assert study.trials[0].params["rollouts_per_candidate"] == 2
    for trial in study.trials:
        folder = Path(trial.user_attrs["folder"])
        rows = list(read_jsonl(folder / "cycles.jsonl"))
        inside = [
            r for r in rows if sum(map(r["total_rollouts"].get, ("fast", "slow", "eval"))) <= BUDGET
        ]
        assert trial.value == max(row["val_score"] for row in inside)
        assert len(trial.intermediate_values) == 21
        assert trial.user_attrs["spent"] > 0
    settings = best_settings(study)
    assert settings["max_rollouts"] == BUDGET and settings["max_tokens"] == 6
    with dspy.context(lm=LocalLM(str(tiny_qwen3)), adapter=RawAdapter()):
        fst = FST(vowels, track_stats=True, **settings)
        result = fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6)).detailed_results
        FST(vowels, **study.best_params)
    # The same weights, data and seed: the very run of the trial.
    assert measure(result.records, BUDGET).score == study.best_value
    drawn = [trial.params for trial in study.trials]
    again = [trial.params for trial in tune_tiny(tiny_qwen3, tmp_path, trials=4).trials]
    assert again[:3] == drawn and again[3] not in drawn
    with pytest.raises(ConfigError, match="another objective"):
        tune_tiny(tiny_qwen3, tmp_path, objective=Objective(rollouts=BUDGET + 1))


def test_a_pruned_trial_stops_and_its_run_can_go_on(tiny_qwen3, tmp_path, monkeypatch):
    class AfterOneCycle(optuna.pruners.BasePruner):
        """Prunes every trial but the first as soon as a cycle with training is reported."""

        def prune(self, study, trial):
            return trial.number > 0 and trial.last_step > 0

    monkeypatch.setattr(Objective, "make_pruner", lambda self: AfterOneCycle())
    objective = Objective(rollouts=100)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=2, objective=objective)
    assert states(study) == [TrialState.COMPLETE, TrialState.PRUNED]
    pruned = study.trials[1]
    folder = Path(pruned.user_attrs["folder"])
    assert len(list(read_jsonl(folder / "cycles.jsonl"))) == 2 and pruned.user_attrs["spent"] < 80
    assert not (folder / "result.json").exists()
    fst = FST(vowels, log_dir=folder, track_stats=True, **pruned.user_attrs["settings"])
    task = StudyPlan(PROGRAM, "", SPACE, objective, tmp_path, "", "").load_task()
    with dspy.context(lm=LocalLM(str(tiny_qwen3))):
        result = fst.compile(task.program, trainset=task.trainset, valset=task.valset)
    records = result.detailed_results.records
    assert len(records) > 2 and 80 < records[-1].total_rollouts.total <= 100
    assert len(list(read_jsonl(folder / "cycles.jsonl"))) == len(records)


def test_adapters_clip_and_demos_can_be_tuned(tiny_qwen3, tmp_path):
    space = Space(
        (
            Categorical("lora_rank", (2, 4)),
            Categorical("demo_tokens", (0, 64)),
            Float("epsilon_high", 1.0, 8.0, log=True),
            Float("temperature", 0.7, 1.2),
        )
    )
    small = {**FIXED, "population_size": 2, "group_size": 4}
    study = tune_tiny(tiny_qwen3, tmp_path, trials=2, space=space, fixed=small)
    assert states(study) == [TrialState.COMPLETE] * 2
    for trial in study.trials:
        config = json.loads((Path(trial.user_attrs["folder"]) / "config.json").read_text())
        used = config["settings"]
        assert used["slow"]["lora"]["rank"] == trial.params["lora_rank"]
        assert used["fast"]["demo_tokens"] == trial.params["demo_tokens"]
        assert used["slow"]["epsilon_high"] == trial.params["epsilon_high"]
        assert used["sampling"]["temperature"] == trial.params["temperature"]


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_every_pruner_hears_of_the_cycles(pruner, tiny_qwen3, tmp_path):
    study = tune_tiny(
        tiny_qwen3, tmp_path, trials=2, objective=Objective(rollouts=BUDGET, pruner=pruner)
    )
    assert study.trials[0].state is TrialState.COMPLETE
    rungs = [name for name in study.trials[0].system_attrs if name.startswith("completed_rung")]
    assert bool(rungs) == (pruner == "hyperband")


def test_several_objectives_with_a_limit_and_a_warm_start(tiny_qwen3, tmp_path):
    earlier = tune_tiny(tiny_qwen3, tmp_path / "earlier", trials=1)
    objective = Objective(
        ("score", "kl_to_base"), BUDGET, at_most={"kl_to_base": 0.5}, pruner="none"
    )
    study = tune_tiny(
        tiny_qwen3, tmp_path / "study", trials=4, objective=objective, warm_start=[earlier]
    )
    assert study.trials[1].params == earlier.best_params
    assert "fst, trial" in study.trials[1].user_attrs["source"]
    for trial in study.trials:
        kl = trial.user_attrs["measured"]["kl_to_base"]
        assert trial.constraints == {"kl_to_base <= 0.5": kl - 0.5} and trial.values[1] == kl
    best = front(study)
    assert best and all(trial.values[1] <= 0.5 for trial in best)
    assert best_settings(study) == best[0].user_attrs["settings"]
    assert [t.values[0] for t in best] == sorted((t.values[0] for t in best), reverse=True)
    shares = importances(study)
    assert shares.keys() == {"score", "kl_to_base"}
    assert sum(shares["score"].values()) == pytest.approx(1)
    draw_importances(shares).savefig(tmp_path / "importances.png")
    draw_front(study).savefig(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_importances_ask_what_makes_a_maximised_score_high():
    study = optuna.create_study(direction="maximize")
    study.set_user_attr("objective", {"measures": ["score"]})
    uniform = optuna.distributions.FloatDistribution(0.0, 1.0)
    for n in range(40):
        # "top" decides among the best; "bottom" only how bad the bad ones are.
        top, bottom = (n * 7 % 40) / 40, (n * 11 % 40) / 40
        score = 1 + top if top > 0.7 else -bottom
        study.add_trial(
            optuna.create_trial(
                params={"top": top, "bottom": bottom},
                distributions={"top": uniform, "bottom": uniform},
                value=score,
            )
        )
    shares = importances(study)["score"]
    assert shares["top"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)


def test_limits_are_broken_above_and_below():
    objective = Objective(at_most={"kl_to_base": 0.5}, at_least={"score": 0.25})
    broken = objective.excesses(Measured(score=0.125, kl_to_base=0.75, rollouts=9))
    assert broken == {"kl_to_base <= 0.5": 0.25, "score >= 0.25": 0.125}
    kept = objective.excesses(Measured(score=0.5, kl_to_base=0.25, rollouts=9))
    assert all(excess < 0 for excess in kept.values())


def test_a_kl_that_is_not_finite_is_above_every_limit(tiny_qwen3, tmp_path, monkeypatch):
    real = joint.cycle_record
    monkeypatch.setattr(
        joint, "cycle_record", lambda *args: replace(real(*args), kl_to_base=math.nan)
    )
    objective = Objective(("score", "kl_to_base"), BUDGET, at_most={"kl_to_base": 0.1})
    study = tune_tiny(tiny_qwen3, tmp_path, trials=1, objective=objective)
    assert states(study) == [TrialState.COMPLETE] and study.trials[0].values[1] == math.inf
    with pytest.raises(ConfigError, match="within the limits"):
        best_settings(study)


@pytest.mark.parametrize("limits", [{"at_most": {"rollouts": 0}}, {"at_least": {"score": 2.0}}])
def test_no_trial_within_the_limit_is_a_clear_error(limits, tiny_qwen3, tmp_path):
    objective = Objective(rollouts=BUDGET, **limits)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=1, objective=objective)
    with pytest.raises(ConfigError, match="within the limits"):
        best_settings(study)


def test_a_crashed_trial_is_failed_with_its_error_and_folder_kept(tiny_qwen3, tmp_path):
    space = Space((Categorical("learning_rate", (1e30,)),))
    # A run that diverges is given up after a few steps.
    enough = {"fixed": {**FIXED, "steps_per_cycle": 8}, "objective": Objective(rollouts=400)}
    study = tune_tiny(tiny_qwen3, tmp_path, trials=2, space=space, **enough)
    assert states(study) == [TrialState.FAIL] * 2
    for trial in study.trials:
        assert "finite" in trial.user_attrs["error"]
        assert (Path(trial.user_attrs["folder"]) / "config.json").is_file()
    with pytest.raises(ConfigError, match="has completed"):
        best_settings(study)


def test_a_task_that_cannot_work_ends_the_study(tiny_qwen3, tmp_path):
    with pytest.raises(ProgramError, match="no program"):
        tune_tiny(tiny_qwen3, tmp_path, task="nowhere.py")
    with pytest.raises(ConfigError, match="both fixed and in the search space"):
        tune_tiny(tiny_qwen3, tmp_path, fixed={"learning_rate": 1e-3})
    with pytest.raises(ConfigError, match="several workers"):
        tune_tiny(tiny_qwen3, tmp_path, task=make_task(tmp_path), workers=2)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"lr": 1e-3}, "both fixed and in the search space: learning_rate"),
        ({"group_size": 4}, "both fixed and in the search space: rollouts_per_candidate"),
        (
            {"max_metric_calls": 9},
            "max_rollouts cannot be fixed; a trial's budget is the objective",
        ),
        ({"log_dir": "x"}, "log_dir cannot be fixed"),
        ({"advantage": "candidate", "val_size": 0}, "val_size must be at least 1"),
    ],
)
def test_what_no_trial_could_run_with_is_refused_before_the_first(fixed, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tune_tiny("nowhere", tmp_path / "study", fixed={**FIXED, **fixed})
    assert not (tmp_path / "study").exists()
    with pytest.raises(ConfigError, match="arm must be"):
        tune_tiny("nowhere", tmp_path / "study", arm="rl")


def test_what_is_fixed_is_left_out_of_the_default_space(tmp_path):
    fixed = {**FIXED, "lr": 1e-3, "steps_per_cycle": 2, "group_size": 4}
    with pytest.raises(ModelError, match="nowhere"):  # which is looked for after the settings
        tune_tiny("nowhere", tmp_path / "study", fixed=fixed, space=None)


class Shelf:
    """A retriever."""

    def __call__(self, query, k=3):
        return [query] * k


def test_workers_have_the_settings_that_dspy_has_where_the_study_is_started(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(runner, "_run_processes", lambda plan, *_: sent.append(pickle.dumps(plan)))
    given = {"rm": Shelf(), "allow_tool_async_sync_conversion": True, "of_the_program": 3}
    with dspy.context(adapter=dspy.XMLAdapter(), callbacks=[lambda: None], **given):
        tune_tiny("", tmp_path, workers=2, lm=Shelf)
    settings = pickle.loads(sent[0]).settings()
    assert isinstance(settings["rm"], Shelf) and isinstance(settings["lm"], Shelf)
    assert isinstance(settings["adapter"], dspy.XMLAdapter) and "callbacks" not in settings
    assert settings["allow_tool_async_sync_conversion"] and settings["of_the_program"] == 3
    assert "num_threads" not in settings, "which the task's own file may have set"
    with (
        dspy.context(rm=lambda query: query),
        pytest.raises(ConfigError, match=r"several workers need dspy\.settings\.rm"),
    ):
        tune_tiny("", tmp_path, workers=2)


def test_a_study_of_another_model_is_not_gone_on_with(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runner, "run_worker", lambda *_: None)
    monkeypatch.setattr(runner, "_size_of", lambda _plan: 0)  # there are no such models
    for model in ("one/tiny", "elsewhere/tiny"):  # the same, as another machine has it
        tune_tiny(model, tmp_path)
    with pytest.raises(ConfigError, match="has another reflection_lm: None, not openai/judge"):
        tune_tiny("one/tiny", tmp_path, reflection_lm=dspy.LM("openai/judge"))
    other = Task("letters", Echo(), vowels, questions(5), questions(4, 6), [])
    tune_tiny("one/tiny", tmp_path, task=other)
    assert "examples of the task letters have changed since the study 'fst' began" in caplog.text
    for model in ("one/other", lambda: None):
        with pytest.raises(ConfigError, match="has another lm: tiny, not"):
            tune_tiny("", tmp_path, lm=model)


def test_a_study_with_other_choices_takes_another_name_and_folders_of_its_own(tiny_qwen3, tmp_path):
    tune_tiny(tiny_qwen3, tmp_path, trials=1)
    space = SPACE.extend(Categorical("population_size", (2, 4)))
    with pytest.raises(ConfigError, match=r"has drawn population_size from .* another study name"):
        tune_tiny(tiny_qwen3, tmp_path, trials=2, space=space)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=1, space=space, study_name="other")
    assert states(study) == [TrialState.COMPLETE]
    assert Path(study.trials[0].user_attrs["folder"]).name == "trial-0000_2"


def test_a_trial_that_a_full_disk_ended_goes_on(tiny_qwen3, tmp_path, monkeypatch):
    def full(*_, **__):
        raise StoreError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="No space left"):
        patch.setattr(joint.Run, "_slow_step", full)
        tune_tiny(tiny_qwen3, tmp_path, trials=2)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=2)
    assert states(study) == [TrialState.FAIL, *[TrialState.COMPLETE] * 2]
    first, again = study.trials[:2]
    assert (first.user_attrs["folder"], first.params) == (again.user_attrs["folder"], again.params)
    assert "error" not in again.user_attrs and count_trials(study) == (2, 0)


def make_task(folder):
    return StudyPlan(PROGRAM, "", SPACE, Objective(), folder, "", "").load_task()


def test_ctrl_c_queues_the_trial_again(tiny_qwen3, tmp_path, monkeypatch):
    real = joint.Run._slow_step

    def interrupted(self, state):
        if state.step == 1:
            raise KeyboardInterrupt
        return real(self, state)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(joint.Run, "_slow_step", interrupted)
        tune_tiny(tiny_qwen3, tmp_path, trials=1)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=1)
    assert states(study) == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].user_attrs["folder"] == study.trials[1].user_attrs["folder"]
    assert retried_numbers(study) == {0} and count_trials(study) == (1, 0)


def test_a_stopped_study_goes_on_however_often_and_wherever_it_was_moved(
    tiny_qwen3, tmp_path, monkeypatch
):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    here, there = tmp_path / "here", tmp_path / "there"
    for _ in range(5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runner, "_optimizer", stopped)
            patch.setattr(runner, "_check_settings", lambda *_: None)
            tune_tiny(tiny_qwen3, here, trials=1)
    here.rename(there)
    study = tune_tiny(tiny_qwen3, there, trials=1)
    assert states(study) == [*[TrialState.FAIL] * 5, TrialState.COMPLETE]
    assert study.best_trial.user_attrs["folder"] == str(there / "trial-0000")
    assert (there / "trial-0000" / "result.json").exists() and not here.exists()


# --- storages and workers --------------------------------------------------------------------


def test_a_journal_file_keeps_a_study(tiny_qwen3, tmp_path):
    storage = f"journal:///{tmp_path}/journal.log"
    tune_tiny(tiny_qwen3, tmp_path, trials=1, storage=storage)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=2, storage=storage)
    assert states(study) == [TrialState.COMPLETE] * 2
    assert (tmp_path / "journal.log").stat().st_size > 0


def test_a_trial_whose_worker_nobody_can_watch_is_told_of(
    tiny_qwen3, tmp_path, monkeypatch, caplog
):
    """A journal has no heartbeats: the study would wait for it without a word."""

    class Waited(Exception):
        pass

    def waited(_):
        if len(caplog.records):
            raise Waited

    monkeypatch.setattr(runner.time, "sleep", waited)
    for kind, told in (("sqlite", False), ("journal", True)):
        plan = plan_tiny(
            tiny_qwen3, tmp_path / kind, f"{kind}:///{tmp_path}/{kind}/study", trials=1
        )
        study = runner.open_study(plan, plan.load_task())
        study.ask().set_user_attr("worker", "of-another-machine")
        assert unwatched(study, plan.storage, plan.folder) == [0] * told
    with pytest.raises(Waited):
        runner.run_worker(plan)
    assert "waits for trials [0], whose workers are not known" in caplog.text


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_workers_that_start_together_never_take_the_same_queued_trial(kind, tmp_path):
    url, workers, each = f"{kind}:///{tmp_path}/study", 4, 8
    study = optuna.create_study(storage=open_storage(url), study_name="queue")
    for number in range(workers * each):
        study.enqueue_trial({"x": number})
    together = threading.Barrier(workers)

    def take(_):
        own = optuna.load_study(study_name="queue", storage=open_storage(url))
        together.wait()
        return [own.ask().number for _ in range(each)]

    with ThreadPoolExecutor(workers) as pool:
        taken = [number for numbers in pool.map(take, range(workers)) for number in numbers]
    assert sorted(taken) == list(range(workers * each))


def test_a_storage_that_cannot_be_opened_is_a_clear_error():
    for url in ("study.db", "sqlite:////proc/x/y.db", "journal:////proc/x/y.log", "nosql://x"):
        with pytest.raises(ConfigError, match=r"storage|driver"):
            open_storage(url)


@pytest.mark.parametrize("name", ["q?uery", "50%25", "{x}", "a b#c", "[red]", "é"])
def test_a_study_lies_where_it_is_said_whatever_the_folder_is_called(name, tmp_path):
    file = tmp_path / name / "study.db"
    optuna.create_study(storage=open_storage(sqlite_url(file)), study_name="fst")
    assert [path.name for path in tmp_path.iterdir()] == [name] and file.is_file()
    assert optuna.load_study(study_name="fst", storage=open_storage(sqlite_url(file))).trials == []


def plan_tiny(model, folder, storage, **change):
    plan = {
        "task": PROGRAM,
        "lm": str(model),
        "space": SPACE,
        "objective": Objective(rollouts=BUDGET),
        "folder": folder,
        "storage": storage,
        "study_name": "fst",
        "fixed": FIXED,
    }
    return StudyPlan(**{**plan, **change})


def start_worker(plan, index=0):
    process = multiprocessing.get_context("spawn").Process(
        target=runner._process, args=(plan, index)
    )
    process.start()
    return process


def test_the_trial_of_a_killed_worker_goes_on_in_its_folder(tiny_qwen3, tmp_path, monkeypatch):
    storage = f"journal:///{tmp_path}/study.journal"
    objective = Objective(rollouts=160, pruner="none")
    plan = plan_tiny(tiny_qwen3, tmp_path, storage, objective=objective, trials=1)
    worker = start_worker(plan)
    checkpoints = tmp_path / "trial-0000" / "checkpoints"
    wait_for(
        lambda: any(path.name.isdigit() and int(path.name) > 3 for path in checkpoints.glob("*"))
    )
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    study = optuna.load_study(study_name="fst", storage=open_storage(storage))
    assert states(study) == [TrialState.RUNNING]

    steps = []
    real = joint.Run._slow_step

    def counted(self, state):
        steps.append(state.step)
        return real(self, state)

    monkeypatch.setattr(joint.Run, "_slow_step", counted)
    runner.run_worker(plan)
    lost, again = study.trials
    assert (lost.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert lost.params == again.params
    assert lost.user_attrs["folder"] == again.user_attrs["folder"]
    assert steps[0] > 0
    cycles = [row["cycle"] for row in read_jsonl(tmp_path / "trial-0000" / "cycles.jsonl")]
    assert cycles == list(range(len(cycles))) and len(again.intermediate_values) == 21


def test_two_processes_share_a_sqlite_study_and_one_may_be_killed(tiny_qwen3, tmp_path):
    killed = []

    def kill_one(study, trial):
        if not killed:
            wait_for(lambda: held(tmp_path))
            killed.append(held(tmp_path)[0])
            os.kill(killed[0], signal.SIGKILL)
            (tmp_path / "killed").touch()

    study = tune_tiny(
        tiny_qwen3,
        tmp_path,
        trials=4,
        workers=2,
        on_trial=kill_one,
        lm=partial(held_model, str(tiny_qwen3), tmp_path),
    )
    (lost,) = retried_numbers(study)
    ended = [trial for trial in study.trials if trial.number not in retried_numbers(study)]
    assert 4 <= len(ended) <= 5
    assert {trial.state for trial in ended} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len({trial.user_attrs["worker"] for trial in study.trials}) == 2
    assert len({trial.user_attrs["folder"] for trial in ended}) == len(ended)
    left = [path.stem for path in (tmp_path / "workers").glob("*.lock")]
    assert left == [study.trials[lost].user_attrs["worker"]]  # the other one left in order


def test_workers_that_all_die_are_reported(tiny_qwen3, tmp_path):
    def kill_all(self):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    plan = plan_tiny(tiny_qwen3, tmp_path, f"sqlite:///{tmp_path}/study.db", trials=1)
    study = runner.open_study(plan, plan.load_task())
    told = runner._Told(study, None)
    told.update = kill_all.__get__(told)
    with pytest.raises(FSTError, match="0 of 1 trials are done"):
        runner._run_processes(plan, 2, told)


def test_a_worker_of_this_machine_is_known_to_live_by_its_lock(tmp_path):
    from fst_dspy.study.storage import _locked_if_dead

    with worker_alive(tmp_path) as name, _locked_if_dead(tmp_path, name) as dead:
        assert not dead
    with _locked_if_dead(tmp_path, name) as dead:
        assert not dead  # it left in order, and left no trial
    (tmp_path / "workers" / "gone.lock").touch()
    with _locked_if_dead(tmp_path, "gone") as dead:
        assert dead
        with _locked_if_dead(tmp_path, "gone") as second:
            assert not second


def comes_up(server, ready):
    """Whether a PostgreSQL server does; it ends where another program has taken its port."""

    def settled():
        return (
            server.poll() is not None or subprocess.run(ready, capture_output=True).returncode == 0
        )

    wait_for(settled)
    return server.poll() is None


@pytest.fixture
def postgres_url():
    """A PostgreSQL server of our own on loopback."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))
    pytest.importorskip("psycopg", reason="the extra fst-dspy[postgres] is not installed")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    binaries = Path(initdb).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        user = {}
        if os.getuid() == 0:  # the server refuses to run as root
            user = {"user": "nobody"}
            shutil.chown(folder, "nobody")
        data = Path(folder) / "data"
        command = [str(binaries / "initdb"), "-D", data, "-A", "trust", "-U", "fst", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)
        for _ in range(5):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            options = ["-p", str(port), "-h", "127.0.0.1", "-k", folder, "-F"]
            server = subprocess.Popen(
                [str(binaries / "postgres"), "-D", data, *options],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                **user,
            )
            # Asked by its socket file: at the port another program's server might answer.
            if comes_up(server, [str(binaries / "pg_isready"), "-h", folder, "-p", str(port)]):
                break
        else:
            pytest.fail("no PostgreSQL server starts")
        try:
            yield f"postgresql://fst@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
            server.wait(timeout=120)


def test_postgresql_keeps_a_study(postgres_url, tiny_qwen3, tmp_path):
    tune_tiny(tiny_qwen3, tmp_path, trials=1, storage=postgres_url)
    study = tune_tiny(tiny_qwen3, tmp_path, trials=2, storage=postgres_url)
    assert states(study) == [TrialState.COMPLETE] * 2
    assert best_settings(study)["max_rollouts"] == BUDGET


def test_the_command_runs_a_study_and_writes_its_best_settings(tiny_qwen3, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("parameters: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}")
    settings = {**FIXED, "population_size": 1, "group_size": 2}
    command = ["tune", PROGRAM, "--model", str(tiny_qwen3), "--out", str(tmp_path / "study")]
    command += ["--trials", "1", "--rollouts", str(BUDGET), "--space", str(path)]
    command += ["--objective", "score,kl_to_base", "--at-most", "kl_to_base=9"]
    command += ["--at-least", "score=0"]
    command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "1 completed, 0 pruned, 0 failed" in shown.output
    best = json.loads((tmp_path / "study" / "best.json").read_text())
    assert best == {
        **settings,
        "learning_rate": 3e-4,
        "max_rollouts": BUDGET,
    }
    assert (tmp_path / "study" / "front.png").exists()
    wrong = CliRunner().invoke(app, ["tune", PROGRAM, "--objective", "sore"])
    assert wrong.exit_code == 1 and "there is no measure" in wrong.output


def test_the_best_settings_are_shown_as_a_shell_takes_them(tmp_path):
    settings = {"loss_type": "dapo", "lora": {"rank": 4}, "reflection_prompt_template": "it's"}
    attributes = {
        "settings": settings,
        "measured": {"score": 1.0, "kl_to_base": 0.0, "rollouts": 9},
    }
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
    console = Console(file=io.StringIO(), width=400)
    report_study(console, study, tmp_path)
    said = shlex.split(console.file.getvalue().splitlines()[-1])
    assert said[::2] == ["--set"] * 3 and parse_settings(said[1::2]) == settings


# --- settings tuned inside a compile ---------------------------------------------------------


def compile_tuned(model, folder=None, **change):
    options = {"max_rollouts": 150, "trials": 3, "space": SPACE, "track_stats": True, **FIXED}
    with dspy.context(lm=LocalLM(str(model)), adapter=RawAdapter()):
        trainset = change.pop("trainset", questions(6))
        tuned = TunedFST(vowels, log_dir=folder, **{**options, **change})
        return tuned.compile(Echo(), trainset=trainset, valset=questions(4, 6))


@pytest.mark.usefixtures("repeatable_sampling")
def test_settings_are_tuned_inside_one_budget_and_the_best_run_goes_on(tiny_qwen3, tmp_path):
    compiled = compile_tuned(tiny_qwen3, tmp_path)
    result = compiled.detailed_results
    assert len(result.tried) == 3
    winner, *others = sorted(result.tried, key=lambda one: one.given_up_after is not None)
    assert winner.given_up_after is None and all(one.given_up_after for one in others)
    assert winner.score == max(record.val_score for record in result.records)
    assert winner.score >= max(one.score for one in others)
    assert result.rollouts.total == sum(one.rollouts.total for one in result.tried)
    last_cycle = result.records[-1].rollouts.total
    assert 150 <= result.rollouts.total < 150 + last_cycle
    assert winner.rollouts.total > max(one.rollouts.total for one in others)
    assert compiled.say.lm.model == result.best.version
    with dspy.context(adapter=RawAdapter()):
        assert compiled(question="number 1").answer is not None
        assert result.quadrants(questions(2, 10)).examples == 2
    again = compile_tuned(tiny_qwen3, tmp_path).detailed_results
    assert again.tried == result.tried and again.records == result.records
    whole = compile_tuned(tiny_qwen3).detailed_results
    assert [one.score for one in whole.tried] == [one.score for one in result.tried]
    assert whole.weights_version == result.weights_version and whole.log_dir is None


class Heard(SilentProgress):
    """Keeps what it is told."""

    def __init__(self):
        self.plans, self.said, self.counts = [], [], []

    def phase(self, cycle, name, counts):
        self.counts.append(counts.total)

    def plan(self, plan):
        self.plans.append(plan)

    def say(self, text):
        self.said.append(text)


class Counting:
    """A proposer that remembers how often it was asked."""

    of_all: ClassVar[list[int]] = []

    def __init__(self):
        self.asked = 0

    def propose(self, components, records, names):
        self.asked += 1
        self.of_all.append(self.asked)
        return {}


def test_settings_are_compared_without_what_others_have_taught_a_proposer(tiny_qwen3):
    proposer = Counting()
    compile_tuned(tiny_qwen3, trials=2, max_rollouts=24, instruction_proposer=proposer)
    assert proposer.asked == 0 and Counting.of_all.count(1) >= 2


def test_a_listener_hears_of_a_tuned_compile_what_it_hears_of_a_plain_one(tiny_qwen3, caplog):
    listener = Heard()
    compile_tuned(tiny_qwen3, progress=listener, trials=2, max_rollouts=3)
    # All runs are of one budget, by which the time left is told.
    assert listener.counts == sorted(listener.counts) and listener.counts.count(0) == 1
    assert len(listener.plans) == 2 * 2 and "reached by the first validation" in listener.said[0]
    with caplog.at_level("INFO", "fst_dspy"):
        compile_tuned(tiny_qwen3, trials=2, max_rollouts=3)
    assert "cycle   0" in caplog.text
    with pytest.raises(ConfigError, match="progress must be a listener"):
        TunedFST(vowels, max_rollouts=60, progress=object())


def test_settings_that_training_diverges_with_are_given_up(tiny_qwen3, monkeypatch):
    draws = [{"learning_rate": rate} for rate in (1e30, 1e-2)]
    monkeypatch.setattr(tuned_module, "draw_settings", lambda *_: draws)
    options = {"max_rollouts": 200, "trials": 2, "steps_per_cycle": 8, "rollouts_per_candidate": 2}
    result = compile_tuned(tiny_qwen3, **options, space=Space((SPACE.parameters[0],)))
    bad, good = result.detailed_results.tried
    assert (bad.given_up_after, good.given_up_after) == (1, None)
    assert bad.rollouts.total > 0 and result.detailed_results.config.slow.learning_rate == 1e-2
    draws[1] = draws[0]
    with pytest.raises(TrainingError, match="not finite"):
        compile_tuned(tiny_qwen3, **options, space=Space((SPACE.parameters[0],)))


def test_draws_that_cannot_work_are_refused_before_any_of_them_runs(tiny_qwen3, tmp_path):
    space = Space((Categorical("group_size", (4, 6)), Categorical("population_size", (2, 4))))
    with pytest.raises(ConfigError, match=r"group_size \(6\) must be a multiple"):
        compile_tuned(tiny_qwen3, tmp_path / "tuned", space=space, trials=5)
    assert not (tmp_path / "tuned").exists()


def test_a_training_set_that_can_be_read_once_is_enough(tiny_qwen3):
    once = (question for question in questions(6))
    compiled = compile_tuned(tiny_qwen3, trainset=once, trials=2, max_rollouts=60)
    assert len(compiled.detailed_results.tried) == 2


def test_settings_that_the_user_gives_are_not_tuned():
    tuned = TunedFST(vowels, max_rollouts=100, group_size=8, learning_rate=1e-3)
    names = {parameter.name for parameter in tuned.space.parameters}
    assert not {"learning_rate", "rollouts_per_candidate", "group_size"} & names
    prompts = TunedFST(vowels, max_rollouts=100, arm="gepa_only").space
    assert "learning_rate" not in {parameter.name for parameter in prompts.parameters}
    weights = TunedFST(vowels, max_rollouts=100, arm="rl_only").space
    assert "minibatch_size" not in {parameter.name for parameter in weights.parameters}
    paper = TunedFST(vowels, max_rollouts=100, auto="paper").space
    names = {parameter.name for parameter in paper.parameters}
    assert "learning_rate" in names and not {"rollouts_per_candidate", *AUTO["paper"]} & names
    assert usual_space("fst", {"auto": "paper", "lr": 1e-4}) == paper.without("learning_rate")
    drawn = draw_settings(default_space(), 3, seed=1)
    assert drawn == draw_settings(default_space(), 3, seed=1)
    assert drawn[0] == default_space().defaults() and drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 1}, "at least 2"),
        ({"trials": "4"}, "trials must be a whole number"),
        ({"tuning_share": 1.0}, "tuning_share"),
        ({"tuning_share": "half"}, "tuning_share must be a number"),
        ({"track_stats": "no"}, "track_stats must be True or False"),
        ({"space": {"learning_rate": [1e-5, 1e-4]}}, "space must be a .*Space, got dict"),
        ({"learning_rte": 1.0}, "did you mean"),
    ],
)
def test_a_tuned_compile_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TunedFST(vowels, **{"max_rollouts": 100, **change})
