"""Plasticity and streams of tasks: jobs, tables worked out by hand, real runs of tiny models."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from experiment_runs import TINY, column, job_of, made_run, record
from experiment_runs import run as run_here
from places import PROGRAM, SUPPORT
from typer.testing import CliRunner

from fst_dspy.cli import app
from fst_dspy.errors import ConfigError
from fst_dspy.experiments import (
    SEED_PROMPT,
    ExperimentStore,
    Job,
    Plan,
    continual,
    load_runs,
    load_streams,
    plasticity,
    write_results,
)
from fst_dspy.experiments.findings.figures import band, probe_bands, share_bands, stage_lines
from fst_dspy.experiments.findings.plasticity_tables import every_probe, plasticity_table, probes
from fst_dspy.experiments.findings.stream_tables import every_stage, stage_table, task_table
from fst_dspy.experiments.jobs import read_job, write_job
from fst_dspy.experiments.runner import rollouts_so_far
from fst_dspy.experiments.stages import load_job_task
from fst_dspy.experiments.stream_worker import _learner, run_stream
from fst_dspy.experiments.streams import (
    MODULE,
    Stream,
    StreamOutcome,
    StreamStage,
    read_stream,
    write_stream,
)
from fst_dspy.files import read_json
from fst_dspy.results.plots import Curve
from fst_dspy.types import RolloutCounts

OTHER = str(SUPPORT / "study_program_late.py")


def collected(monkeypatch, name):
    """The jobs that a protocol would run."""
    jobs = []
    protocol = importlib.import_module(f"fst_dspy.experiments.protocols.{name}")
    monkeypatch.setattr(protocol, "run_jobs", lambda store, found, **_: jobs.extend(found) or [])
    return jobs


# --- plasticity -----------------------------------------------------------------------------------


def test_the_second_task_waits_for_the_first(tmp_path, monkeypatch):
    jobs = collected(monkeypatch, "plasticity")
    store = ExperimentStore(tmp_path / "store")
    plan = Plan(PROGRAM, seeds=2, settings={"val_size": 2})
    options = {"second_rollouts": 500, "rl_settings": {"learning_rate": 1e-4}}
    assert plasticity(store, plan, OTHER, **options) == []
    assert [job.name for job in jobs] == [
        f"{label}-{seed}" for seed in (0, 1) for label in ("fst", "rl_only", "from-base")
    ]
    first, rl, fresh = jobs[:3]
    assert (first.program, fresh.program, fresh.arm) == (PROGRAM, OTHER, "rl_only")
    assert (first.rollouts, fresh.rollouts) == (3000, 500)
    assert first.settings == {"val_size": 2}
    assert rl.settings == fresh.settings == {"val_size": 2, "learning_rate": 1e-4}
    assert not any(job.start for job in jobs)
    assert store.about["starts"] == {"from-fst": "fst", "from-rl_only": "rl_only"}
    for arms, message in (
        (["gepa_only"], "leaves the weights as they are"),
        (["fst", "fst"], "each once"),
        ([], "at least one arm"),
        (["best"], "no arm"),
    ):
        with pytest.raises(ConfigError, match=message):
            plasticity(ExperimentStore(tmp_path / "other"), plan, OTHER, arms)


def second_runs():
    """From the base 0.1 to 0.5, test 0.4; from fst 0.2 to 0.6, test 0.5 and 0.3; rl_only stuck."""
    runs = []
    for seed in (0, 1):
        curves = {
            "from-base": [record(0, 10, 0.1), record(1, 50, 0.3, 0.1), record(2, 90, 0.5, 0.2)],
            "from-fst": [record(0, 10, 0.2, 0.05), record(1, 50, 0.6, 0.15)],
            "from-rl_only": [record(0, 10, 0.0, 0.5), record(1, 50, 0.1, 0.7)],
        }
        tests = {"from-base": 0.4, "from-fst": 0.5 - 0.2 * seed, "from-rl_only": 0.1}
        runs += [made_run(label, "rl_only", seed, c, [tests[label]]) for label, c in curves.items()]
    return runs


STARTS = {"from-fst": "fst", "from-rl_only": "rl_only"}


def test_plasticity_is_what_can_be_worked_out_by_hand():
    found = probes([made_run("fst", "fst", 0, [record(0, 10, 0.9)], [0.9]), *second_runs()], STARTS)
    assert list(found) == ["from-base", "from-fst", "from-rl_only"]
    table = plasticity_table(found)
    assert column(table, "before") == {
        "from-base": "0.100", "from-fst": "0.200", "from-rl_only": "0.000"
    }  # fmt: skip
    assert column(table, "share")["from-base"] == "1.000 ± 0.000"
    assert column(table, "share")["from-fst"].startswith("1.000 ±")  # 1.25 and 0.75
    assert column(table, "share")["from-rl_only"] == "0.250 ± 0.000"
    assert list(column(table, "at 95 %").values()) == ["2 of 2", "1 of 2", "0 of 2"]
    assert list(column(table, "val share").values()) == [
        "1.000 ± 0.000", "1.200 ± 0.000", "0.200 ± 0.000"
    ]  # fmt: skip
    assert list(column(table, "to 95 %").values()) == ["90", "50", "—"]
    assert column(table, "KL before")["from-rl_only"] == "0.5000"
    assert column(table, "KL")["from-fst"] == "0.1500"
    seeds = every_probe(found)
    assert [row[:2] for row in seeds.rows][2:4] == [("from-fst", "0"), ("from-fst", "1")]
    assert [row[5] for row in seeds.rows][2:4] == ["1.250", "0.750"]


def test_a_base_that_learned_nothing_is_no_measure():
    flat = [made_run(label, "rl_only", 0, [record(0, 10, 0.1), record(1, 50, 0.1)], [0.1])
            for label in ("from-base", "from-fst")]  # fmt: skip
    found = probes(flat, STARTS)
    table = plasticity_table(found)
    assert column(table, "at 95 %") == {"from-base": "0 of 0", "from-fst": "0 of 0"}
    assert column(table, "share") == {"from-base": "—", "from-fst": "—"}
    assert share_bands(found) == []
    assert plasticity_table(probes(flat[1:], STARTS)) is None
    below = [made_run(label, "rl_only", 0, [record(0, 10, -0.5), record(1, 50, 0.0)], [0.1])
             for label in ("from-base", "from-fst")]  # fmt: skip
    assert column(plasticity_table(probes(below, STARTS)), "val share")["from-fst"] == "—"


def test_a_band_is_the_mean_of_the_last_measurements():
    made = band("a", [Curve("a", (0, 10, 20), (0, 1, 1)), Curve("a", (0, 15, 30), (0, 0.5, 1))])
    assert made.mean == Curve("a", (0, 10, 15, 20), (0, 0.5, 0.75, 0.75))
    shares = {one.label: one for one in share_bands(probes(second_runs(), STARTS))}
    assert shares["from-base"].seeds[0] == Curve("from-base", (10, 50, 90), (0.2, 0.6, 1.0))
    assert shares["from-fst"].mean.y == (0.4, 1.2)


def test_a_band_goes_on_where_a_seed_has_ended_with_nothing_to_gain():
    base = [record(0, 10, 0.1), record(1, 50, 0.3), record(2, 100, 0.5)]
    done = [record(0, 10, 0.2), replace(record(1, 50, 0.6), ended=True)]
    more = [record(0, 10, 0.2), record(1, 50, 0.6), record(2, 100, 0.8)]
    runs = [
        made_run(label, "rl_only", seed, curve, [0.4])
        for label, curves in (("from-base", (base, base)), ("from-fst", (done, more)))
        for seed, curve in enumerate(curves)
    ]
    found = probes(runs, STARTS)
    (_, scores), (_, shares) = probe_bands(found), share_bands(found)
    assert scores.mean.x == shares.mean.x == (10, 50, 100)
    assert scores.mean.y == pytest.approx((0.2, 0.6, 0.7))
    assert shares.mean.y == pytest.approx((0.4, 1.2, 1.4))


# --- streams --------------------------------------------------------------------------------------


def test_streams_and_single_compiles_share_seeds_and_budget(tmp_path, monkeypatch):
    jobs = collected(monkeypatch, "continual")
    plan = Plan(PROGRAM, seeds=1, rollouts=100, instructions=SEED_PROMPT)
    rl = {"learning_rate": 1e-4}
    assert (
        continual(ExperimentStore(tmp_path / "store"), plan, [OTHER, PROGRAM], rl_settings=rl) == []
    )
    by_name = {job.name: job for job in jobs}
    assert list(by_name) == ["fst-0", "rl_only-0", "fst-alone-late-0", "rl_only-alone-late-0"]
    stream, alone = by_name["rl_only-0"], by_name["rl_only-alone-late-0"]
    assert (stream.program, stream.then, stream.module) == (PROGRAM, (OTHER, PROGRAM), MODULE)
    assert (stream.rollouts, alone.rollouts) == (300, 100)
    assert alone.program == OTHER and not alone.then
    assert {job.instructions for job in jobs} == {SEED_PROMPT}
    assert stream.settings == alone.settings == rl and by_name["fst-0"].settings == {}
    write_job(tmp_path / "job", stream)
    assert read_job(tmp_path / "job") == stream
    for then, arms, message in (
        ([], ["fst"], "at least two stages"),
        ([OTHER], ["sequential"], "one or more of fst, rl_only, gepa_only"),
        ([str(copied(tmp_path))], ["fst"], "told apart by name; got letters, letters"),
    ):
        with pytest.raises(ConfigError, match=message):
            continual(ExperimentStore(tmp_path / "other"), plan, then, arms)


def test_a_stream_of_rl_learns_from_rewards_as_its_single_compiles_do(tmp_path):
    def signal(arm, **settings):
        job = replace(job_of("embedded"), arm=arm, settings=settings)
        return _learner(tmp_path, job, 100).config.slow.slow_signal

    assert (signal("rl_only"), signal("fst")) == ("reward", "auto")
    assert signal("rl_only", slow_signal="both") == "both"


def copied(folder):
    path = folder / "same_name.py"
    path.write_text(Path(PROGRAM).read_text())
    return path


def test_an_old_store_is_still_recognised(tmp_path):
    """Jobs that were written before a field was there have its default."""
    job = job_of("embedded")
    write_job(tmp_path, job)
    plain = read_json(tmp_path / "job.json")
    del plain["then"], plain["instructions"]
    (tmp_path / "job.json").write_text(json.dumps(plain))
    write_job(tmp_path, job)
    assert read_job(tmp_path) == job


def made_stream(arm, seed, score_S_N):
    job = Job(arm, arm, seed, "one.py", 300, then=("two.py", "one.py"), module=MODULE)
    counts = RolloutCounts(slow=100)
    stages = tuple(
        StreamStage(task, None, 0.9, 0.1 * n, counts, 6, 9.0, f"stages/00{n}", f"m@{n}")
        for n, task in enumerate(("one", "two", "one"), start=1)
    )
    return Stream(job.name, job, StreamOutcome(("one", "two"), stages, score_S_N, "m@0", 5.0))


def streams_and_singles():
    streams = [
        made_stream("fst", 0, ((0.1, 0.0), (0.8, 0.2), (0.7, 0.9), (0.8, 0.85))),
        made_stream("fst", 1, ((0.1, 0.0), (0.8, 0.2), (0.7, 0.6), (0.6, 0.9))),
        made_stream("rl_only", 0, ((0.1, 0.0), (0.5, 0.1), (0.2, 0.1), (0.4, 0.1))),
    ]
    singles = []
    for seed, score in ((0, 0.9), (1, 0.8)):
        made = made_run("fst-alone-two", "fst", seed, [record(0, 90, score)], [score])
        singles.append(replace(made, job=replace(made.job, program="two.py")))
    return streams, singles


def test_stages_are_measured_by_single_compiles_of_the_same_arm_and_seed():
    streams, singles = streams_and_singles()
    table = stage_table(streams, singles)
    assert [row[:2] for row in table.rows[:3]] == [
        ("fst", "1 one"), ("fst", "2 two"), ("fst", "3 one again")
    ]  # fmt: skip
    cells = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [cell["alone"] for cell in cells] == ["0.800", "0.850", "0.800", "0.500", "—", "0.500"]
    assert cells[0]["share"] == "1.000 ± 0.000" and cells[0]["at 95 %"] == "2 of 2"
    assert cells[1]["share"].startswith("0.875 ±")  # 1 and 0.75
    assert cells[1]["at 95 %"] == "1 of 2" and cells[2]["at 95 %"] == "1 of 2"
    assert cells[4]["share"] == "—" and cells[4]["at 95 %"] == "0 of 0"
    assert cells[5]["share"] == "0.800" and cells[5]["KL"] == "0.3000"
    every = task_table(streams, singles)
    assert every.columns == ("arm", "after", "one", "two")
    assert every.rows[0] == ("fst", "0 base", "0.100", "0.000")
    assert every.rows[1] == ("fst", "1 one", "0.800 (1.00)", "0.200")
    assert every.rows[2] == ("fst", "2 two", "0.700 (0.87)", "0.750 (0.88)")
    assert every_stage(streams, singles).rows[4][:3] == ("fst", "1", "2 two")
    line, _ = stage_lines(streams, singles, "two")
    assert line.scores.mean.y == pytest.approx((0.0, 0.2, 0.75, 0.875))
    assert [curve.y[2] for curve in line.scores.seeds] == [0.9, 0.6]
    assert line.alone == pytest.approx(0.85)


def test_a_store_of_streams_is_shown(tmp_path):
    streams, _ = streams_and_singles()
    store = ExperimentStore(tmp_path / "store")
    with store.locked():
        store.begin("continual")
        for stream in streams:
            store.add(stream.job)
            write_stream(store.folder / stream.name, stream.outcome)
        store.save()
    assert load_streams(store) == streams and load_runs(store) == []
    tables, files = write_results(store.folder)
    assert [table.title for table in tables] == [
        "Stages", "Every task at every stage", "Every stage of every stream"
    ]  # fmt: skip
    assert [file.name for file in files] == ["results.md", "results.json", "stages.png"]
    assert "one.py, then two.py, then one.py" in files[0].read_text()
    assert read_json(files[1])["streams"][0]["score_S_N"][1] == [0.8, 0.2]


def stream_job(model, arm="fst", **change):
    fields = {"then": (OTHER, PROGRAM), "module": MODULE, "rollouts": 180, "samples": 2}
    return job_of(model, arm, **{**fields, **change})


def stream_here(folder, job):
    write_job(folder / job.name, job)
    return run_stream(folder / job.name)


@pytest.mark.slow
def test_a_stream_is_learned_in_one_run_and_tested_at_every_stage(tiny_qwen3, tmp_path):
    job = stream_job(tiny_qwen3, "fst", instructions=SEED_PROMPT, test_size=3)
    outcome = stream_here(tmp_path, job)
    folder = tmp_path / job.name
    assert outcome.tasks == ("letters", "late")
    assert [stage.task for stage in outcome.stages] == ["letters", "late", "letters"]
    assert [len(row) for row in outcome.score_S_N] == [2] * 4
    assert all(0 <= score <= 1 for row in outcome.score_S_N for score in row)
    for stage in outcome.stages:
        assert 30 < stage.rollouts.total <= 60 and stage.steps > 0 and stage.rollouts.fast > 0
        assert read_json(folder / stage.folder / "result.json")["best"]["version"] == stage.version
    assert rollouts_so_far(folder) == sum(stage.rollouts.total for stage in outcome.stages)
    starts = [read_json(folder / s.folder / "config.json") for s in outcome.stages]
    assert starts[0]["model"] == outcome.base_version
    assert starts[1]["model"] == outcome.stages[0].version
    assert starts[1]["student"]["say.instructions"] == SEED_PROMPT
    # Fewer than 4 x 2 where a stage ends with the weights that it began with.
    assert 2 < len(read_json(folder / "scores.json")) <= 8
    assert all(cell["rollouts"] == 3 * 2 for cell in read_json(folder / "scores.json").values())
    (folder / "outcome.json").unlink()
    again = run_stream(folder)
    assert (
        replace(again, test_seconds=0)
        == replace(outcome, test_seconds=0)
        == replace(read_stream(folder), test_seconds=0)
    )


@pytest.mark.slow
def test_the_first_stage_is_the_single_compile_of_its_task(tiny_qwen3, tmp_path):
    job = stream_job(tiny_qwen3, then=(OTHER,), rollouts=120, instructions=SEED_PROMPT)
    stream = Stream(job.name, job, stream_here(tmp_path, job))
    alone = replace(job, label="alone", then=(), rollouts=60, module=Job.module)
    outcome = run_here(tmp_path, alone)
    first = stream.outcome.stages[0]
    assert first.version == outcome.trained_version and first.rollouts == outcome.rollouts
    scores = outcome.test["trained_evolved"].values()
    mean = sum(map(sum, scores)) / sum(map(len, scores))
    assert stream.alone("letters", []) == stream.outcome.score_S_N[1][0] == pytest.approx(mean)


def test_all_predictors_begin_with_the_job_s_instructions():
    own = load_job_task(job_of("embedded"), PROGRAM)
    assert own.program.say.signature.instructions == "Say something." and len(own.testset) == 4
    task = load_job_task(job_of("embedded", instructions="Go on.", test_size=1), PROGRAM)
    assert task.program.say.signature.instructions == "Go on." and len(task.testset) == 1


def command(name, *others):
    """Run a command on tiny models, in a store of its own; what it printed."""
    settings = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]
    budget = ["--seeds", "1", "--rollouts", "30", "--samples", "1", "--arms", "rl_only"]
    done = CliRunner().invoke(app, [name, PROGRAM, OTHER, *settings, *budget, *others])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_fst_plasticity_goes_on_from_the_weights_of_the_first_task(
    tiny_qwen3, tmp_path, jobs_run_here
):
    options, store = ["--model", str(tiny_qwen3), "--out"], tmp_path / "store"
    assert "The second task" in command("plasticity", *options, str(store))
    assert (store / "plasticity.png").exists()
    runs = {run.job.label: run for run in load_runs(ExperimentStore(store))}
    assert list(runs) == ["rl_only", "from-base", "from-rl_only"]
    base, other = (runs[label].records[0] for label in ("from-base", "from-rl_only"))
    assert other.weights_version == runs["rl_only"].outcome.trained_version
    assert other.kl_to_base > 0 == base.kl_to_base
    moved = store.rename(tmp_path / "moved")
    command("plasticity", *options, str(moved))
    assert {line.attempts for line in ExperimentStore(moved).status.values()} == {1}


@pytest.mark.slow
def test_fst_continual_is_shown_beside_the_single_compiles(tiny_qwen3, tmp_path, jobs_run_here):
    output = command("continual", "--model", str(tiny_qwen3), "--out", str(tmp_path))
    assert "Every task at every stage" in output and (tmp_path / "stages.png").exists()
    store = ExperimentStore(tmp_path)
    assert [run.job.label for run in load_runs(store)] == ["rl_only-alone-late"]
    assert [stream.job.instructions for stream in load_streams(store)] == [SEED_PROMPT]
    show = CliRunner().invoke(app, ["experiments", "show", str(tmp_path)])
    assert show.exit_code == 0 and SEED_PROMPT in (tmp_path / "results.md").read_text()
