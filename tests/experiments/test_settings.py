"""Settings that ablations and the tuned baseline change: advantage, first phase, entropy bonus."""

from dataclasses import replace

import dspy
import pytest
import torch
from helpers import Echo, RawAdapter, assert_equal_but_for_rounding, questions, vowels
from records import CALL, make_rollout

from fst_dspy import FST, LocalLM
from fst_dspy.config import FSTConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError
from fst_dspy.files import read_jsonl
from fst_dspy.model.policy import Policy
from fst_dspy.slow.advantage import by_candidate, constant_group_share, group_rows
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import Group, TrainingRow

TINY = {
    "max_cycles": 3,
    "steps_per_cycle": 2,
    "problems_per_step": 2,
    "group_size": 4,
    "population_size": 2,
    "first_cycle_iterations": 3,
    "cycle_iterations": 1,
    "minibatch_size": 2,
    "max_tokens": 6,
    "val_size": 2,
    "learning_rate": 1e-2,
}


def compile_tiny(folder, **settings):
    with dspy.context(lm=LocalLM(str(folder)), adapter=RawAdapter()):
        fst = FST(vowels, track_stats=True, **{**TINY, **settings})
        compiled = fst.compile(Echo(), trainset=questions(6), valset=questions(3, 10))
    return compiled.detailed_results


def rollout(candidate, reward):
    return make_rollout(reward, candidate_id=candidate, calls=(CALL,))


def test_an_advantage_per_candidate_does_not_tell_candidates_apart():
    """Candidate a is always right and b never: over the problem that is all there is to learn."""
    group = Group("e", tuple(rollout(c, r) for c, r in (("a", 1), ("b", 0), ("a", 1), ("b", 0))))
    own = by_candidate([group])
    assert [[r.candidate_id for r in part.rollouts_G] for part in own] == [["a", "a"], ["b", "b"]]
    assert [row.advantage > 0 for row in group_rows([group], "group")] == [True, False, True, False]
    assert [row.advantage for row in group_rows(own, "group")] == [0.0] * 4
    assert (constant_group_share([group]), constant_group_share(own)) == (0.0, 1.0)


def test_the_advantage_is_a_setting(tiny_qwen3, tmp_path):
    for advantage in ("problem", "candidate"):
        compile_tiny(tiny_qwen3, advantage=advantage, log_dir=tmp_path / advantage)
        rows = [
            row for row in read_jsonl(tmp_path / advantage / "rollouts.jsonl") if row["step"] == 1
        ]
        assert len(rows) == 8
        sums = {}
        for row in rows:
            pair = row["example_id"], row["candidate_id"]
            sums[pair] = sums.get(pair, 0.0) + row["advantage"]
        balanced = all(abs(total) < 1e-4 for total in sums.values())
        assert len(sums) == 4 and balanced == (advantage == "candidate")
    with pytest.raises(ConfigError, match="at least twice population_size"):
        FSTConfig.make(advantage="candidate", group_size=4, population_size=4)
    with pytest.raises(ConfigError, match="'problem' or 'candidate'"):
        FSTConfig.make(advantage="prompt")


@pytest.mark.parametrize("reuse", [True, False])
def test_the_slow_phase_may_come_first(reuse, tiny_qwen3):
    first, second, *_ = records = compile_tiny(tiny_qwen3, first_phase="slow", reuse=reuse).records[
        1:
    ]
    assert len(records) == 3
    assert first.step == 2 and first.proposals["proposals"] == 0
    assert len(first.candidate_ids) == 1 and first.rollouts.slow == 16
    assert second.step == 4 and second.proposals["iterations"] >= 3
    usual = compile_tiny(tiny_qwen3, reuse=reuse).records
    assert usual[1].proposals["iterations"] >= 3
    with pytest.raises(ConfigError, match="'fast' or 'slow'"):
        FSTConfig.make(first_phase="both")


def rows_for(count, advantage):
    generator = torch.Generator().manual_seed(count)
    rows = []
    for n in range(count):
        prompt, completion = torch.randint(3, 300, (2, 6), generator=generator).tolist()
        length = 1 + n % 5
        rows.append(
            TrainingRow(tuple(prompt), tuple(completion[:length]), (-1.5,) * length, advantage)
        )
    return rows


def step(folder, rows, **settings):
    """Gradients and statistics of one step."""
    policy, caught = Policy.load(folder, device="cpu"), {}
    slow = SlowConfig(max_grad_norm=0, **settings)
    trainer = SlowTrainer(policy, slow, SamplingConfig(), total_steps=5, seed=0)

    def catch(*_):
        caught.update((k, w.grad.clone()) for k, w in policy.model.named_parameters())

    trainer._trl.optimizer.optimizer.register_step_pre_hook(catch)
    return caught, trainer.advance(rows)


def test_the_entropy_bonus_is_the_gradient_of_the_mean_entropy(tiny_qwen3):
    """Against the formula, on rows whose advantage gives no gradient."""
    rows = rows_for(7, 0.0)
    model = Policy.load(tiny_qwen3, device="cpu").model
    entropies = []
    for row in rows:
        ids = torch.tensor(row.prompt_ids_T + row.completion_ids_T)
        logprob_TV = model(ids[None]).logits[0, len(row.prompt_ids_T) - 1 : -1].log_softmax(-1)
        entropies += list(-(logprob_TV.exp() * logprob_TV).sum(-1))
    (-0.3 * torch.stack(entropies).mean()).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    for size in (16, 3):  # however the step is cut into micro-batches
        found, stats = step(tiny_qwen3, rows, entropy_coef=0.3, micro_batch_size=size)
        assert stats.skipped is None
        assert_equal_but_for_rounding(found, expected, rounding=5e-5)
    assert step(tiny_qwen3, rows)[1].skipped == "constant"


def test_the_bonus_adds_to_the_policy_gradient(tiny_qwen3):
    rows = rows_for(6, 0.0)
    rows = [replace(row, advantage=float(n - 2)) for n, row in enumerate(rows)]
    plain, _ = step(tiny_qwen3, rows, micro_batch_size=4)
    both, _ = step(tiny_qwen3, rows, entropy_coef=0.1, micro_batch_size=4)
    none = [replace(row, advantage=0.0) for row in rows]
    bonus, _ = step(tiny_qwen3, none, entropy_coef=0.1, micro_batch_size=4)
    assert_equal_but_for_rounding(both, {name: plain[name] + bonus[name] for name in plain})
    with pytest.raises(ConfigError, match="entropy_coef must not be negative"):
        SlowConfig(entropy_coef=-0.1)
