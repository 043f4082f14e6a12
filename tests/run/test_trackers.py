"""Trackers: what real compiles on a tiny random model leave in the real ones, read back."""

import json
import multiprocessing
import signal
import struct
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available
from helpers import vowels
from places import PROGRAM
from tiny_compile import SETTINGS
from tracked_runs import compile_tracked, killed_in_step_2
from typer.testing import CliRunner

from fst_dspy import FST, ContinualFST, TunedFST
from fst_dspy.cli import app
from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.run.trackers import step_values
from fst_dspy.types import StepRecord, StepStats

pytestmark = pytest.mark.slow

INSTALLED = {
    "tensorboard": is_tensorboard_available(),
    "wandb": is_wandb_available(),
    "mlflow": is_mlflow_available(),
}
each_tracker = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not here, reason=f"{name} is not installed"))
        for name, here in INSTALLED.items()
    ],
)


@pytest.fixture(scope="module")
def installed():
    return [name for name, here in INSTALLED.items() if here]


@pytest.fixture(scope="module")
def whole(tiny_qwen3, tmp_path_factory, installed):
    """A run with every tracker: its folder and result."""
    folder = tmp_path_factory.mktemp("trackers") / "whole"
    return folder, compile_tracked(tiny_qwen3, folder, installed)


@pytest.fixture(scope="module")
def cut(tiny_qwen3, tmp_path_factory, installed):
    """Folder of the same run, killed with SIGKILL and started again."""
    folder = tmp_path_factory.mktemp("trackers") / "cut"
    folder.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=killed_in_step_2, args=(tiny_qwen3, folder, installed)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's, which no tracker has a part in
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert json.loads((folder / "trackers.json").read_text())["tensorboard"]["step"] == 1
    compile_tracked(tiny_qwen3, folder, installed)
    return folder


# --- reading the trackers' own files, as written: nothing that is there twice is hidden ----------


def figures(name, folder):
    """``{figure: [(rollouts, value), ...]}`` in the order of logging."""
    found = defaultdict(list)
    for tag, step, value in READERS[name](folder):
        if isinstance(value, int | float):
            found[tag].append((step, value))
    return dict(found)


