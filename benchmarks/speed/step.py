"""(b) ``SlowTrainer.advance`` against an optimizer step of TRL's stock ``GRPOTrainer``.

The stock trainer runs its own loop; after each of its steps, ours takes one on the same rows. Its
time is that of its step without ``_generate_and_score_completions``: what stands in for generation
there takes no time, and advantages are given to us.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.speed.measure import Clock, Row, ratios, row_of
from benchmarks.speed.models import MODELS
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

GROUP = 8


@dataclass(frozen=True)
class Workload:
    """P problems of G rows each; lengths are drawn from the upper half of those given."""

    model: str
    problems: int
    prompt: int
    completion: int
    micro_batch: int


WORKLOADS = (
    Workload("embedded", 8, 192, 48, 16),
    Workload("embedded", 8, 128, 128, 16),
    Workload("middle", 2, 128, 32, 8),
)


def run(quick: bool) -> Iterator[Row]:
    """A row a workload."""
    for work in WORKLOADS[: 1 if quick else None]:
        times = step_times(work, 2 if quick else 6)
        yield row_of(
            "b",
            f"{work.model}, {work.prompt} + {work.completion} tokens: advance against a stock step",
            "x",
            ratios(times, "ours", "stock"),
            "<= 1.0",
            f"{work.problems * GROUP} rows; {min(times['ours']):.2f} s against "
            f"{min(times['stock']):.2f} s",
        )


def step_times(work: Workload, steps: int) -> dict[str, list[float]]:
    """Seconds of each step, after a first one that is not counted."""
    slow = SlowConfig(micro_batch_size=work.micro_batch, learning_rate=3e-4)
    stock, ours = MODELS[work.model]().policy, MODELS[work.model]().policy
    trainer = SlowTrainer(ours, slow, SamplingConfig(), steps + 1, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        loop = _TimedTrainer(
            model=stock.model,
            reward_funcs=lambda completions, **_: [random.random() for _ in completions],
            args=_stock_config(work, slow, steps + 1, folder),
            train_dataset=Dataset.from_dict({"prompt": [f"p{n}" for n in range(64)]}),
            processing_class=stock.tokenizer,
            rollout_func=_Rows(work, len(stock.tokenizer)),
        )
        timer = _Timer(loop, trainer)
        loop.remove_callback(PrinterCallback)
        loop.add_callback(timer)
        loop.train()
    return {name: values[1:] for name, values in timer.times.items()}


class _TimedTrainer(GRPOTrainer):
    """The stock trainer; keeps its batch, and how long it took to make it."""

    scoring = 0.0
    batch: dict[str, Any]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = Clock.now()
        self.batch = super()._generate_and_score_completions(inputs)
        self.scoring += Clock.now() - started
        return self.batch


class _Timer(TrainerCallback):
    """Times the stock steps, and takes and times ours after each."""

    def __init__(self, loop: _TimedTrainer, trainer: SlowTrainer) -> None:
        self.loop, self.trainer = loop, trainer
        self.times: dict[str, list[float]] = {"stock": [], "ours": []}
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.loop.scoring, self.started = 0.0, Clock.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times["stock"].append(Clock.now() - self.started - self.loop.scoring)
        rows = rows_of(self.loop.batch)
        started = Clock.now()
        self.trainer.advance(rows)
        self.times["ours"].append(Clock.now() - started)


class _Rows:
    """Random prompts and completions in place of generation."""

    def __init__(self, work: Workload, vocabulary: int) -> None:
        self.work, self.vocabulary, self.rng = work, vocabulary, random.Random(0)

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        prompt: list[int] = []
        rows: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        for index in range(len(prompts)):
            if index % GROUP == 0:
                prompt = self._draw(self.work.prompt)
            rows["prompt_ids"].append(list(prompt))
            rows["completion_ids"].append(self._draw(self.work.completion))
        return rows

    def _draw(self, longest: int) -> list[int]:
        length = self.rng.randint(longest // 2, longest)
        return [self.rng.randrange(10, self.vocabulary) for _ in range(length)]


def _stock_config(work: Workload, slow: SlowConfig, steps: int, folder: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=work.micro_batch,
        gradient_accumulation_steps=work.problems * GROUP // work.micro_batch,
        num_generations=GROUP,
        max_steps=steps,
        learning_rate=slow.learning_rate,
        lr_scheduler_type=slow.lr_scheduler_type,
        max_grad_norm=slow.max_grad_norm,
        loss_type=slow.loss_type,
        epsilon=slow.epsilon,
        epsilon_high=slow.epsilon_high,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def rows_of(batch: dict[str, Any]) -> list[TrainingRow]:
    """The training rows of a batch of the stock trainer."""
    rows = []
    for n, advantage in enumerate(batch["advantages"].tolist()):
        prompt = batch["prompt_ids"][n][batch["prompt_mask"][n].bool()].tolist()
        completion = batch["completion_ids"][n][batch["completion_mask"][n].bool()].tolist()
        zeros = (0.0,) * len(completion)
        rows.append(TrainingRow(tuple(prompt), tuple(completion), zeros, advantage))
    return rows
