"""TRL's stock GRPOTrainer on random rows, and its batches as rows of ours."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fst_dspy.config import SamplingConfig
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

STEPS, PROBLEMS, GROUP = 4, 2, 4


class SpyTrainer(GRPOTrainer):
    """The stock trainer; keeps the batches it scored and those it took the loss of."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.scored.append({"rewards": self.drawn[-1], "advantages": batch["advantages"].tolist()})
        return batch

    def _compute_loss(self, model, inputs):
        self.trained.append({k: v for k, v in inputs.items() if torch.is_tensor(v)})
        assert inputs.get("old_per_token_logps") is None
        return super()._compute_loss(model, inputs)


def run_stock(policy, slow, micro_batches=1, equal_lengths=False, cuda=False):
    """Four steps of the stock trainer on random rows and rewards; the spy, and the step norms."""
    rng = torch.Generator().manual_seed(7)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    def rollout_func(prompts, trainer):
        rows = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        for index in range(len(prompts)):
            if index % GROUP == 0:
                length = 9 if equal_lengths else draw(3, 12)
                prompt = [draw(3, 300) for _ in range(length)]
            length = 6 if equal_lengths else draw(1, 8)
            rows["prompt_ids"].append(list(prompt))
            rows["completion_ids"].append([draw(3, 300) for _ in range(length)])
        return rows

    def reward(completions, **kwargs):
        drawn = [draw(0, 100) / 100 for _ in completions]
        spy.drawn.append(drawn)
        return drawn

    args = GRPOConfig(
        output_dir="unused",
        per_device_train_batch_size=PROBLEMS * GROUP // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=GROUP,
        max_steps=STEPS,
        learning_rate=slow.learning_rate,
        lr_scheduler_type=slow.lr_scheduler_type,
        warmup_steps=slow.warmup_steps,
        max_grad_norm=slow.max_grad_norm,
        weight_decay=slow.weight_decay,
        loss_type=slow.loss_type,
        epsilon=slow.epsilon,
        epsilon_high=slow.epsilon_high,
        scale_rewards=slow.scale_rewards,
        temperature=1.0,
        use_cpu=not cuda,
        bf16=False,  # its models are float32
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
    )
    spy = SpyTrainer(
        model=policy.model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"p{n}" for n in range(16)]}),
        processing_class=policy.tokenizer,
        rollout_func=rollout_func,
    )
    spy.scored, spy.trained, spy.drawn = [], [], []
    spy.train()
    return spy


def rows_of(batch):
    """The training rows of a batch of the stock trainer, in its order."""
    rows = []
    for n, advantage in enumerate(batch["advantages"].tolist()):
        prompt = batch["prompt_ids"][n][batch["prompt_mask"][n].bool()].tolist()
        completion = batch["completion_ids"][n][batch["completion_mask"][n].bool()].tolist()
        zeros = (0.0,) * len(completion)
        rows.append(TrainingRow(tuple(prompt), tuple(completion), zeros, advantage))
    return rows


def trainer_for(policy, slow):
    return SlowTrainer(policy, slow, SamplingConfig(), total_steps=STEPS, seed=0)
