"""The runner of tasks for real models: on a tiny model, and on SmolLM2 where it can be had."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import save_model
from typer.testing import CliRunner

from benchmarks import real_lm
from fst_dspy.errors import ModelError
from fst_dspy.experiments import ExperimentStore, load_runs
from fst_dspy.pretrained import smollm2

SMALL = ("group_size=4", "problems_per_step=2", "val_size=4", "steps_per_cycle=1")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, jobs_run_here: None) -> None:
    tasks = {"routing": real_lm.RealTask("routing:train=8,val=4,test=1")}
    monkeypatch.setattr(real_lm, "TASKS", tasks)


def call(
    folder: Path, model: str, *arguments: str, settings: tuple[str, ...] = SMALL, rollouts: int = 24
) -> str:
    options = [part for setting in settings for part in ("--setting", setting)]
    app = real_lm.typer.Typer()
    app.command()(real_lm.main)
    done = CliRunner().invoke(
        app,
        [
            *("--model", model, "--tasks", "routing", "--rollouts", str(rollouts), *options),
            *("--stores", str(folder / "stores"), "--results", str(folder / "results")),
            *arguments,
        ],
    )
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--tasks", "rooting"), "did you mean 'routing'"),
        (("--adapters", "chet"), "did you mean 'chat'"),
        (("--arms", "fts"), "did you mean 'fst'"),
        (("--seeds", "0-2"), "numbers with commas"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, option: tuple[str, str], said: str
) -> None:
    app = real_lm.typer.Typer()
    app.command()(real_lm.main)
    places = ("--stores", str(tmp_path / "stores"), "--results", str(tmp_path / "results"))
    done = CliRunner().invoke(app, [*places, *option])
    assert done.exit_code == 1 and said in done.output
    assert not (tmp_path / "stores").exists()


def jobs(folder: Path) -> dict[str, list[str]]:
    stores = sorted((folder / "stores").iterdir())
    return {path.name: [run.name for run in load_runs(ExperimentStore(path))] for path in stores}


@pytest.mark.slow
def test_jobs_add_up_over_calls_and_none_is_run_twice(tmp_path: Path, small: None) -> None:
    name, model = "tiny-routing", str(save_model(tmp_path / "tiny", "qwen3"))
    config = tmp_path / "tiny" / "config.json"  # room for the letters' prompts
    config.write_text(config.read_text().replace(": 512,", ": 4096,"))
    random = (*SMALL, "max_tokens=8", "on_no_signal=warn")  # it knows nothing, and learns nothing
    first = ("--adapters", "xml", "--arms", "gepa_only", "--seeds", "1")
    assert "| fst minus it |" in call(tmp_path, model, *first, settings=random)
    assert jobs(tmp_path) == {f"{name}-xml": ["gepa_only-1"]}
    arms = ("--arms", "gepa_only,rl_only", "--seeds", "0,1", "--limit", "1")
    call(tmp_path, model, "--adapters", "xml", *arms, settings=random)
    assert jobs(tmp_path) == {f"{name}-xml": ["gepa_only-1", "gepa_only-0"]}
    outcome = tmp_path / "stores" / f"{name}-xml" / "gepa_only-0" / "outcome.json"
    before = outcome.stat().st_mtime_ns
    said = call(tmp_path, model, "--adapters", "xml,chat", *arms, settings=random)
    assert jobs(tmp_path)[f"{name}-xml"] == ["gepa_only-1", "gepa_only-0", "rl_only-0"]
    assert outcome.stat().st_mtime_ns == before and f"{name}-chat" not in jobs(tmp_path)
    overview = (tmp_path / "results" / "overview.md").read_text()
    assert overview in said and "rl_only" in overview
    assert (tmp_path / "results" / f"{name}-xml" / "results.md").exists()
    elsewhere = tmp_path / "elsewhere"  # with the results alone: nothing of it is run again
    shutil.copytree(tmp_path / "results", elsewhere / "results")
    call(elsewhere, model, "--limit", "0", settings=random)
    assert jobs(elsewhere) == jobs(tmp_path)
    assert (elsewhere / "results" / "overview.md").read_text() == overview
    job = ExperimentStore(outcome.parent.parent).job("gepa_only-0")
    assert (job.adapter, job.rollouts, job.settings["max_tokens"]) == ("xml", 24, 8)


@pytest.mark.slow
def test_a_short_part_on_smollm2(tmp_path: Path, small: None) -> None:
    try:
        smollm2.fetch(smollm2.WITH_ADAPTER)
    except ModelError as error:
        pytest.skip(f"SmolLM2 is not to be had here: {error}")
    arguments = ("--adapters", "xml", "--arms", "fst", "--seeds", "0")
    least = ("group_size=2", "problems_per_step=2", "val_size=2", "steps_per_cycle=1")
    least += ("population_size=2", "first_cycle_iterations=1", "minibatch_size=2", "max_tokens=8")
    said = call(tmp_path, "smollm2", *arguments, settings=least, rollouts=12)
    (runs,) = jobs(tmp_path).values()
    assert runs == ["fst-0"] and "smollm2-routing-xml" in said
