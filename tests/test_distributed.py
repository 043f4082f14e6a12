"""Two real processes over gloo: they agree with one another and with one process.

Under FSDP, which accelerate has to be talked into on CPUs, they agree with two processes without.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
from distributed_worker import PROGRAM, SETTINGS, compile_letters, cycles_of, steps
from places import ROOT, SUPPORT
from safetensors.torch import load_file
from torch.distributed import TCPStore

from fst_dspy import LocalLM, distributed
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.lm.sft import FinetuneConfig, fine_tune
from fst_dspy.model.policy import Policy
from fst_dspy.slow.taught_trainer import TaughtTrainer, reverse_kl
from fst_dspy.slow.trainer import SlowTrainer

PARTS = SUPPORT / "distributed_parts.py"


def torchrun(*arguments, processes=2):
    """Start processes, each with a hash seed of its own, as on a cluster."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), *map(str, arguments)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        # This checkout, also where the package is installed from another one.
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(ROOT)]),
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


def found_by_ranks(folder):
    """What each of two processes found before one was killed."""
    return [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(2)]


@pytest.fixture(scope="module")
def folders(tiny_qwen3, tmp_path_factory):
    """Of the runs of two processes, and of two under FSDP; process 0 of each was killed in one."""
    folders = [tmp_path_factory.mktemp(name) for name in ("two", "fsdp")]
    meeting = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(3)]
    done = torchrun(PARTS, tiny_qwen3, *folders, *(place.port for place in meeting))
    assert done.returncode == 0, done.stderr
    killed = -signal.SIGKILL
    assert json.loads((folders[1] / "ended.json").read_text()) == [killed, killed, 0]
    return folders


@pytest.fixture(scope="module")
def run(folders, tiny_qwen3):
    """What two processes found, the folder of their runs, and the folder of the model."""
    return found_by_ranks(folders[0]), folders[0], tiny_qwen3


@pytest.fixture
def fsdp_configured(monkeypatch):
    """The environment as accelerate leaves it, in a single process."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


def texts_of(folder):
    """The completions of the optimizer steps' rollouts, in order."""
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    return [[call["text"] for call in json.loads(line)["calls"]] for line in lines]


@pytest.mark.slow
def test_both_processes_hold_the_same_weights_and_population_at_every_cycle(run):
    (first, second), folder, _ = run
    assert first["cycles"] == second["cycles"] and len(first["cycles"]) == 4
    assert len({version for version, _, _ in first["cycles"]}) == 3, "the opening moves no weights"
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


@pytest.fixture(scope="module")
def fsdp_run(folders):
    """What two processes found under FSDP before one was killed, and the folder of their runs."""
    return found_by_ranks(folders[1]), folders[1]


def best_weights(folder):
    best = json.loads((folder / "result.json").read_text())["best"]["version"]
    return load_file(folder / "versions" / f"{best.rsplit('@')[-1]}.safetensors")


@pytest.mark.slow
def test_a_step_under_fsdp_is_the_step_of_two_whole_models(run, fsdp_run):
    (whole, _), _, _ = run
    (first, second), _ = fsdp_run
    assert first == second
    for name, tolerance in (("steps", 1e-5), ("bfloat16", 1e-2)):
        for cut_up, step in zip(first[name], whole[name], strict=True):
            assert cut_up["figures"] == pytest.approx(step["figures"], rel=tolerance, abs=1e-8)


@pytest.mark.slow
def test_under_fsdp_a_process_holds_its_part_while_it_trains(fsdp_run):
    for found in fsdp_run[0]:
        half = pytest.approx(0.5, abs=0.01)
        assert found["held"] == {"whole": 0, "weights": half, "gradients": half, "moments": half}


@pytest.mark.slow
def test_cycles_under_fsdp_end_in_the_weights_of_two_whole_models(run, fsdp_run):
    (whole, _), whole_folder, model = run
    (found, _), folder = fsdp_run
    assert [cycle[1:] for cycle in found["cycles"]] == [cycle[1:] for cycle in whole["cycles"]]
    assert texts_of(folder / "whole") == texts_of(whole_folder / "whole")
    cut_up, weights = best_weights(folder / "whole"), best_weights(whole_folder / "whole")
    assert cut_up.keys() == weights.keys()
    # Whole models read rows as a tree and sum in another order, where AdamW makes up to a part of a
    # step of 1e-2 of a gradient that is all rounding.
    assert max((cut_up[name] - weights[name]).abs().max() for name in weights) < 1e-3
    policy = Policy.load(model)  # what was written is whole
    policy.load_trainable_state(cut_up)
    assert policy.version() == found["cycles"][-1][0]


@pytest.mark.slow
def test_a_killed_run_under_fsdp_goes_on_to_the_same_end(fsdp_run):
    (found, _), folder = fsdp_run
    for rank in range(2):
        assert json.loads((folder / f"again-{rank}.json").read_text()) == found["cycles"]
    assert texts_of(folder / "cut") == texts_of(folder / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "whole model in every process"),
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
    ],
)
def test_ways_to_cut_models_up_that_leave_none_to_sample_with_are_refused(
    changed, message, tiny_qwen3, fsdp_configured, monkeypatch
):
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        LocalLM(str(tiny_qwen3))


def test_fsdp_is_refused_where_nothing_is_cut_up(tiny_qwen3, fsdp_configured):
    policy = Policy.load(tiny_qwen3)
    settings = (policy, SlowConfig(), SamplingConfig(), 9, 0)
    with pytest.raises(ConfigError, match="several processes with a GPU each"):
        SlowTrainer(*settings)
    with pytest.raises(ConfigError, match=r"a teacher of the weights .* does not work with FSDP"):
        TaughtTrainer(*settings, teaching=nullcontext, divergence=reverse_kl)
    with pytest.raises(ConfigError, match="fine-tuning does not work with FSDP"):
        fine_tune(policy, [], FinetuneConfig(), lambda: False)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # left by a scheduler that starts no processes
    assert distributed.processes() == 1 and distributed.is_main()
    assert distributed.spread(lambda own: [n + 1 for n in own], [1, 2]) == [2, 3]
    assert distributed.from_main(lambda: 3) == 3
