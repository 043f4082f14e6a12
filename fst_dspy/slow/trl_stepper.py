"""TRL's GRPOTrainer, advanced one optimizer step at a time on rows that are given to it.

This is the one file that leans on private parts of TRL 1.16 and transformers 5.17 to 5.24, but for
their caches (``fst_dspy.model.cache_layers``) and the choice of a GPU (``on_device``). The test
``test_trl_contract`` holds it to the stock trainer, bit for bit on small batches and to rounding on
large ones. They are:

- ``GRPOTrainer._compute_loss(model, inputs)`` and the keys of ``inputs`` it reads;
- ``GRPOTrainer._get_per_token_logps_and_entropies``, overridden, and the ``fused_lm_head`` forward
  that it calls, which runs ``model.base_model`` and reads its ``last_hidden_state``, takes
  ``shift_labels`` and hands the cache on; ``trl.trainer.utils.add_fused_lm_head``, which makes it
  for one temperature, and ``GRPOConfig.cast_lm_head_to_fp32``;
- ``GRPOTrainer._metrics["train"]`` with ``entropy``, ``clip_ratio/region_mean`` and
  ``cispo_clip_ratio``; ``GRPOTrainer.beta`` and ``aux_loss_enabled``;
- ``Trainer._prepare_for_training``, which makes optimizer and scheduler,
  ``Trainer.compute_loss_context_manager`` and ``Trainer.current_gradient_accumulation_steps``;
- that TRL and accelerate put a ``forward`` of their own on the model's instance;
- ``Trainer.model_wrapped``, which ``_prepare_for_training`` gives to accelerate.

Where accelerate is set up for FSDP2, it is a copy of the model that is cut up and trained. The
model itself is left as it is, so that everything between the steps finds it whole.

The stock loop, its callbacks, its data loader and its generation are never entered.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError, TrainingError
from fst_dspy.model.hardware import (
    as_current,
    computes_in_bfloat16,
    global_rng_kept,
    on_device,
)
from fst_dspy.model.logprobs import chosen_logprobs, completion_inputs, only_at
from fst_dspy.model.prefixes import can_continue, is_checkpointing, left_padded, right_padded
from fst_dspy.slow.master_weights import MasterWeights
from fst_dspy.types import TrainingRow

TRL_MAX_COMPLETION = 512
"""TRL's own ``max_completion_length``; only ``dr_grpo`` uses it, as a constant to divide by."""

TOKEN_MEAN_LOSSES = ("cispo", "dapo", "vespo", "bnpo")  # every token weighs the same
CLIP_METRICS = ("cispo_clip_ratio", "clip_ratio/region_mean")

ADAPTERS_DROPOUT = "lora_dropout"
"""What peft calls the dropout on adapters' inputs."""
PROBED = 8
"""Tokens on which TRL's output layer is compared with the model's own."""
DIFFERS = 0.1
"""Nats a token from which on the two are not the same; what bfloat16 rounds is below."""


Batch = Mapping[str, Any]
"""A micro-batch as ``collate`` makes it: tensors, and the temperature of its rows."""


@dataclass(frozen=True)
class Gradients:
    """What one pass over a batch measured; the gradients are on the parameters.

    Attributes:
        loss: Sum over the micro-batches.
        entropy: Nats a token, mean over the completion tokens of the rows that were run.
        clip_share: Share of those tokens whose importance weight was clipped, 0 to 1.
        drift: Mean absolute difference of their log-probabilities from those at sampling, nats.
    """

    loss: float
    entropy: float
    clip_share: float
    drift: float = 0.0


