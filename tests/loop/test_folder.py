"""Checkpoints: by their share of the time, beside the work, of one moment."""

import os
import threading
import time

import dspy
import pytest
import torch
from helpers import Echo, RawAdapter
from safetensors.torch import load_file
from tiny_compile import compile_tiny

from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import StoreError
from fst_dspy.loop import folder as folder_module
from fst_dspy.loop.folder import RunFolder
from fst_dspy.loop.state import LoopState
from fst_dspy.model.policy import Policy
from fst_dspy.results.result import Best
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.slow.training_state import WEIGHTS, TrainingState
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Population, TrainingRow

ROWS = [
    TrainingRow(tuple(range(5, 12 + n)), tuple(range(60, 64)), (-2.0,) * 4, (-1.0) ** n)
    for n in range(4)
]
CANDIDATE = make_candidate({"solve.instructions": "Answer."})


def state_of(policy):
    best = Best(policy.keep(), CANDIDATE, 0.5, 1)
    return LoopState(Population((CANDIDATE,), (), (), 0), step=policy.step, best=best)


@pytest.fixture
def run_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


@pytest.fixture
def policy(tiny_qwen3):
    return Policy.load(tiny_qwen3, device="cpu")


@pytest.fixture
def trainer(policy):
    return SlowTrainer(policy, SlowConfig(learning_rate=1e-2), SamplingConfig(), 9, 0)


def test_checkpoints_take_their_share_of_the_time_at_most(run_folder, monkeypatch):
    writer, now = run_folder._writer, [1000.0]
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now[0])
    writer.ended_at, writer.seconds = 1000.0, 0.1
    assert run_folder.is_due(closes=True)  # cheap: every cycle
    assert not run_folder.is_due(closes=False)
    now[0] += folder_module.CHECKPOINT_SECONDS
    assert run_folder.is_due(closes=False)
    writer.seconds = 30.0
    for seconds, due in ((599.0, False), (601.0, True)):
        now[0] = 1000.0 + seconds
        assert run_folder.is_due(closes=True) is run_folder.is_due(closes=False) is due


def test_a_checkpoint_is_of_the_moment_it_was_begun_though_the_run_goes_on(
    run_folder, policy, trainer, monkeypatch
):
    trainer.advance(ROWS)
    state, before = state_of(policy), policy.trainable_state()
    go, write = threading.Event(), TrainingState.write

    def held_up(self, path):
        go.wait(10)
        write(self, path)

    monkeypatch.setattr(TrainingState, "write", held_up)
    run_folder.store.append("steps", [{"step": 1}])
    run_folder.checkpoint(state, trainer, policy)
    assert run_folder.store.latest() is None and not run_folder.is_due(closes=True)
    moments = {k: v.clone() for k, v in trainer.state().optimizer.items()}
    trainer.advance(ROWS)
    run_folder.store.append("steps", [{"step": 2}])
    go.set()
    run_folder.settle()
    found = run_folder.latest()
    saved = TrainingState.read(found.weights)
    for name, tensor in before.items():
        assert torch.equal(saved.weights[name], tensor)
        assert torch.equal(load_file(found.best)[name], tensor)
    assert all(torch.equal(saved.optimizer[name], moments[name]) for name in moments)
    assert not torch.equal(policy.trainable_state()[name], before[name])
    assert saved.scalars["step"] == 1
    assert run_folder.store.read("steps") == [{"step": 1}]  # what came later is taken again


def test_without_memory_for_a_copy_the_run_waits(run_folder, policy, trainer, monkeypatch):
    monkeypatch.setattr(folder_module, "free_memory", lambda: 1000)
    monkeypatch.setattr(TrainingState, "copied", lambda self: pytest.fail("a copy"))
    run_folder.checkpoint(state_of(policy), trainer, policy)
    assert not run_folder._writer.busy
    assert (run_folder.latest().weights / WEIGHTS).exists()


def test_the_base_is_not_written_again(run_folder, policy, trainer):
    run_folder.checkpoint(state_of(policy), trainer, policy)
    run_folder.settle()
    assert run_folder.latest().restore(policy, trainer).best.version == policy.base_version
    assert not list((run_folder.path / "versions").glob("*"))


def test_a_checkpoint_that_could_not_be_written_is_told(run_folder, policy, trainer, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    run_folder.checkpoint(state_of(policy), trainer, policy)
    run_folder.settle()
    monkeypatch.setattr(TrainingState, "write", full)
    run_folder.checkpoint(state_of(policy), trainer, policy)
    with pytest.raises(StoreError, match="No space left"):
        run_folder.settle()
    assert run_folder.latest() is not None  # the one before
    run_folder.checkpoint(state_of(policy), trainer, policy)
    time.sleep(0.01)
    with pytest.raises(StoreError, match="No space left"):
        run_folder.checkpoint(state_of(policy), trainer, policy)


@pytest.mark.parametrize("text", ["null", "[]", '"x"'])
def test_a_config_that_holds_no_object_is_damaged(run_folder, text):
    (run_folder.path / "config.json").write_text(text)
    with pytest.raises(StoreError, match=r"config\.json is damaged: it holds no object"):
        run_folder.begin({"seed": 0})


def test_a_program_may_change_the_working_directory(tiny_qwen3, tmp_path, monkeypatch):
    class Moving(Echo):
        def forward(self, question):
            os.chdir(tmp_path / "elsewhere")
            return self.say(question=question)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with dspy.context(adapter=RawAdapter()):
        result = compile_tiny(tiny_qwen3, Moving(), log_dir="run", max_cycles=1)[2]
    assert result.log_dir == str(tmp_path / "run") and (tmp_path / "run/result.json").exists()
