"""Training in bfloat16: small updates add up, and a run can be gone on with."""

import pytest
import torch

import fst_dspy.lm.sft as sft_module
import fst_dspy.slow.master_weights as masters_module
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.lm.sft import FinetuneConfig, fine_tune
from fst_dspy.model.policy import Policy
from fst_dspy.slow.master_weights import MasterWeights
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
    trainer.state().write(tmp_path)
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


class Watched(torch.optim.AdamW):
    """Notes how many values have a float32 gradient at once."""

    most = 0

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        values = sum(p.grad.numel() for p in params if p.grad is not None and p.dim() > 0)
        self.most = max(self.most, values)
        return super().step(closure)


def test_a_step_in_parts_is_the_step_and_holds_few_gradients_in_float32(monkeypatch):
    monkeypatch.setattr(masters_module, "PART_VALUES", 100)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 8).bfloat16()) for _ in range(6)]
    small = torch.nn.Parameter(torch.randn(5))  # in float32, and so its own master
    references = [torch.nn.Parameter(w.detach().float()) for w in (*weights, small)]
    watched = Watched([*weights, small], lr=1e-3)
    MasterWeights(watched)
    reference = torch.optim.AdamW(references, lr=1e-3)
    for _ in range(3):
        for weight, other in zip((*weights, small), references, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.float()
        watched.step()
        reference.step()
        assert all(weight.grad is None for weight in weights)
    assert watched.most == 64
    for weight, other in zip((*weights, small), references, strict=True):
        assert torch.equal(weight, other.to(weight.dtype))
    assert not torch.equal(references[0].bfloat16().float(), references[0])


def test_weights_are_compared_only_where_they_were_written_to(monkeypatch):
    weights = [torch.nn.Parameter(torch.ones(4, 4).bfloat16()) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    masters = MasterWeights(optimizer)

    def step():
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()

    step()
    compared = []
    monkeypatch.setattr(masters_module, "_parts", compared_by(compared, masters_module._parts))
    step()
    assert compared[0] == 0
    exact = masters.state()["master.0"].clone()
    with torch.no_grad():
        before = weights[0].clone()
        weights[0].copy_(torch.zeros(4, 4))  # a visit
        weights[0].copy_(before)
        weights[1].fill_(3.0)  # and other weights for good
    compared.clear()
    step()
    assert compared[0] == 2
    assert (masters.state()["master.0"] - exact).abs().max() < 2e-4  # gone on from all digits
    assert not torch.equal(exact, exact.bfloat16().float())
    assert (masters.state()["master.1"] - 3).abs().max() < 1e-3


def compared_by(counts, parts):
    def counted(pairs):
        counts.append(len(pairs))
        return parts(pairs)

    return counted
