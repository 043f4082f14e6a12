"""Training in bfloat16: small updates add up, and a run can be gone on with."""

import pytest
import torch

import fst_dspy.lm.sft as sft_module
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.lm.sft import FinetuneConfig, fine_tune
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

ROWS = [
    TrainingRow(tuple(range(5, 12 + n)), tuple(range(60 + n, 68)), (-2.0,) * (8 - n), (-1.0) ** n)
    for n in range(4)
]
RATE = 1e-4  # less than half of bfloat16's last digit for weights above 0.05


def make(folder, dtype="bfloat16"):
    policy = Policy.load(folder, device="cpu", dtype=dtype)
    return policy, SlowTrainer(policy, SlowConfig(learning_rate=RATE), SamplingConfig(), 99, 0)


def share_moved(policy, trainer, steps):
    """Share of the large weights that some steps changed."""
    before = policy.trainable_state()
    for _ in range(steps):
        trainer.advance(ROWS)
    after = policy.trainable_state()
    moved = [(before[k] != after[k])[before[k].abs() > 0.05].flatten() for k in before]
    return torch.cat(moved).float().mean().item()


@pytest.mark.slow
def test_small_updates_are_not_rounded_away(tiny_qwen3):
    assert share_moved(*make(tiny_qwen3), 30) > 0.3
    policy, trainer = make(tiny_qwen3)
    plain = torch.optim.AdamW(policy.model.parameters(), lr=RATE, weight_decay=0.0)
    trainer._trl.optimizer.optimizer, trainer._trl.lr_scheduler.step = plain, lambda: None
    assert share_moved(policy, trainer, 30) < 0.1


def fine_tuned_share(folder):
    """Share of the large weights that 60 steps of fine-tuning at a rate of 1e-5 changed."""
    policy = Policy.load(folder, device="cpu", dtype="bfloat16")
    before = policy.trainable_state()
    turns = [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "silver"}]
    config = FinetuneConfig(
        learning_rate=1e-5, num_train_epochs=60, lr_scheduler_type="constant", max_length=64
    )
    with policy.lock:
        fine_tune(policy, [turns], config, lambda: False)
    after = policy.trainable_state()
    moved = [(before[k] != after[k])[before[k].abs() > 0.05].flatten() for k in before]
    return torch.cat(moved).float().mean().item()


def test_small_updates_of_fine_tuning_arrive(tiny_qwen3, monkeypatch):
    share = fine_tuned_share(tiny_qwen3)
    monkeypatch.setattr(sft_module, "MasterWeights", lambda optimizer: None)
    assert fine_tuned_share(tiny_qwen3) < 0.02 < 0.15 < share


def test_a_saved_run_goes_on_bit_for_bit(tiny_qwen3, tmp_path):
    policy, trainer = make(tiny_qwen3)
    trainer.advance(ROWS)
    trainer.save(tmp_path)
    other, resumed = make(tiny_qwen3)
    resumed.load(tmp_path)
    for each in (trainer, resumed):
        for _ in range(3):
            each.advance(ROWS)
    copies, again = trainer._trl.masters.state(), resumed._trl.masters.state()
    assert copies and all(torch.equal(copies[name], again[name]) for name in copies)
    assert policy.version() == other.version()


def test_weights_put_in_from_outside_are_trained_on(tiny_qwen3):
    policy, trainer = make(tiny_qwen3)
    trainer.advance(ROWS)
    zeros = {name: torch.zeros_like(w) for name, w in policy.trainable_state().items()}
    policy.load_trainable_state(zeros)
    trainer.advance(ROWS)
    assert all(w.abs().max() <= 2 * RATE for w in policy.trainable_state().values())


def test_gradients_do_not_outlive_a_step_that_was_dropped(tiny_qwen3):
    policy, trainer = make(tiny_qwen3)
    bad = [TrainingRow((5, 6), (7, 8), (0.0, 0.0), float("nan"))]
    assert trainer.advance(bad).skipped == "non_finite"
    assert all(weight.grad is None for weight in policy.model.parameters())


def test_float32_weights_have_no_copies(tiny_qwen3):
    assert make(tiny_qwen3, "float32")[1]._trl.masters.state() == {}
