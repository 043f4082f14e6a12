"""Two real processes over gloo: they agree with one another and with one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import PROGRAM, SETTINGS, compile_letters, cycles_of, steps

from fst_dspy import LocalLM, distributed
from fst_dspy.errors import ConfigError, StoreError

WORKER = Path(__file__).parent / "distributed_worker.py"


def torchrun(*arguments, processes=2):
    """Start processes, each with a hash seed of its own, as on a cluster."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *map(str, arguments)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(WORKER.parent),
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def run(tiny_qwen3, tmp_path_factory):
    """What two processes found, the folder of their runs, and the folder of the model."""
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(WORKER, tiny_qwen3, folder)
    ranks = [folder / f"rank-{n}.json" for n in range(2)]
    assert all(path.exists() for path in ranks), done.stderr
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    return [json.loads(path.read_text()) for path in ranks], folder, tiny_qwen3


def texts_of(folder):
    """The completions of the optimizer steps' rollouts, in order."""
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return [[call["text"] for call in json.loads(line)["calls"]] for line in lines]


@pytest.mark.slow
def test_both_processes_hold_the_same_weights_and_population_at_every_cycle(run):
    (first, second), folder, _ = run
    assert first["cycles"] == second["cycles"] and len(first["cycles"]) == 3
    assert len({version for version, _, _ in first["cycles"]}) == 3
    written = [json.loads(x) for x in (folder / "whole" / "cycles.jsonl").read_text().splitlines()]
    assert [row["weights_version"] for row in written] == [row[0] for row in first["cycles"]]


@pytest.mark.slow
def test_two_processes_end_where_one_does(run, tmp_path):
    (found, _), folder, model = run
    alone = cycles_of(compile_letters(str(model), tmp_path / "alone"))
    for (_, candidates, scores), (_, candidates_alone, scores_alone) in zip(
        found["cycles"], alone, strict=True
    ):
        assert candidates == list(candidates_alone)
        assert scores == pytest.approx(scores_alone, abs=1e-3)
    assert texts_of(folder / "whole") == texts_of(tmp_path / "alone")


@pytest.mark.slow
def test_a_step_shared_out_is_the_step_of_one_process(run):
    (first, second), _, model = run
    assert first["steps"] == second["steps"]
    alone = steps(str(model))
    for shared, whole in zip(first["steps"], alone, strict=True):
        assert shared["figures"] == pytest.approx(whole["figures"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_only_process_0_proposes_and_all_take_its_texts(run):
    (first, second), _, _ = run
    assert first["proposals"] > 0 and second["proposals"] == 0
    assert first["ranked"] == second["ranked"]


@pytest.mark.slow
def test_work_is_shared_out_and_errors_are_told_everywhere(run):
    (first, second), _, _ = run
    for found in (first, second):
        assert found["shares"] == [[0, 0], [0, 1], [1, 2]]
        assert found["one"] == [0] and found["any"] is True
        assert "do not hold the same training rows" in found["unlike"]
    assert first["refused"].startswith("ConfigError: arm must be")
    assert "process 0 stopped with ConfigError: arm must be" in second["refused"]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_shell_to_the_same_end(run):
    _, folder, model = run
    assert not (folder / "cut" / "result.json").exists()
    settings = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    done = torchrun(
        *("-m", "fst_dspy", "compile", PROGRAM, "--model", model, "--out", folder / "cut"),
        *settings,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean test score") == 1  # process 0 alone reports
    names = ("weights_version", "best", "population")
    whole, cut = (
        json.loads((folder / name / "result.json").read_text()) for name in ("whole", "cut")
    )
    assert [cut[name] for name in names] == [whole[name] for name in names]
    assert texts_of(folder / "cut") == texts_of(folder / "whole")
    assert json.loads((folder / "cut" / "quadrants.json").read_text())["examples"] == 4


@pytest.mark.slow
def test_another_number_of_processes_is_refused(run):
    _, folder, model = run
    with pytest.raises(StoreError, match="begun with 2 processes, not 1"):
        compile_letters(str(model), folder / "whole")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_models_cut_up_by_accelerate_are_refused(kind, tiny_qwen3, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ConfigError, match="whole model in every process"):
        LocalLM(str(tiny_qwen3))


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # left by a scheduler that starts no processes
    assert distributed.processes() == 1 and distributed.is_main()
    assert distributed.spread(lambda own: [n + 1 for n in own], [1, 2]) == [2, 3]
    assert distributed.from_main(lambda: 3) == 3