class SteppedGRPOTrainer(GRPOTrainer):
    """A GRPOTrainer that is opened once and fed batches of rows.

    The model's ``forward`` is TRL's own only inside ``fused``: generation and everything else
    between the steps sees the model as it was.

    Attributes:
        whole: The model as it was given.
        model: What is trained: the same, or under FSDP a copy that is cut up.
        has_dropout: Whether adapters drop activations in training; the model's own layers do not.
        outputs_as_model: Whether TRL's output layer gives the model's own log-probabilities.

    Raises:
        ConfigError: FSDP is asked for where accelerate does not cut models up.
    """

    model: Any
    aux_loss_enabled: bool
    optimizer: Any
    lr_scheduler: Any
    current_gradient_accumulation_steps: Any

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        slow: SlowConfig,
        sampling: SamplingConfig,
        total_steps: int,
        seed: int,
    ) -> None:
        device = next(model.parameters()).device
        places = [model] if _unwrapped(model) is model else [model, _unwrapped(model)]
        before = [(place, place.__dict__.get("forward")) for place in places]
        trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
        with (
            tempfile.TemporaryDirectory() as folder,
            as_current(device),
            global_rng_kept(device),
            warnings.catch_warnings(),
        ):
            # transformers renames gradient_checkpointing, which TRL sets by itself.
            warnings.simplefilter("ignore", FutureWarning)
            super().__init__(
                model=model,
                reward_funcs=_no_reward,
                args=_trl_config(model, slow, sampling, total_steps, seed, folder),
                # TRL asks for a dataset; it is never read.
                train_dataset=Dataset.from_dict({"prompt": [""]}),
                processing_class=tokenizer,
            )
            distributed.keep_to_itself(self.accelerator)
            # Over a base of four or eight bits TRL rounds adapters to bfloat16: these would be
            # other weights than those that a version names, and lose most of a small step.
            for weight, data in trained:
                if weight.dtype != data.dtype:
                    weight.data = data
            self.whole = model
            if self.is_fsdp_enabled:
                self.model = self.model_wrapped = copy.deepcopy(model)
            elif distributed.uses_fsdp():
                raise ConfigError(
                    "accelerate cuts models up between several processes with a GPU each; start "
                    "them so, or leave FSDP out of its configuration"
                )
            self._prepare_for_training(total_steps, None, None)
            for part in self.model.modules():
                if isinstance(part, FSDPModule):
                    # The loss is divided by what all processes have, so that gradients add up.
                    part.set_gradient_divide_factor(1.0)
                    part.set_force_sum_reduction_for_comms(True)
            self.masters = MasterWeights(self.optimizer.optimizer)
        # With beta set from the start TRL would load a reference model, or add an adapter.
        self.beta = slow.beta
        self._forwards = [
            (place, original, place.__dict__.get("forward")) for place, original in before
        ]
        self._show(original=True)
        # Where there is dropout, each row draws its own.
        self.pad_id: int = tokenizer.pad_token_id
        # TRL goes by the configuration, which speaks of routers in dense models too (Granite 4).
        self.aux_loss_enabled = self.aux_loss_enabled and _has_routers(model, self.pad_id)
        self._seen_logprobs: Tensor | None = None  # of the micro-batch run last
        self._allowed_BTW: Tensor | None = None  # of the one that is being run
        self._row_temperature = 1.0
        self.has_dropout = any(
            isinstance(m, torch.nn.Dropout) and m.p > 0
            for name, m in model.named_modules()
            if ADAPTERS_DROPOUT in name
        )
        self._is_noisy = _is_noisy(model)
        # FSDP needs the same passes in every process, and beginnings are as the rows are.
        self.continues = (
            can_continue(model)
            and not is_checkpointing(model)  # a training model then has no use for caches
            and not self.has_dropout
            and not self.is_fsdp_enabled
        )
        # Of some kinds TRL's output layer lacks a factor; a copy that is cut up knows no other, and
        # mixtures of experts do not use it.
        self.outputs_as_model = (
            self.is_fsdp_enabled or self.aux_loss_enabled or self._outputs_as_model()
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def begin_training(self) -> None:
        """Put the model into training mode, but for what its own configuration drops or shakes.

        Rows were sampled without that: they would be off policy, and a ratio of 1 wrong. (TRL has
        it on, unless ``disable_dropout`` is set.) Adapters drop what they are told to.
        """
        self.model.train()
        if not self._is_noisy:
            return
        layers = GradientCheckpointingLayer if is_checkpointing(self.model) else ()
        for name, module in self.model.named_modules():
            # The whole is asked by TRL, and a layer by checkpointing, whether it is in training.
            if name and ADAPTERS_DROPOUT not in name and not isinstance(module, layers):
                module.training = False

    @contextmanager
    def cut_up(self) -> Iterator[None]:
        """Inside the block, under FSDP, each process holds its part of the weights only.

        At its end ``whole`` has what became of them. After an error it has no weights: the other
        processes may be elsewhere, and can only be ended.
        """
        if not self.is_fsdp_enabled:
            yield
            return
        pairs = list(zip(self.whole.parameters(), self.model.parameters(), strict=True))
        with torch.no_grad():
            for own, part in pairs:
                if own.requires_grad:  # others may have been put in since the last step
                    part.copy_(distributed.part_like(own.detach(), part))
                own.data = own.new_empty(0)
        yield
        for own, part in pairs:
            own.data = distributed.whole(part).to(own.device).contiguous()

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Inside the block, ``whole`` has TRL's forward, which a copy of it has for good."""
        self._show(original=False)
        try:
            yield
        finally:
            self._show(original=True)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's log-probabilities, with the output layer run at the completions only.

        Without Triton, TRL's fused output layer runs at every position of the prompt as well,
        which for long prompts is most of the work.
        """
        held, routed = self._allowed_BTW is not None, self.aux_loss_enabled
        if held or not self.outputs_as_model or (routed and not self.is_fsdp_enabled):
            return self._own_logps(model, input_ids, attention_mask, logits_to_keep)
        if routed:
            found = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
            self._seen_logprobs = found[0].detach()
            return found
        label_BT = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]
        rows = _rows(input_ids, attention_mask, logits_to_keep)
        with self.accelerator.autocast():
            inputs, at_BT = completion_inputs(
                model, rows, self.pad_id, input_ids.device, continues=self.continues
            )
            with only_at(model, at_BT):
                output = model(**inputs, shift_labels=label_BT, fused_lm_head=True)
        self._seen_logprobs = output.log_probs.detach()
        return output.log_probs, output.entropy, None

    def _own_logps(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same by the model's own output: over what grammars allowed, and with its router loss.

        TRL's knows of no grammars, of some mixtures of experts (GraniteMoe) not what they call
        their experts, and of some models (Inkling) not what they do with their logits.
        """
        if self.is_fsdp_enabled:
            raise TrainingError(
                "answers that were held to a format cannot be trained on under FSDP; set "
                "structured=False"
            )
        # The router loss of a mixture of experts is over all tokens, each once, as TRL's is.
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        label_BT = input_ids.masked_fill(attention_mask == 0, -100)[:, -logits_to_keep:]
        rows = _rows(input_ids, attention_mask, logits_to_keep)
        with self.accelerator.autocast():
            continues = self.continues and not routed
            inputs, at_BT = completion_inputs(
                model, rows, self.pad_id, input_ids.device, continues=continues
            )
            inputs |= routed
            asked = label_BT, self._allowed_BTW, self._row_temperature
            logprob_BT, entropy_BT, aux_loss = chosen_logprobs(
                model, self.pad_id, inputs, at_BT, *asked
            )
        self._seen_logprobs = logprob_BT.detach()
        return logprob_BT, entropy_BT, aux_loss

    @torch.no_grad()
    def _outputs_as_model(self) -> bool:
        """Whether TRL's output layer gives what the model does, on a few tokens."""
        self.outputs_as_model, training = True, self.whole.training
        ids_1T = torch.arange(PROBED + 1, device=self.whole.device)[None]
        asked = self.whole, ids_1T, torch.ones_like(ids_1T), PROBED
        self._row_temperature = self.temperature
        self.whole.eval()
        try:
            own_1T = self._own_logps(*asked)[0]
            with self.fused():
                found_1T = self._get_per_token_logps_and_entropies(*asked)[0]
        finally:
            self.whole.train(training)
            self._row_temperature = 1.0
        return (found_1T - own_1T).abs().mean().item() < DIFFERS

    @contextmanager
    def _as_sampled(self, model: Any, batch: Batch) -> Iterator[None]:
        """Inside the block log-probabilities are of a batch's temperature, over what it allowed."""
        place, temperature = _unwrapped(model), batch["temperature"]
        before = place.forward
        self._allowed_BTW, self._row_temperature = batch.get("allowed"), temperature
        if temperature != self.temperature:
            cast = self.args.cast_lm_head_to_fp32
            add_fused_lm_head(place, temperature, cast, outputs=("log_probs", "entropy"))
        try:
            yield
        finally:
            place.forward = before
            self._allowed_BTW = None

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities of a batch's completions under the weights now in the model."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        keep = batch["completion_ids"].size(1)
        with self._as_sampled(self.whole, batch):
            return self._get_per_token_logps_and_entropies(self.whole, ids, mask, keep)[0]

    def accumulate(
        self,
        batches: Sequence[Batch],
        rows: int,
        tokens: int,
        idle: Sequence[Batch] = (),
    ) -> Gradients:
        """Forward and backward over the micro-batches of one optimizer step.

        Args:
            batches: The micro-batches, as ``collate`` makes them; of any number and size.
            rows, tokens: Rows and completion tokens of the whole step, those left out of
                ``batches`` for an advantage of 0 included: the loss is divided by them.
            idle: Run as well, to no effect: under FSDP every process has to take part in every
                forward and backward pass.
        """
        loss, measured = 0.0, {"entropy": 0.0, "clip": 0.0, "drift": 0.0}
        seen = sum(int(batch["completion_mask"].sum()) for batch in batches)
        for batch in batches:
            own_rows, own_tokens = len(batch["advantages"]), int(batch["completion_mask"].sum())
            value = self._loss(batch, self._parts(rows / own_rows, tokens / own_tokens))
            self.accelerator.backward(value)
            loss += value.item()
            metrics = self._metrics["train"]
            measured["entropy"] += metrics["entropy"][-1] * own_tokens / seen
            clips = [metrics[name][-1] for name in CLIP_METRICS if name in metrics]
            measured["clip"] += sum(clips) * own_tokens / seen
            measured["drift"] += self._drift(batch) / seen
        for batch in idle:
            self.accelerator.backward(0 * self._loss(batch, 1))
        self._metrics["train"].clear()
        return Gradients(loss, measured["entropy"], measured["clip"], measured["drift"])

    def save_memory(self) -> bool:
        """From here on keep few activations and run layers again on the way back.

        It costs about a third of the step's time, so it is the last resort. Returns whether the
        model can, and did not already.
        """
        if not self.model.supports_gradient_checkpointing or is_checkpointing(self.model):
            return False
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.continues = False
        return True

    def _loss(self, batch: Batch, parts: float) -> Tensor:
        """TRL's loss of a micro-batch, of which there are so many in the step."""
        self.current_gradient_accumulation_steps = parts
        # TRL divides the tokens by the processes, to make up for DDP's mean over them.
        all_tokens = int(batch["completion_mask"].sum()) * self.accelerator.num_processes
        part = torch.tensor(all_tokens, device=self.args.device)
        self._metrics["train"].clear()
        with self.compute_loss_context_manager(), self._as_sampled(self.model, batch):
            return self._compute_loss(self.model, {**batch, "num_items_in_batch": part})

    def _drift(self, batch: Batch) -> float:
        """Sum over the tokens of a micro-batch that was just run; 0 where none were kept."""
        if self._seen_logprobs is None or not bool(batch["sampled_logprobs"].any()):
            return 0.0
        difference_BT = (self._seen_logprobs - batch["sampled_logprobs"]).abs()
        return (difference_BT * batch["completion_mask"]).sum().item()

    def _parts(self, row_parts: float, token_parts: float) -> float:
        """How many micro-batches of this size make up the step, in the loss's own measure.

        TRL takes them to be of equal size, so that it is the number of micro-batches; with these
        numbers the loss of the whole step does not depend on how it is cut.
        """
        return token_parts if self.loss_type in TOKEN_MEAN_LOSSES else row_parts

    def _show(self, *, original: bool) -> None:
        for place, before, patched in self._forwards:
            forward = before if original else patched
            if forward is None:
                place.__dict__.pop("forward", None)
            else:
                place.forward = forward


def collate(
    rows: Sequence[TrainingRow],
    pad_id: int,
    device: torch.device,
    allowed_NW: Tensor | None = None,
) -> dict[str, Any]:
    """Rows as the tensors TRL's loss reads: prompts padded on the left, completions on the right.

    The rows are on policy: the importance ratio is 1 by construction and no old log-probabilities
    are given, as in the stock trainer.

    Args:
        rows: Sampled at one temperature.
        allowed_NW: What their grammars allowed at each token (``allowed_tokens``).
    """
    (temperature,) = {row.temperature for row in rows}
    prompt_ids, prompt_mask = left_padded([row.prompt_ids_T for row in rows], pad_id, device)
    completions = [row.completion_ids_T for row in rows]
    completion_ids, completion_mask = right_padded(completions, pad_id, device)
    logprob_BT = torch.zeros(completion_ids.shape)
    for row, logprob_T in zip(rows, logprob_BT, strict=True):
        logprob_T[: len(row.logprobs_T)] = torch.tensor(row.logprobs_T)
    held = {}
    if allowed_NW is not None:
        allowed_BTW = allowed_NW.new_full((*completion_ids.shape, allowed_NW.shape[1]), -1)
        allowed_BTW[completion_mask.bool().cpu()] = allowed_NW
        held["allowed"] = allowed_BTW.to(device)
    advantage_B = torch.tensor([row.advantage for row in rows], device=device)
    return held | {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantage_B,
        "sampled_logprobs": logprob_BT.to(device),
        "temperature": temperature,
    }


def _trl_config(
    model: Any,
    slow: SlowConfig,
    sampling: SamplingConfig,
    total_steps: int,
    seed: int,
    folder: str,
) -> GRPOConfig:
    schedule = slow.lr_scheduler_type
    if schedule == "constant" and slow.warmup_steps:  # which transformers would leave out
        schedule = "constant_with_warmup"
    args = GRPOConfig(
        output_dir=folder,
        max_steps=total_steps,
        learning_rate=slow.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=slow.warmup_steps,
        max_grad_norm=slow.max_grad_norm,
        weight_decay=slow.weight_decay,
        loss_type=slow.loss_type,
        epsilon=slow.epsilon,
        epsilon_high=slow.epsilon_high,
        entropy_coef=slow.entropy_coef,
        temperature=sampling.temperature,
        max_completion_length=sampling.max_tokens or TRL_MAX_COMPLETION,
        # The rows of a step come in one batch, cut up by us.
        per_device_train_batch_size=2,
        num_generations=2,
        steps_per_generation=1,
        gradient_accumulation_steps=1,
        use_cpu=model.device.type != "cuda",
        bf16=computes_in_bfloat16(model),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    if distributed.uses_fsdp():
        # Or accelerate would turn the weights that it cuts up into float32: MasterWeights has such.
        args.mixed_precision = "no"
    return on_device(args, model.device)


def _rows(
    input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row, without padding."""
    ids_BT, seen_BT = input_ids.cpu(), attention_mask.bool().cpu()  # to wait but once
    own = [ids[seen].tolist() for ids, seen in zip(ids_BT, seen_BT, strict=True)]
    length_B = seen_BT[:, -logits_to_keep:].sum(1).tolist()
    return [(ids[:-length], ids[-length:]) for ids, length in zip(own, length_B, strict=True)]


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


@torch.no_grad()
def _has_routers(model: Any, pad_id: int) -> bool:
    """Whether a model gives a router loss where it is asked for one."""
    ids_11 = torch.tensor([[pad_id]], device=model.device)
    try:
        return model(input_ids=ids_11, output_router_logits=True).aux_loss is not None
    except (AttributeError, IndexError, TypeError):  # as many ways as there are to have none
        return False


def _is_noisy(model: Any) -> bool:
    """Whether by its configuration a model in training drops activations or shakes its routers."""
    settings = model.config.get_text_config().to_dict()
    return any(
        isinstance(value, float) and value > 0
        for name, value in settings.items()
        if "drop" in name or "jitter" in name
    )


def _no_reward(completions: Sequence[Any], **_: Any) -> list[float | None]:
    """TRL asks for a reward function; the rows come with their advantages."""
    return [0.0] * len(completions)