def tensorboard_rows(folder):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    for path in sorted((folder / "tensorboard").glob("events*"), key=lambda p: p.stat().st_ctime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                read = tensor_util.make_ndarray(value.tensor).flat[0]
                text = value.tag.endswith("/text_summary")
                yield (
                    value.tag.removesuffix("/text_summary"),
                    event.step,
                    read.decode() if text else float(read),
                )


def wandb_rows(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_log(path.read_bytes()):
            history = Record.FromString(data).history
            row = {".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            for tag, value in row.items():
                yield tag, row["_step"], value


def leveldb_log(data):
    """The records of a W&B file: 7 bytes of its own, then a LevelDB log of 32 KiB blocks."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        if kind == 0:
            return
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def mlflow_rows(folder):
    client, run = mlflow_run(folder)
    for tag in run.data.metrics:
        for one in client.get_metric_history(run.info.run_id, tag):
            yield tag, one.step, one.value


def mlflow_run(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return client, run


READERS = {"tensorboard": tensorboard_rows, "wandb": wandb_rows, "mlflow": mlflow_rows}


def prompts(name, folder):
    """``{rollouts or cycle: text}``."""
    if name == "mlflow":
        _, run = mlflow_run(folder)
        kept = folder / "mlflow" / "artifacts" / run.info.run_id / "artifacts" / "prompts"
        return {path.stem: path.read_text() for path in sorted(kept.iterdir())}
    tag = {"tensorboard": "prompts", "wandb": "prompts.path"}[name]
    rows = {step: value for found, step, value in READERS[name](folder) if found == tag}
    if name == "wandb":
        folders = folder / "wandb"
        return {at: next(folders.glob(f"*/files/{path}")).read_text() for at, path in rows.items()}
    return rows


def near(pairs):
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]


# --- what is logged ------------------------------------------------------------------------------


@each_tracker
def test_a_run_is_logged_on_one_axis_with_its_prompts(name, whole):
    folder, result = whole
    seen = figures(name, folder)
    ends = [record.total_rollouts.total for record in result.records]
    assert ends == sorted(set(ends))
    for figure in ("val_score", "kl_to_base"):
        logged = [getattr(record, figure) for record in result.records]
        assert seen[f"cycle/{figure}"] == near(zip(ends, logged, strict=True))
    for channel in ("fast", "slow", "eval", "total"):
        spent = [getattr(record.total_rollouts, channel) for record in result.records]
        assert seen[f"rollouts/{channel}"] == list(zip(ends, spent, strict=True))
    assert [step for step, _ in seen["seconds/slow"]] == ends[2:], "none in the opening"
    assert all(seconds > 0 for _, seconds in seen["seconds/slow"])
    assert [step for step, _ in seen["cycle/failure_share"]] == ends

    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    where = [step for step, _ in seen["slow/reward"]]
    assert len(where) == 4 and where == sorted(set(where))
    assert ends[1] < where[0] and where[1] <= ends[2] < where[2] and where[3] <= ends[3]
    assert seen["slow/reward"] == near(zip(where, [row["reward"] for row in rows], strict=True))
    taken = [(at, row) for at, row in zip(where, rows, strict=True) if not row["stats"]["skipped"]]
    for figure in ("loss", "grad_norm", "entropy", "clip_share"):
        assert seen[f"slow/{figure}"] == near((at, row["stats"][figure]) for at, row in taken)
    steps = dict(seen["progress/optimizer_step"])
    assert [steps[at] for at in where] == [1, 2, 3, 4]

    texts = prompts(name, folder)
    assert list(texts) == ([f"cycle-{n:04}" for n in range(4)] if name == "mlflow" else ends)
    first, *_, last = texts.values()
    assert "Say something." in first
    for candidate in result.population.candidates:
        assert candidate.id in last
        assert candidate.components["say.instructions"].splitlines()[-1] in last


def test_tensorboard_itself_shows_the_figures_and_the_settings(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, result = whole
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert len(shown.Scalars("slow/reward")) == 4
    assert len(shown.Scalars("cycle/val_score")) == len(result.records)
    text = shown.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"slow/learning_rate": 0.01' in text and result.base_version in text


@each_tracker
def test_a_killed_run_goes_on_in_the_same_tracker_run_and_logs_nothing_twice(name, whole, cut):
    assert not (cut / "network.txt").exists(), (cut / "network.txt").read_text()
    once, again = figures(name, whole[0]), figures(name, cut)
    assert again.keys() == once.keys()
    for figure, pairs in once.items():
        own_time = figure.startswith(("seconds/", "_"))
        assert again[figure] == pairs or own_time, figure
        assert [step for step, _ in again[figure]] == [step for step, _ in pairs], figure
    assert len(prompts(name, cut)) == 4
    if name == "tensorboard":
        assert len(list((cut / name).glob("events*"))) == 2
    if name == "wandb":
        run_id = json.loads((cut / "trackers.json").read_text())["wandb"]["run_id"]
        assert len(list((cut / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))) == 2
    if name == "mlflow":
        assert mlflow_run(cut)[1].info.status == "FINISHED"


def test_prompts_alone_move_along_the_axis_and_a_finished_run_adds_nothing(tiny_qwen3, tmp_path):
    result = compile_tracked(tiny_qwen3, tmp_path, "tensorboard", arm="gepa_only")
    seen = figures("tensorboard", tmp_path)
    ends = [record.total_rollouts.total for record in result.records]
    assert [step for step, _ in seen["cycle/val_score"]] == ends
    assert ends[0] < ends[1] < ends[2]
    assert not any(name.startswith("slow/") for name in seen)
    assert "cycle/train_reward" not in seen
    files = sorted((tmp_path / "tensorboard").iterdir())
    compile_tracked(tiny_qwen3, tmp_path, "tensorboard", arm="gepa_only")
    assert sorted((tmp_path / "tensorboard").iterdir()) == files


def test_a_skipped_step_has_no_loss_and_failures_are_a_share():
    stats = StepStats(0.5, 2.0, 1e-4, 3.0, 0.1, rows=8)
    record = StepRecord(2, 7, 0.25, 0.5, {"parse": 1, "empty": 1}, rollouts=8, stats=stats)
    values = step_values(record)
    assert values["slow/loss"] == 0.5 and values["slow/failure_share"] == 0.25
    assert values["slow/skipped"] == 0 and values["progress/optimizer_step"] == 7
    skipped = step_values(replace(record, stats=replace(stats, skipped="constant")))
    assert skipped["slow/skipped"] == 1 and skipped["slow/learning_rate"] == 1e-4
    missing = {"slow/loss", "slow/grad_norm", "slow/entropy", "slow/clip_share"}
    assert values.keys() - skipped.keys() == missing


# --- what the user has of their own --------------------------------------------------------------


def test_a_wandb_run_of_the_user_is_left_alone(tiny_qwen3, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with wandb.init(project="mine", mode="offline", dir=tmp_path) as own:
        compile_tracked(tiny_qwen3, tmp_path / "run", "wandb", arm="gepa_only", max_cycles=1)
        own.log({"mine": 1})
        assert wandb.run is own
    assert "mine" in figures("wandb", tmp_path)
    assert "cycle/val_score" not in figures("wandb", tmp_path)
    assert "cycle/val_score" in figures("wandb", tmp_path / "run")


def test_an_mlflow_run_of_the_user_becomes_the_parent(tiny_qwen3, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.chdir(tmp_path)  # where MLflow puts the artifacts of such a run
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mine.db")
    try:
        with mlflow.start_run() as own:
            compile_tracked(tiny_qwen3, tmp_path / "run", "mlflow", arm="gepa_only", max_cycles=1)
            assert mlflow.active_run().info.run_id == own.info.run_id
        (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")[:1]
    finally:
        mlflow.set_tracking_uri(None)
    assert run.data.tags["mlflow.parentRunId"] == own.info.run_id
    assert "cycle/val_score" in run.data.metrics
    assert not (tmp_path / "run" / "mlflow").exists()


def test_mlflow_is_left_without_a_tracking_uri(whole):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    assert not mlflow.is_tracking_uri_set()


# --- what cannot work ----------------------------------------------------------------------------


def test_trackers_that_cannot_work_are_refused_before_any_work(tiny_qwen3, tmp_path, monkeypatch):
    import importlib.util

    from fst_dspy.rollouts import runner as rollout

    monkeypatch.setattr(rollout.RolloutRunner, "run", lambda *_, **__: pytest.fail("rollouts"))
    with pytest.raises(ConfigError, match="tensorboard, wandb, mlflow, not 'tensorbord'"):
        FST(vowels, report_to=["tensorbord"])
    # A tuned compile has folders of its own, which are gone in the end, with what was logged.
    for kind, own in ((FST, {}), (TunedFST, {"max_rollouts": 100})):
        with pytest.raises(ConfigError, match="set log_dir"):
            kind(vowels, report_to="tensorboard", **own)
        assert kind(vowels, report_to="tensorboard", log_dir=tmp_path, **own).log_dir == tmp_path
    with pytest.raises(ConfigError, match="set log_dir"):
        ContinualFST(report_to="tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(StoreError, match=r"tensorboard failed: FileExistsError.*report_to"):
        compile_tracked(tiny_qwen3, tmp_path, "tensorboard")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in INSTALLED else found(name)
    )
    for name in INSTALLED:
        with pytest.raises(ConfigError, match=rf"fst-dspy\[{name}\]"):
            FST(vowels, report_to=name)


def test_the_command_takes_trackers(tiny_qwen3, tmp_path):
    program = PROGRAM
    small = SETTINGS | {"max_cycles": 1, "steps_per_cycle": 1}
    command = ["compile", program, "--model", str(tiny_qwen3)]
    command += [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    run = partial(CliRunner().invoke, app)
    assert "set log_dir" in run([*command, "--report-to", "tensorboard"]).output
    shown = run([*command, "--out", str(tmp_path), "--report-to", "tensorboard"])
    assert shown.exit_code == 0, shown.output
    assert len(figures("tensorboard", tmp_path)["slow/reward"]) == 1
