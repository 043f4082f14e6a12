"""Our steps equal those of TRL's stock GRPOTrainer, bit for bit, on the same rows.

On large batches the output layer, which we run at the completions only, sums in another order; the
last test holds that to rounding.
"""

import pytest
import torch
from records import CALL, make_group
from stock_trainer import GROUP, STEPS, rows_of, run_stock, trainer_for

from fst_dspy.config import LoraConfig, SlowConfig
from fst_dspy.model.policy import Policy
from fst_dspy.slow.advantage import group_advantages, group_rows
from fst_dspy.slow.trl_stepper import SteppedGRPOTrainer
from fst_dspy.types import TrainingRow

pytestmark = pytest.mark.insides


def make_pair(folder, lora=None):
    pair = Policy.load(folder, device="cpu"), Policy.load(folder, device="cpu")
    for policy in pair:
        if lora is not None:
            policy.add_lora(lora, seed=3)
    return pair


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("loss_type", ["cispo", "dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("kind", ["qwen3", "lfm2"])
def test_steps_equal_the_stock_trainer(kind, loss_type, request):
    stock, ours = make_pair(request.getfixturevalue(f"tiny_{kind}"))
    slow = SlowConfig(
        loss_type=loss_type, learning_rate=1e-2, lr_scheduler_type="linear", weight_decay=0.1
    )
    before = ours.version()
    spy = run_stock(stock, slow)
    trainer = trainer_for(ours, slow)
    logs = [log for log in spy.state.log_history if "grad_norm" in log]
    for batch, log in zip(spy.trained, logs, strict=True):
        stats = trainer.advance(rows_of(batch))
        ours.model(torch.tensor([[3, 4, 5]]))  # what runs between steps changes nothing
        torch.rand(3)
        assert stats.grad_norm == pytest.approx(log["grad_norm"], rel=1e-6)
        assert stats.learning_rate == pytest.approx(log["learning_rate"])
        assert stats.entropy == pytest.approx(log["entropy"], rel=1e-5)
    assert ours.step == STEPS
    assert before != ours.version() == stock.version()  # a hash over all bytes of the weights


def test_lora_steps_equal_the_stock_trainer(tiny_llama):
    stock, ours = make_pair(tiny_llama, LoraConfig(rank=4))
    slow = SlowConfig(learning_rate=1e-2)
    spy = run_stock(stock, slow)
    trainer = trainer_for(ours, slow)
    for batch in spy.trained:
        trainer.advance(rows_of(batch))
    assert stock.weights_hash() == ours.weights_hash()


@pytest.mark.parametrize("loss_type", ["cispo", "grpo"])
def test_micro_batches_equal_the_stock_trainers(loss_type, tiny_qwen3):
    stock, ours = make_pair(tiny_qwen3)
    slow = SlowConfig(loss_type=loss_type, learning_rate=1e-2, micro_batch_size=4)
    spy = run_stock(stock, slow, micro_batches=2, equal_lengths=True)
    trainer = trainer_for(ours, slow)
    for first, second in zip(spy.trained[::2], spy.trained[1::2], strict=True):
        trainer.advance(rows_of(first) + rows_of(second))
    assert stock.weights_hash() == ours.weights_hash()


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_equal_the_stock_trainers(scale_rewards, tiny_qwen3):
    policy = Policy.load(tiny_qwen3, device="cpu")
    spy = run_stock(policy, SlowConfig(scale_rewards=scale_rewards, learning_rate=1e-3))
    assert len(spy.scored) == STEPS
    for scored in spy.scored:
        rewards = scored["rewards"]
        groups = [make_group(part, calls=(CALL,)) for part in (rewards[:GROUP], rewards[GROUP:])]
        ours = [row.advantage for row in group_rows(groups, scale_rewards)]
        assert ours == scored["advantages"]
        if scale_rewards == "group":
            assert group_advantages(groups[0]) + group_advantages(groups[1]) == ours


def test_output_layer_at_completions_only_differs_by_rounding(tiny_lfm2, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(32):
        prompt, completion = torch.randint(3, 300, (2, 40), generator=generator).tolist()
        completion = tuple(completion[: 5 + n])
        advantage = (n % 5) - 2.1
        rows.append(TrainingRow(tuple(prompt) * 4, completion, (0.0,) * len(completion), advantage))

    def gradient():
        policy, caught = Policy.load(tiny_lfm2, device="cpu"), []
        trainer = trainer_for(policy, SlowConfig(max_grad_norm=0))
        trainer._trl.optimizer.optimizer.register_step_pre_hook(
            lambda *_: caught.extend(p.grad.flatten().clone() for p in policy.model.parameters())
        )
        trainer.advance(rows)
        return torch.cat(caught)

    ours = gradient()
    monkeypatch.delattr(SteppedGRPOTrainer, "_get_per_token_logps_and_entropies")
    stock = gradient()
    assert stock.norm() > 0
    assert (ours - stock).norm() < 1e-5 * stock.norm()
