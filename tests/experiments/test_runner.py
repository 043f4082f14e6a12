"""Experiments in processes of their own: failures, kills, the tuned baseline, the command."""

import importlib
import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest
from experiment_runs import TINY
from places import PROGRAM, SUPPORT
from tiny_models import save_model
from typer.testing import CliRunner

import fst_dspy
from fst_dspy.cli import app
from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.experiments import ExperimentStore, Plan, compare, load_runs, run_jobs
from fst_dspy.experiments.jobs import read_outcome
from fst_dspy.experiments.tuned_rl import tune_rl
from fst_dspy.files import read_jsonl
from fst_dspy.model.policy import Policy

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def workers_find_the_programs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))


def alive(folder):
    """Processes at work on a folder."""
    found = subprocess.run(["pgrep", "-f", f"worker {folder}"], capture_output=True, text=True)
    return found.stdout.split()


def wait_until(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def fickle(tiny_qwen3, tmp_path_factory):
    """A plan of a program that fails with its second seed, a store of its jobs, and which failed.

    They are run two at once: of one thread each.
    """
    program = tmp_path_factory.mktemp("fickle") / "fickle.py"
    program.write_text(
        "import study_program\n"
        "def load(seed=0):\n"
        "    if seed == 1:\n"
        "        raise ValueError('no seed [1] today')\n"
        "    return study_program.load(seed)\n"
    )
    settings = {**TINY, "learning_rate": 1e-3}
    plan = Plan(str(program), str(tiny_qwen3), rollouts=100, seeds=2, settings=settings)
    store = ExperimentStore(program.with_name("store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SUPPORT))
        return plan, store, run_jobs(store, plan.jobs("fst", "fst"), workers=2)


def test_a_job_that_fails_is_reported_and_the_others_go_on(fickle):
    plan, store, failed = fickle
    jobs, program = plan.jobs("fst", "fst"), plan.program
    assert failed == ["fst-1"]
    state = {name: (line.state, line.error) for name, line in store.status.items()}
    said = f"load(1) in {program} failed, line 4: ValueError: no seed [1] today"
    assert state == {"fst-0": ("done", None), "fst-1": ("failed", f"ProgramError: {said}")}
    again = ExperimentStore(store.folder)
    assert run_jobs(again, jobs[:1]) == [] and again.status["fst-0"].attempts == 1
    assert [run.name for run in load_runs(again)] == ["fst-0"]
    with pytest.raises(StoreError, match="settings"):
        run_jobs(store, [replace(jobs[0], settings=TINY)])


def test_killed_experiments_go_on_to_the_same_end(fickle, tmp_path):
    """The runner is killed at work; its worker saves and ends; the same call goes on.

    What it is compared with comes from a worker too: this process has other threads, which round
    sums otherwise.
    """
    plan, whole, _ = fickle
    plan, folder = replace(plan, seeds=1), tmp_path / "cut"
    cycles = folder / "fst-0" / "0-fst" / "cycles.jsonl"
    runner = os.fork()
    if not runner:
        try:
            os.setsid()
            compare(ExperimentStore(folder), plan, ["fst"], workers=2)
        finally:
            os._exit(1)
    wait_until(lambda: len(list(read_jsonl(cycles))) > 2)
    assert alive(folder / "fst-0")
    os.kill(runner, signal.SIGKILL)
    os.waitpid(runner, 0)
    wait_until(lambda: not alive(folder / "fst-0"))
    assert not (folder / "fst-0" / "outcome.json").exists()
    assert "interrupted" in (folder / "fst-0" / "log.txt").read_text()
    store = ExperimentStore(folder)
    assert compare(store, plan, ["fst"], workers=2) == []
    cut, uncut = (read_outcome(where / "fst-0") for where in (folder, whole.folder))
    assert replace(cut, seconds={}) == replace(uncut, seconds={})
    assert not list(tmp_path.rglob("checkpoints"))  # which only a job that has not ended needs
    assert store.status["fst-0"].attempts == 2


def test_a_job_names_its_adapter(tmp_path, jobs_run_here):
    """Of two jobs that differ in nothing else, each is asked in its adapter's words."""
    model = save_model(tmp_path / "model", "qwen3")
    config = model / "config.json"  # room for a whole prompt
    config.write_text(config.read_text().replace(": 512,", ": 2048,"))
    policy, first = Policy.load(model), {}
    settings = {"max_cycles": 1, "val_size": 2, "max_tokens": 4, "on_no_signal": "warn"}
    for adapter in ("chat", "xml"):
        plan = Plan(
            "triage:train=4,val=2,test=2",
            str(model),
            rollouts=8,
            seeds=1,
            settings={**settings, "group_size": 4, "problems_per_step": 1, "steps_per_cycle": 1},
            samples=1,
            adapter=adapter,
        )
        store = ExperimentStore(tmp_path / adapter)
        assert run_jobs(store, plan.jobs("rl_only", "rl_only")) == []
        rows = read_jsonl(store.folder / "rl_only-0" / "0-rl_only" / "rollouts.jsonl")
        first[adapter] = policy.tokenizer.decode(prompt_of(next(rows)))
    tune_rl(store, plan, 1, "rl_only")
    (tried,) = store.folder.glob("tune-rl_only/trial-*/rollouts.jsonl")
    assert policy.tokenizer.decode(prompt_of(next(read_jsonl(tried)))) == first["xml"]
    with pytest.raises(ConfigError, match="another adapter: XMLAdapter, not ChatAdapter"):
        tune_rl(store, replace(plan, adapter="chat"), 2, "rl_only")
    assert "[[ ## ticket ## ]]" in first["chat"] and "<ticket>" not in first["chat"]
    assert "<ticket>" in first["xml"] and "[[ ##" not in first["xml"]
    with pytest.raises(ConfigError, match=r"no adapter 'yaml'; known: chat, xml, json"):
        replace(plan, adapter="yaml").jobs("fst", "fst")


def prompt_of(row):
    """The prompt's token ids of a logged rollout's first call."""
    return row["calls"][0]["prompt_ids_T"]


def test_the_baseline_runs_with_the_settings_it_was_tuned_to(tiny_qwen3, tmp_path, monkeypatch):
    store = ExperimentStore(tmp_path / "store")
    settings = {name: value for name, value in TINY.items() if name != "learning_rate"}
    plan = Plan(PROGRAM, str(tiny_qwen3), 30, 1, settings)
    heard, jobs = [], {}
    protocol = importlib.import_module("fst_dspy.experiments.protocols.compare")
    collect = lambda store, found, **_: jobs.update((job.name, job) for job in found)  # noqa: E731
    monkeypatch.setattr(protocol, "run_jobs", collect)  # real ones are run elsewhere
    options = {"rl_trials": 2, "rl_budget_factor": 5}
    compare(store, plan, ["fst", "rl_only"], on_trial=lambda *t: heard.append(t), **options)
    assert not list(store.folder.rglob("checkpoints"))  # of the trials
    assert len(heard) == 4 and jobs.keys() == {"fst-0", "rl_only-0", "rl_only-5x-0"}
    for label, budget in (("rl_only", 30), ("rl_only-5x", 150)):
        tuned = ExperimentStore(store.folder).about["tuned_rl"][label]
        assert [trial["state"] for trial in tuned["trials"]] == ["complete", "complete"]
        best = max(tuned["trials"], key=lambda trial: trial["score"])
        assert best["settings"].items() <= tuned["settings"].items()
        assert {"learning_rate", "beta", "entropy_coef", "temperature"} <= best["settings"].keys()
        job = jobs[f"{label}-0"]
        assert job.settings == {**settings, **tuned["settings"]}
        assert job.rollouts == tuned["rollouts"] == budget
    assert jobs["fst-0"].settings == settings


def test_the_command_compares_two_arms_on_the_embedded_model(tmp_path, jobs_run_here):
    options = "--quick --arms fst,gepa_only --seeds 1 --rollouts 150 --test-size 12 --samples 1"
    options += " --set val_size=12 --set first_cycle_iterations=3 --set steps_per_cycle=1"
    done = CliRunner().invoke(
        app, ["compare", "triage", *options.split(), "--workers", "2", "--out", str(tmp_path / "s")]
    )
    assert done.exit_code == 0, done.output
    assert "Means over seeds" in done.output and "fst-0: done" in done.output
    runs = {run.job.arm: run for run in load_runs(ExperimentStore(tmp_path / "s"))}
    for arm in ("fst", "gepa_only"):
        assert 0 < runs[arm].outcome.rollouts.total <= 150
        assert runs[arm].quadrant("base_original") < 0.2 < runs[arm].test
    again = CliRunner().invoke(app, ["experiments", "show", str(tmp_path / "s")])
    assert again.exit_code == 0 and "Every run" in again.output


def test_bad_input_ends_with_one_clear_message(tmp_path):
    for arguments, message in (
        (["compare", "triage", "--arms", "best"], "no arm 'best'"),
        (["compare", "nowhere"], "no program at"),
        (["ablate", "triage", "--axes", "colour"], "no axis 'colour'"),
        (["compare", "triage", "--set", "learning_rte=1"], "learning_rate"),
        (["experiments", "show", str(tmp_path)], "no store of experiments"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert message in " ".join(done.output.replace("│", " ").split())
        assert "Traceback" not in done.output


def test_a_machine_without_git_says_the_version(monkeypatch):
    from fst_dspy.experiments.runner import revision

    monkeypatch.setenv("PATH", "")
    assert revision() == fst_dspy.__version__
