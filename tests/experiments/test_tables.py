"""Experiments: what a job does, in this process and on tiny random models; stores and tables."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import dspy
import pytest
from experiment_runs import TINY, column, job_of, made_run, record, run
from helpers import RawAdapter
from long_model import save_long_model
from places import PROGRAM, SUPPORT

from fst_dspy.config import FSTConfig
from fst_dspy.errors import ConfigError, DataError, StoreError
from fst_dspy.experiments import ARMS, AXES, ExperimentStore, Plan, compare, tuned_rl, write_results
from fst_dspy.experiments.findings.contrasts import ablations, against_rl, asymptotes, mean_curves
from fst_dspy.experiments.findings.show import Found, make_tables
from fst_dspy.experiments.findings.tables import forgetting_table, summary
from fst_dspy.experiments.jobs import read_outcome, read_records, write_outcome
from fst_dspy.experiments.packed import pack, unpack
from fst_dspy.experiments.protocols.ablate import REFERENCE, variants_of
from fst_dspy.experiments.runs import load_runs, shared_budget
from fst_dspy.experiments.tuned_rl import rl_space, tune_rl
from fst_dspy.experiments.worker import run_job
from fst_dspy.files import read_json
from fst_dspy.measures import Forgetting, Interval, mean_at_k, score_curve
from fst_dspy.results.plots import draw_comparison
from fst_dspy.types import RolloutCounts

# --- what a job does ------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_within_its_budget_and_is_tested(arm, tiny_qwen3, tmp_path):
    job = job_of(tiny_qwen3, arm)
    if arm == "fst_distill":  # which cannot read a program that sets its adapter as it runs
        job = replace(job, program=str(Path(PROGRAM).with_name("plain_letters.py")))
    with dspy.context(adapter=RawAdapter()):
        outcome = run(tmp_path, job)
    records = read_records(tmp_path / job.name, outcome.stages)
    assert len(outcome.stages) == len(ARMS[arm].stages)
    assert records[-1].total_rollouts == outcome.rollouts
    assert 30 < outcome.rollouts.total <= job.rollouts
    assert outcome.steps == records[-1].step
    trains, searches = arm not in ("gepa_only",), arm not in ("rl_only", "rl_both", "sdpo")
    assert (outcome.rollouts.slow > 0, outcome.rollouts.fast > 0) == (trains, searches)
    assert {len(scores) for scores in outcome.test["trained_evolved"].values()} == {4}
    assert {len(scores) for scores in outcome.test["base_original"].values()} <= {1, 4}
    assert all(len(examples) == 4 for examples in outcome.test.values())
    moved = outcome.trained_version != outcome.base_version
    assert (outcome.kl_to_base > 0) == moved
    assert outcome.entropy > 0 and outcome.seconds["test"] > 0
    assert read_outcome(tmp_path / job.name) == outcome


def test_a_stage_goes_on_from_the_best_pair_of_the_one_before(tiny_qwen3, tmp_path):
    for arm in ("sequential", "sequential_reverse"):
        job = job_of(tiny_qwen3, arm)
        stages = run(tmp_path, job).stages
        first, second = (
            {name: read_json(tmp_path / job.name / stage / name) for name in FILES}
            for stage in stages
        )
        best = first["result.json"]["best"]
        assert second["config.json"]["student"] == best["candidate"]["components"]
        assert second["config.json"]["model"] == best["version"]
        assert first["result.json"]["records"][-1]["total_rollouts"]["slow"] == (
            0 if arm == "sequential" else first["result.json"]["records"][-1]["step"] * 8
        )
    # Weights that were trained before are not at the base, and the second stage says so.
    assert best["version"] != second["result.json"]["base_version"]
    assert second["result.json"]["records"][0]["kl_to_base"] > 0


FILES = ("result.json", "config.json")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_job_may_start_from_the_weights_of_a_run(lora, tiny_qwen3, tmp_path):
    settings = {**TINY, "lora": lora, "steps_per_cycle": 2}
    first = job_of(tiny_qwen3, "rl_only", settings=settings)
    trained = run(tmp_path, first).trained_version
    start = tmp_path / first.name / "0-rl_only"
    job = job_of(tiny_qwen3, "rl_only", label="after", settings=settings, start=str(start))
    outcome = run(tmp_path, job)
    folder = tmp_path / job.name / "0-rl_only"
    (record, *_) = read_records(tmp_path / job.name, outcome.stages)
    base = read_json(start / "result.json")["base_version"]
    assert read_json(folder / "config.json")["model"] == trained == record.weights_version != base
    assert record.kl_to_base > 0 and outcome.base_version == base
    (tmp_path / job.name / "outcome.json").unlink()
    assert replace(run_job(tmp_path / job.name), seconds={}) == replace(outcome, seconds={})


def test_a_job_that_has_ended_comes_to_the_same_again(tiny_qwen3, tmp_path):
    job = job_of(tiny_qwen3)
    first = run(tmp_path, job)
    (tmp_path / job.name / "outcome.json").unlink()
    again = run_job(tmp_path / job.name)
    assert replace(again, seconds={}) == replace(first, seconds={})


@pytest.mark.parametrize("arm", ["gepa_only", "sequential"])
def test_a_program_whose_answers_are_held_to_their_format_is_tested_so(arm, tmp_path):
    program = tmp_path / "readable.py"
    program.write_text(
        "from long_model import DESKS, Router, tickets\n"
        "from fst_dspy import Task\n"
        "def readable(gold, pred, trace=None, pred_name=None, pred_trace=None):\n"
        "    return float(pred.desk in DESKS)\n"  # what cannot be read never comes here
        "def load(seed=0):\n"
        "    splits = tickets(6), tickets(2, 6), tickets(2, 8)\n"
        "    return Task('readable', Router(), readable, *splits)\n"
    )
    settings = {**TINY, "max_tokens": 40, "on_no_signal": "warn"}
    job = job_of(save_long_model(tmp_path / "long"), arm, program=str(program), settings=settings)
    assert {score for q in run(tmp_path, job).test.values() for s in q.values() for score in s} == {
        1
    }


def test_forgetting_is_measured_on_other_programs(tiny_qwen3, tmp_path):
    other = tmp_path / "other_program.py"
    other.write_text(
        "from dataclasses import asdict, replace\n"
        "import study_program\n"
        "def load(seed=0):\n"
        "    ideal = {'say': 'Say a, b and c.'}\n"
        "    return replace(study_program.load(seed), name='other', ideal_instructions=ideal)\n"
    )
    lost = run(tmp_path, job_of(tiny_qwen3, forget_on=(str(other),), test_size=3)).forgetting
    assert [found.task for found in lost] == ["other"]
    assert lost[0].before.k == 4 and lost[0].before.examples == 3
    change = lost[0].after.mean - lost[0].before.mean
    assert lost[0].change.mean == pytest.approx(change, abs=1e-9)
    with pytest.raises(DataError, match="ideal_instructions"):
        run(tmp_path / "bare", job_of(tiny_qwen3, forget_on=(PROGRAM,)))
    assert not list((tmp_path / "bare").rglob("cycles.jsonl"))


# --- jobs, plans and stores -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "rl"}, "no arm 'rl'; known: fst, rl_only"),
        ({"label": "a/b"}, "names a folder"),
        ({"rollouts": 0}, "at least 1"),
        ({"settings": {"max_rollouts": 5}}, "the job's budget"),
        ({"settings": {"learning_rte": 1}}, "learning_rate"),
        ({"settings": {"group_size": 6}}, "multiple of population_size"),
    ],
)
def test_jobs_that_cannot_work_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        job_of("embedded", **change)
    assert job_of("embedded", arm="rl_only", settings={"group_size": 6}).label == "rl_only"


def test_plans_are_checked_before_anything_runs(tmp_path):
    store = ExperimentStore(tmp_path / "store")
    for arms, options, message in (
        (["fst", "best"], {}, "no arm 'best'"),
        (["fst", "fst"], {}, "each once"),
        (["fst"], {"rl_trials": 3}, "nothing to tune"),
        (["rl_only"], {"rl_budget_factor": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(store, Plan(PROGRAM), arms, **options)
    with pytest.raises(DataError, match="ideal_instructions"):
        compare(store, Plan(PROGRAM, forget_on=(PROGRAM,)), ["fst"])
    assert not store.folder.exists()


def test_a_store_takes_no_other_job_of_a_name_and_no_other_protocol(tmp_path):
    store = ExperimentStore(tmp_path / "store")
    with store.locked():
        store.begin("compare")
        store.add(job_of("embedded"))
        store.add(job_of("embedded"))
        with pytest.raises(StoreError, match="rollouts 60, not 61"):
            store.add(job_of("embedded", rollouts=61))
        store.update("fst-0", state="failed", error="it rained")
    again = ExperimentStore(store.folder)
    assert again.status["fst-0"].error == "it rained"
    again.update("fst-0", state="running")
    again.begin("compare")  # the one that ran it is gone
    assert again.status["fst-0"].state == "waiting"
    assert again.job("fst-0") == job_of("embedded")
    with pytest.raises(StoreError, match="holds a store of compare, not ablate"):
        again.begin("ablate")
    with again.locked(), pytest.raises(StoreError, match="another process"), again.locked():
        pass
    # What another process has added since a store was read is not written over.
    late, other = ExperimentStore(store.folder), ExperimentStore(store.folder)
    with other.locked():
        other.add(job_of("embedded", seed=1))
        other.save()
    with late.locked():
        late.begin("compare")
    assert list(ExperimentStore(store.folder).status) == ["fst-0", "fst-1"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".DS_Store").touch()
    ExperimentStore(tmp_path / "mine")  # which was looked at, is empty
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="no store of experiments"):
        ExperimentStore(tmp_path / "mine")
    with pytest.raises(StoreError, match="no store of experiments"):
        write_results(tmp_path / "nowhere")


def test_every_axis_has_the_default_as_reference_and_changes_what_it_says():
    reference = FSTConfig.make()
    for axis in AXES:
        variants = variants_of(axis, {})
        assert sum(label == REFERENCE for label in variants) == 1
        for label, change in variants.items():
            assert (FSTConfig.make(**change) == reference) == (label == REFERENCE)
    assert [v["population_size"] for v in AXES["K"].values()] == [1, 2, 4, 8]
    assert [v["steps_per_cycle"] for v in AXES["T"].values()] == [1, 3, 6, 12]
    assert REFERENCE not in variants_of("K", {"population_size": 16, "group_size": 16})
    with pytest.raises(ConfigError, match="known: K, T, advantage"):
        variants_of("colour", {})


def test_ablations_run_the_reference_once_and_every_variant(tmp_path, monkeypatch):
    protocol = importlib.import_module("fst_dspy.experiments.protocols.ablate")
    jobs = []
    monkeypatch.setattr(protocol, "run_jobs", lambda store, found, **_: jobs.extend(found))
    store = ExperimentStore(tmp_path / "store")
    protocol.ablate(store, Plan(PROGRAM, seeds=2, settings={"val_size": 2}), ["K", "weights"])
    labels = ("fst", "K=1", "K=2", "K=8", "weights=lora")
    assert [job.name for job in jobs] == [f"{label}-{s}" for s in (0, 1) for label in labels]
    assert {job.arm for job in jobs} == {"fst"}
    assert jobs[1].settings == {"val_size": 2, "population_size": 1}
    axes = ExperimentStore(store.folder).about["axes"]
    assert axes["K"]["fst"] == {"population_size": 4}
    assert axes["weights"]["weights=lora"]["lora"] is True


def test_the_baseline_is_tuned_in_all_that_it_should_be():
    space = rl_space()
    assert {p.name for p in space.parameters} == {
        "learning_rate", "epsilon_high", "problems_per_step", "group_size", "temperature", "beta",
        "entropy_coef", "revisit_constant",
    }  # fmt: skip
    small = FSTConfig.make(learning_rate=3e-4)  # as the ranges are
    assert FSTConfig.make(**space.defaults()) == small
    assert space.for_size(135_000_000).defaults()["learning_rate"] == 5e-5


# --- tables ---------------------------------------------------------------------------------------


def two_arms():
    rl = [(0, 10, 0.1, 0.0), (1, 50, 0.4, 0.2), (2, 90, 0.6, 0.5), (3, 100, 0.5, 0.6)]
    fst = [(0, 10, 0.1, 0.0), (1, 30, 0.7, 0.1), (2, 100, 0.9, 0.2)]
    runs = []
    for seed in (0, 1):
        runs.append(made_run("fst", "fst", seed, [record(*row, step=row[0] * 3) for row in fst],
                             [1.0, 0.8 - seed * 0.2]))  # fmt: skip
        runs.append(made_run("rl_only", "rl_only", seed, [record(*row) for row in rl], [0.5, 0.3]))
    return runs


def test_the_tables_give_what_can_be_worked_out_by_hand():
    runs = two_arms()
    means = summary(runs)
    assert shared_budget(runs) == 100
    # One that ended of itself holds its last score to its budget.
    early = replace(runs[0].records[-1], total_rollouts=RolloutCounts(slow=50), ended=True)
    assert shared_budget([replace(runs[0], records=(early,)), *runs[1:]]) == 100
    budget_cut = replace(early, ended=False)
    assert shared_budget([replace(runs[0], records=(budget_cut,)), *runs[1:]]) == 50
    # Seeds score 0.9 and 0.8: standard error 0.05, Student's factor 12.706 at one degree.
    assert column(means, "test")["fst"] == "0.850 ± 0.635"
    assert column(means, "area")["fst"] == f"{(30 * 0.1 + 70 * 0.7) / 100:.3f}"
    assert column(means, "s")["fst"] == "5"
    against = against_rl(runs)
    (row,) = against.rows
    assert row[:7] == ("fst", "2 of 2", "30", "90", "3.0", "3.0 to 3.0", "3")
    assert column(against, "matched")["fst"] == "0.600"
    assert column(against, "KL less")["fst"] == f"{100 * (1 - 0.1 / 0.5):.0f}"
    assert column(against, "test")["fst"].startswith("0.450 ±")


def test_times_by_seed_are_averaged_as_ratios_are():
    def run_of(label, seed, *points):
        curve = [record(0, 10, 0.1), *(record(n, x, y) for n, (x, y) in enumerate(points, 1))]
        return made_run(label, label, seed, curve, [0.5])

    runs = [run_of("rl_only", seed, (120, 0.5)) for seed in (0, 1, 2)]
    # Four times fewer, four times more, and never: those that get there come out even.
    runs += [run_of("fst", 0, (30, 0.5)), run_of("fst", 1, (480, 0.5)), run_of("fst", 2, (99, 0.4))]
    (row,) = against_rl(runs).rows
    assert row[:6] == ("fst", "2 of 3", "255", "120", "1.0", "0.2 to 4.0")


def test_forgetting_is_averaged_over_seeds():
    runs = [
        replace(run, outcome=replace(run.outcome, forgetting=(lost,)))
        for run, lost in zip(
            [run for run in two_arms() if run.job.arm == "fst"],
            [lost_between(0.9, 0.8), lost_between(0.7, 0.7)],
            strict=True,
        )
    ]
    (row,) = forgetting_table(runs).rows
    # Changes of -0.1 and 0: standard error 0.05, Student's factor 12.706 at one degree.
    assert row == ("fst", "other", "2", "0.800", "0.750", "-0.050 ± 0.635")


def lost_between(before, after):
    scores = [mean_at_k([{"a": (score,), "b": (score,)}]) for score in (before, after)]
    return Forgetting("other", *scores, Interval(after - before, None, None, 1, 0.95))


def test_runs_of_several_stages_get_no_asymptote_and_ablations_hold_the_last_score():
    runs = two_arms()
    staged = replace(runs[0], outcome=replace(runs[0].outcome, stages=("0-a", "1-b")))
    assert [row[0] for row in asymptotes([staged, runs[1]]).rows] == ["rl_only"]
    short = made_run("K=1", "fst", 0, [record(0, 10, 0.2), record(1, 50, 0.6)], [0.5])
    table = ablations([short, runs[0]], {"K": {"K=1": {"population_size": 1}}})
    assert column(table, "area") == {"K": "0.400"}  # 0.2 to 50, then 0.6 to the budget of 100


def test_the_longest_runs_of_rl_are_what_others_are_set_against():
    runs = two_arms()
    more = [record(0, 10, 0.1), record(1, 500, 0.95)]
    runs += [made_run("rl_only-5x", "rl_only", seed, more, [0.6, 0.6], 500) for seed in (0, 1)]
    against = against_rl(runs)
    assert against.title == "Against rl_only-5x"
    assert column(against, "reached") == {"fst": "0 of 2", "rl_only": "0 of 2"}
    assert column(against, "rollouts")["fst"] == "—"
    assert against_rl([run for run in runs if run.job.arm == "fst"]) is None


def test_mean_curves_are_set_against_the_mean_curve_of_rl():
    def runs_of(label, *curves):
        return [
            made_run(label, label, seed, [record(*point) for point in points], [0.5])
            for seed, points in enumerate(curves)
        ]

    # One lucky score each: the mean is 0.1, 0.45, 0.45; of fst 0.1, then 0.5 once both have risen.
    rl = runs_of(
        "rl_only",
        [(0, 10, 0.1), (1, 100, 0.6), (2, 200, 0.3)],
        [(0, 10, 0.1), (1, 100, 0.3), (2, 200, 0.6)],
    )
    fst = runs_of("fst", [(0, 10, 0.1), (1, 40, 0.5)], [(0, 10, 0.1), (1, 50, 0.5)])
    (row,) = mean_curves([*rl, *fst]).rows
    assert row == ("fst", "2", "0.450", "—", "100", "—", "0.300"), "the first run ends at 40"
    fst = runs_of("fst", [(0, 10, 0.1), (1, 40, 0.5), (2, 90, 0.5)], [(0, 10, 0.1), (1, 50, 0.5)])
    (row,) = mean_curves([*rl, *fst]).rows
    assert row == ("fst", "2", "0.450", "50", "100", "2.0", "0.500")
    assert mean_curves([*rl[:1], *fst]) is None and mean_curves(fst) is None
    # A seed of rl that is done at 100 does not cut off what the other reaches at 200.
    done = replace(rl[0], records=(rl[0].records[0], replace(rl[0].records[1], ended=True)))
    long = [replace(run, job=replace(run.job, rollouts=200)) for run in (done, rl[1])]
    (row,) = mean_curves([*long, *fst]).rows
    assert row == ("fst", "2", "0.600", "—", "200", "—", "0.500")


def test_figures_show_scores_beyond_0_and_1():
    def limits(*scores):
        curve = [record(n, 10 * n, score) for n, score in enumerate(scores)]
        return draw_comparison({"fst, seed 0": curve}, "").axes[0].get_ylim()

    assert limits(0.2, 0.9) == (-0.02, 1.02)
    low, high = limits(-3.0, 5.0)
    assert low < -3 and high > 5


def test_a_baseline_that_never_rose_is_reached_by_nobody():
    flat = made_run("rl_only", "rl_only", 0, [record(0, 10, 0.1), record(1, 90, 0.1)], [0.1])
    against = against_rl([two_arms()[0], flat])
    assert column(against, "reached")["fst"] == "0 of 0"


def test_ablations_are_paired_with_the_reference():
    reference = [made_run("fst", "fst", s, [record(0, 100, 0.5)], [0.5 + s]) for s in (0, 1)]
    other = [made_run("K=1", "fst", s, [record(0, 100, 0.4)], [0.4 + s]) for s in (0, 1)]
    axes = {"K": {"K=1": {"population_size": 1}, "fst": {"population_size": 4}, "K=8": {}}}
    table = ablations([*reference, *other], axes)
    assert [row[:2] for row in table.rows] == [
        ("K", "population_size=1"),
        ("K", "population_size=4"),
    ]
    assert [row[table.columns.index("difference")] for row in table.rows] == ["-0.100 ± 0.000", "—"]
    # The reference's only seed that has ended is not the variant's.
    table = ablations([reference[0], other[1]], axes)
    assert [row[table.columns.index("difference")] for row in table.rows] == ["—", "—"]


def store_of(runs, folder):
    """A store in which these have ended."""
    store = ExperimentStore(folder)
    with store.locked():
        store.begin("compare")
        for run in runs:
            store.add(run.job)
            own = store.folder / run.job.name
            write_outcome(own, run.outcome)
            (own / "0-fst").mkdir()
            lines = [json.dumps(asdict(record)) + "\n" for record in run.records]
            (own / "0-fst" / "cycles.jsonl").write_text("".join(lines))
        store.save()
    return store


def test_results_are_written_from_whatever_has_ended(tmp_path):
    store = store_of(two_arms(), tmp_path / "store")
    with store.locked():
        store.add(replace(two_arms()[0].job, seed=7))
        store.update("fst-7", state="failed", error="killed by signal 9")
        store.about["tuned_rl"] = {"rl_only": TUNED}
        store.save()
    tables, files = write_results(store.folder, tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert [file.name for file in files] == ["results.md", "results.json", "comparison.png"]
    assert all(file.stat().st_size > 1000 for file in files)
    assert "| fst | 2 | 0.850 ± 0.635 |" in text
    assert "| fst-7 | failed | killed by signal 9 |" in text
    assert "beta=0.01" in text and "Chosen: learning_rate=0.0003" in text
    assert [table.title for table in tables] == [
        "Means over seeds", "Against rl_only", "Mean curves against that of rl_only",
        "Asymptote of the validation score", "Quadrants of the test score", "How rl_only was tuned",
        "Every run", "Not in these tables",
    ]  # fmt: skip
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert [row["outcome"]["test"]["trained_evolved"] for row in rows] == [0.9, 0.4, 0.8, 0.4]
    assert rows[0]["curve"][1]["rollouts"] == 30
    runs = load_runs(store)
    assert runs == two_arms()
    assert len(make_tables(Found(store, tuple(runs), ()))) == len(tables)


TUNED = {
    "seed": 0,
    "rollouts": 100,
    "settings": {"learning_rate": 3e-4},
    "trials": [
        {"number": 0, "state": "complete", "score": 0.6, "spent": 99, "settings": {"beta": 0.01}},
        {"number": 1, "state": "fail", "score": None, "spent": None, "settings": {}},
        {"number": 2, "state": "pruned", "score": None, "spent": 40, "settings": {"beta": 0.1}},
    ],
}


def test_records_of_several_stages_are_those_of_one_run(tmp_path):
    for stage in ("0-a", "1-b"):
        (tmp_path / stage).mkdir()
        first, second = (record(n, 20 + 40 * n, 0.1, step=n) for n in (0, 1))
        lines = [asdict(first), asdict(replace(second, early_scores=((30, 0.2),)))]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / stage / "cycles.jsonl").write_text(text)
    found = read_records(tmp_path, ("0-a", "1-b"))
    assert [r.cycle for r in found] == [0, 1, 2, 3]
    assert [r.step for r in found] == [0, 1, 1, 2]
    assert [r.total_rollouts.total for r in found] == [20, 60, 80, 120]
    assert score_curve(found).x == (20, 30, 60, 80, 90, 120)


def test_what_has_ended_is_packed_and_goes_on_elsewhere(tmp_path):
    here = store_of(two_arms(), tmp_path / "here")
    here.about["tuned_rl"] = {"rl_only": TUNED}
    here.add(replace(two_arms()[0].job, seed=7))  # has not ended
    here.save()
    pack(here, tmp_path / "jobs.jsonl")

    there = unpack(tmp_path / "jobs.jsonl", tmp_path / "there")
    assert load_runs(there) == load_runs(ExperimentStore(there.folder)) == two_arms()
    assert (there.about, there.calls) == (here.about, here.calls)
    assert "fst-7" not in there.status and there.status["fst-0"].state == "done"
    pack(there, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "jobs.jsonl").read_bytes()

    # Two machines' jobs come together, and what is there already stays.
    first, *others = two_arms()
    half = store_of([first], tmp_path / "half")
    before = (half.folder / "fst-0" / "outcome.json").stat().st_mtime_ns
    assert len(load_runs(unpack(tmp_path / "jobs.jsonl", half.folder))) == 1 + len(others)
    assert (half.folder / "fst-0" / "outcome.json").stat().st_mtime_ns == before

    other = store_of([replace(first, job=replace(first.job, rollouts=61))], tmp_path / "other")
    (other.folder / "fst-0" / "outcome.json").unlink()
    with pytest.raises(StoreError, match="rollouts 61, not"):
        unpack(tmp_path / "jobs.jsonl", other.folder)


@pytest.mark.parametrize(
    "change",
    [
        ("0-fst", "../../away"),
        ('"label":"fst"', '"label":"../fst"'),
        ('"seed":0', '"seed":"/../../away"'),
        ('"job"', '"jab"'),
        ('"about"', '"abort"'),
    ],
)
def test_a_packed_file_that_is_none_is_refused(change, tmp_path):
    pack(store_of(two_arms(), tmp_path / "here"), tmp_path / "jobs.jsonl")
    broken = (tmp_path / "jobs.jsonl").read_text().replace(*change)
    (tmp_path / "jobs.jsonl").write_text(broken)
    with pytest.raises(StoreError, match="holds no packed experiments"):
        unpack(tmp_path / "jobs.jsonl", tmp_path / "there")
    assert not (tmp_path / "there").exists() and not (tmp_path / "away").exists()


class Opened(Exception):
    """The study was opened."""


def opened(*_, **__):
    raise Opened


def test_a_study_that_is_noted_down_is_not_run_again(tmp_path, monkeypatch):
    store = ExperimentStore(tmp_path / "store")
    store.about["tuned_rl"] = {"rl_only": TUNED}
    plan = Plan(PROGRAM, rollouts=TUNED["rollouts"])
    assert tune_rl(store, plan, 2, "rl_only") == TUNED["settings"]  # a pruned trial is one
    assert not (store.folder / "tune-rl_only").exists()
    # Another setting that is held fixed, or another task, is another study.
    monkeypatch.setattr(tuned_rl, "tune", opened)
    store.about["tuned_rl"]["rl_only"] = {**TUNED, "of": tuned_rl._of(plan)}
    assert tune_rl(store, plan, 2, "rl_only") == TUNED["settings"]
    for other in (
        replace(plan, settings={"val_size": 2}),
        replace(plan, model="other"),
        replace(plan, adapter="xml"),
        replace(plan, program=str(SUPPORT / "study_program_late.py")),
        replace(plan, rollouts=101),
    ):
        with pytest.raises(Opened):
            tune_rl(store, other, 2, "rl_only")
