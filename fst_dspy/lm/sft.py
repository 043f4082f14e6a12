"""Supervised fine-tuning of the local policy, through TRL's SFTTrainer.

The conversations are tokenised here, so that the loss covers exactly the tokens a model samples:
the last answer and its end token. Weights in bfloat16 are trained through copies in float32, as in
the slow channel. Nothing is printed, and no file outlives the call.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from dspy.clients.utils_finetune import TrainDataFormat
from rich.console import Console
from rich.progress import Progress
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fst_dspy import distributed
from fst_dspy.config import SCHEDULES, LoraConfig
from fst_dspy.errors import ConfigError, DataError, TrainingError
from fst_dspy.lm.templates import check_options
from fst_dspy.lm.train_input import Turn, check_format, check_messages, encode_turn
from fst_dspy.model.hardware import (
    as_current,
    computes_in_bfloat16,
    global_rng_kept,
    on_device,
)
from fst_dspy.model.policy import Policy
from fst_dspy.slow.master_weights import MasterWeights

logger = logging.getLogger(__name__)

NO_LOSS = -100  # the label of a token that the loss leaves out


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one fine-tuning, named as in transformers.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        num_train_epochs: Passes over the data, above 0.
        per_device_train_batch_size: Conversations in one forward and backward pass.
        gradient_accumulation_steps: Passes in one optimizer step.
        lr_scheduler_type: One of transformers' schedules, as for ``SlowConfig``.
        warmup_steps: Optimizer steps of linear warm-up.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Gradient clipping; 0 switches it off.
        max_length: Longest conversation in tokens, at most the context window, which is the
            default. Answers are cut to it; a conversation whose prompt fills it is left out.
        lora: Adapter settings, or ``None`` to train what the weights have.
        seed: Seed of data order, dropout and fresh adapters.
        chat_template_kwargs: Variables of the chat template; those of the LM that is fine-tuned.
    """

    learning_rate: float = 1e-4
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    lora: LoraConfig | None = None
    seed: int = 0
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "weight_decay": 0,
            "max_grad_norm": 0,
        }
        if self.max_length is not None:
            at_least["max_length"] = 2
        for name, least in at_least.items():
            value = getattr(self, name)
            if not _is_number(value) or value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value!r}")
        for name in ("learning_rate", "num_train_epochs"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise ConfigError(f"{name} must be positive and finite, got {value!r}")
        if self.lr_scheduler_type not in SCHEDULES:
            raise ConfigError(
                f"lr_scheduler_type must be one of {', '.join(map(repr, SCHEDULES))}, "
                f"got {self.lr_scheduler_type!r}"
            )


Conversation = list[dict[str, str]]


def read_conversations(train_data: Any, train_data_format: Any) -> list[Conversation]:
    """The conversations of DSPy's chat format, checked.

    Raises:
        DataError: No data, another format, or a conversation that does not end in an answer.
    """
    check_format(train_data, train_data_format, TrainDataFormat.CHAT)
    conversations = []
    for number, item in enumerate(train_data):
        where = f"train_data[{number}]['messages']"
        given = item.get("messages") if isinstance(item, dict) else None
        messages = check_messages(where, given)
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(f"{where} must end in an assistant's answer to what comes before it")
        conversations.append(messages)
    return conversations


def fine_tune(
    policy: Policy,
    conversations: Sequence[Conversation],
    config: FinetuneConfig,
    stop: Callable[[], bool],
) -> float:
    """Train the policy's live weights, or its adapters where it has any; hold ``policy.lock``.

    Args:
        policy: Its weights are updated in place and its ``step`` counted on.
        conversations: As ``read_conversations`` gives them.
        config: The settings.
        stop: Asked after every optimizer step; ``True`` ends the training.

    Returns:
        Mean training loss, nats a token.

    Raises:
        ConfigError: accelerate is set up for FSDP.
        DataError: Every prompt is too long.
        TrainingError: Loss or weights became non-finite, or ``stop`` said so. The live weights are
            then of no use: the caller puts others back.
    """
    distributed.refuse_fsdp("supervised fine-tuning")
    turns = _encode(policy, conversations, config)
    listener = _Listener(stop)
    cuda = policy.device.type == "cuda"
    with (
        tempfile.TemporaryDirectory() as folder,
        as_current(policy.device),
        global_rng_kept(policy.device),
        _model_kept(policy),
        warnings.catch_warnings(),
    ):
        # transformers renames gradient_checkpointing, which TRL sets by itself.
        warnings.simplefilter("ignore", FutureWarning)
        args = SFTConfig(
            output_dir=folder,
            learning_rate=config.learning_rate,
            num_train_epochs=config.num_train_epochs,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            max_length=None,  # cut already
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=not cuda,
            bf16=computes_in_bfloat16(policy.model),
            gradient_checkpointing=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=policy.model,
            args=on_device(args, policy.device),
            train_dataset=_dataset(turns),
            processing_class=policy.tokenizer,
            callbacks=[listener, _FullPrecision()],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            result = trainer.train()
        finally:
            listener.close()
    policy.step += trainer.state.global_step
    if stop():
        raise TrainingError(f"fine-tuning was cancelled after {trainer.state.global_step} steps")
    if not (math.isfinite(result.training_loss) and _finite(policy)):
        raise TrainingError(
            f"fine-tuning diverged (loss {result.training_loss}); lower learning_rate, now "
            f"{config.learning_rate:g}"
        )
    return result.training_loss


def _encode(
    policy: Policy, conversations: Sequence[Conversation], config: FinetuneConfig
) -> list[Turn]:
    limit = min(config.max_length or policy.context_length, policy.context_length)
    options = check_options(policy, config.chat_template_kwargs or {})
    encoded = [encode_turn(policy, c[:-1], c[-1]["content"], limit, options) for c in conversations]
    turns = [turn for turn in encoded if turn is not None]
    if not turns:
        raise DataError(f"no prompt leaves room for an answer in {limit} tokens (max_length)")
    if len(turns) < len(encoded):
        logger.warning(
            "%d of %d conversations are left out: their prompts fill %d tokens",
            len(encoded) - len(turns), len(encoded), limit,
        )  # fmt: skip
    return turns


def _dataset(turns: Sequence[Turn]) -> Dataset:
    rows = [
        {
            "input_ids": [*turn.prompt_ids_T, *turn.completion_ids_T],
            "labels": [NO_LOSS] * len(turn.prompt_ids_T) + list(turn.completion_ids_T),
        }
        for turn in turns
    ]
    return Dataset.from_list(rows)


class _FullPrecision(TrainerCallback):
    """Lets the optimizer work on float32, where small updates are not rounded away."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        MasterWeights(optimizer.optimizer)  # beneath accelerate's; its hooks keep it


class _Listener(TrainerCallback):
    """Stops when told to, and shows a live line where there is a terminal or notebook."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self.stop = stop
        console = Console(stderr=True)
        shown = console.is_terminal or console.is_jupyter
        self._bar = Progress(console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task("fine-tuning", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(self._task, total=state.max_steps)
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)
        if self.stop():
            control.should_training_stop = True

    def close(self) -> None:
        self._bar.stop()


@contextmanager
def _model_kept(policy: Policy) -> Iterator[None]:
    """TRL and accelerate put a ``forward`` of their own on the model's instance; take it off."""
    model = policy.model
    places = [model, model.get_base_model()] if policy.lora is not None else [model]
    before = [(place, place.__dict__.get("forward")) for place in places]
    try:
        yield
    finally:
        for place, forward in before:
            place.__dict__.pop("forward", None)
            if forward is not None:
                place.forward = forward
        for weight in model.parameters():
            weight.grad = None
        model.eval()


def _finite(policy: Policy) -> bool:
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    return all(bool(torch.isfinite(weight).all()) for weight in weights)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
