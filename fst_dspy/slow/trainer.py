"""The slow channel: GRPO on the local model, one optimizer step at a time (paper, section 3).

A step takes the rows of one batch of rollouts. Sampled from the weights as they are, it is on
policy: the importance ratio is 1 and the step is that of TRL's stock ``GRPOTrainer``. The output
layer is run at the completions only, and what prompts have in common is run once, so that large
batches sum their gradient in another order: then gradients differ by float rounding (1e-7 of their
norm), and on small ones not at all.
Optimizer, schedule and random numbers go on from step to step whatever runs between.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.errors import ModelError, StoreError, TrainingError
from fst_dspy.model.graph_decode import release
from fst_dspy.model.hardware import (
    as_current,
    cudnn_attention,
    free_memory,
    give_back_memory,
    is_out_of_memory,
)
from fst_dspy.model.logprobs import read_of
from fst_dspy.model.policy import Policy
from fst_dspy.model.prefixes import (
    PACKED_TOKENS,
    Bin,
    tokens_of,
    worthwhile_bins,
    worthwhile_prefixes,
)
from fst_dspy.model.sampling import allowed_tokens
from fst_dspy.model.sizes import training_tokens
from fst_dspy.slow.learning_rate import with_learning_rate
from fst_dspy.slow.master_weights import PREFIX as MASTERS
from fst_dspy.slow.training_state import SCHEMA_VERSION, TrainingState
from fst_dspy.slow.trl_stepper import Gradients, SteppedGRPOTrainer, collate
from fst_dspy.types import StepStats, TrainingRow

logger = logging.getLogger(__name__)

MICRO_BATCH_TOKENS, CUDA_MICRO_BATCH_TOKENS = 16_384, 65_536
"""Most tokens of a micro-batch, padding included, where memory holds them; fewer rows than
``micro_batch_size`` where they are long."""
MICRO_BATCH_ROWS = 16
"""Rows of a micro-batch, unless ``micro_batch_size`` says otherwise or a GPU holds more."""
DRIFT_LIMIT = 0.1
"""Nats a token between sampling and training, above which there is a warning; bfloat16 is below."""

DROPPED = ": adapters drop activations as they are trained; set dropout to 0 in lora"


class SlowTrainer:
    """Advances a policy's weights, and can be saved and gone on with.

    The policy's adapters, where it has any, must be in place before. Its weights are updated in
    place and its ``step`` is counted on.

    Attributes:
        slow: The settings, with the learning rate that is used.
        bad_steps: Steps in a row up to now whose loss or gradient was not finite; it goes on from
            cycle to cycle and is saved. Steps on constant groups, which show nothing, are passed
            over. Whoever drives the trainer stops at ``slow.max_bad_steps``.
    """

    def __init__(
        self,
        policy: Policy,
        slow: SlowConfig,
        sampling: SamplingConfig,
        total_steps: int,
        seed: int,
    ) -> None:
        """Make optimizer and schedule; takes well under a second and writes nothing.

        Args:
            policy: Whose weights are trained.
            slow, sampling: The settings; of ``sampling`` only ``max_tokens``, which the ``dr_grpo``
                loss reads: rows have temperatures of their own.
            total_steps: Length of the learning rate schedule, in optimizer steps.
            seed: Seed of the adapters' dropout.
        """
        slow = with_learning_rate(slow, policy.model)
        self.policy, self.slow, self.seed = policy, slow, seed
        self.bad_steps = 0
        cuda = policy.device.type == "cuda"
        self._most_tokens = training_tokens(
            policy.model.config,
            policy.model.dtype.itemsize,
            free_memory(policy.device),
            CUDA_MICRO_BATCH_TOKENS if cuda else MICRO_BATCH_TOKENS,
        )
        self.micro_batch_size = slow.micro_batch_size or (
            self._most_tokens if cuda else MICRO_BATCH_ROWS
        )
        self._most_rows = self.micro_batch_size  # of the micro-batches that were made last
        self._all_count = bool(slow.beta or slow.entropy_coef)
        with policy.lock:
            self._trl = SteppedGRPOTrainer(
                policy.model, policy.tokenizer, slow, sampling, total_steps, seed
            )
            policy.model.eval()
            if slow.beta and policy.lora is None and policy.version() == policy.base_version:
                policy.keep()  # the reference, so that it need not be read again
        self._rng = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if cuda:
            generator = torch.Generator(policy.device).manual_seed(seed)
            self._rng["cuda"] = generator.get_state()

    def advance(self, rows: Sequence[TrainingRow]) -> StepStats:
        """Take exactly one optimizer step on the rows.

        No step is taken, weights and optimizer stay untouched, and ``skipped`` says why when all
        advantages are 0 and there is neither KL penalty nor entropy bonus (``"constant"``; loss and
        norm are then 0 and the entropy is estimated from the sampling log-probabilities), or when
        loss or gradient is not finite (``"non_finite"``; what is not finite is reported as 0).

        The schedule of the learning rate goes on after a constant step, as in TRL, where it is a
        step like others with a gradient of 0: a decay then ends when the steps do. It does not
        after one that is not finite, as in transformers, which leaves out the schedule's step
        along with the optimizer's; a warm-up is not over before the steps it is there for.

        Rows with advantage 0 have no gradient without penalty or bonus: they count in the loss's
        normaliser, but are not run, and the entropy is that of the others.

        Args:
            rows: Any number, each with a completion, sampled from the weights as they are. The loss
                of each is taken at its own temperature, above 0.
                Several processes are given the same rows and share them out.

        Raises:
            TrainingError: A row without completion tokens or of temperature 0, the adapters were
                changed, or memory runs out on a single row or while the weights move. Where it runs
                out on several, ``micro_batch_size`` is halved and the step taken again.
        """
        self._check(rows)
        live_rows = [row for row in rows if row.has_gradient or self._all_count]
        if not live_rows:
            return self._pass_over(rows, Gradients(0.0, sampled_entropy(rows), 0.0))
        while True:
            try:
                return self._step(rows, live_rows)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batch(error)

    def _step(self, rows: Sequence[TrainingRow], live_rows: Sequence[TrainingRow]) -> StepStats:
        with self._ready():
            own_rows = distributed.own_share(live_rows, row_tokens)
            batches, idle = self._batches(live_rows, own_rows)
            with self._trl.cut_up(), self._at_rest_afterwards():
                gradients = self._accumulate(rows, batches, idle)
                gradients = self._over_processes(gradients, own_rows)
                live = sum(row.has_gradient for row in rows)
                return self._update(rows, gradients, self._live_share(live, len(rows)))

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Inside the block the policy is the trainer's, and TRL's loss can be taken."""
        attention = cudnn_attention(self.policy.device, False)
        current = as_current(self.policy.device)
        with self.policy.lock, current, self._trl.fused(), self._own_rng(), attention:
            yield

    def _batches(
        self, live_rows: Sequence[TrainingRow], own_rows: Sequence[TrainingRow]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """A process's micro-batches, and what it runs while others have more."""
        batches = self._micro_batches(own_rows)
        idle = self._idle(live_rows, len(batches))
        if self.slow.beta:
            self._add_reference([*batches, *idle])
        return batches, idle

    def _accumulate(
        self,
        rows: Sequence[TrainingRow],
        batches: Sequence[dict[str, Any]],
        idle: Sequence[dict[str, Any]],
    ) -> Gradients:
        """TRL's loss of a process's micro-batches, forward and backward."""
        self._trl.begin_training()
        return self._trl.accumulate(batches, len(rows), completion_tokens(rows), idle)

    @contextmanager
    def _at_rest_afterwards(self) -> Iterator[None]:
        """After the block, however it ends, the model has no gradients and samples as before."""
        try:
            yield
        finally:
            self._trl.model.zero_grad()
            self._trl.model.eval()
            give_back_memory()

    def state(self) -> TrainingState:
        """Trained weights, optimizer, schedule and random state, not copied where it is not needed.

        Under FSDP all processes take part, as each has its part of the optimizer's state. Those
        that write nothing get a state without tensors.
        """
        with self.policy.lock:
            optimizer, main = self._trl.optimizer.state_dict(), distributed.is_main()
            moments = {
                f"{index}.{key}": tensor
                for index, state in optimizer["state"].items()
                for key, tensor in state.items()
            }
            kept = {}
            for name, tensor in (moments | self._trl.masters.state()).items():
                put_together = distributed.whole(tensor)
                if main:
                    kept[name] = put_together.detach().cpu()
            return TrainingState(
                weights=self.policy.trainable_state(copy=False) if main else {},
                optimizer=kept,
                rng=dict(self._rng),
                scalars={
                    "schema_version": SCHEMA_VERSION,
                    "step": self.policy.step,
                    "bad_steps": self.bad_steps,
                    "learning_rates": [group["lr"] for group in optimizer["param_groups"]],
                    "scheduler": _plain(self._trl.lr_scheduler.state_dict()),
                },
                live=self.policy.device.type == "cpu",
            )

    def load(self, folder: Path) -> TrainingState:
        """Go on from what ``state().write`` wrote, bit for bit, on a trainer of the same settings.

        Returns:
            What was read.

        Raises:
            StoreError: A file is missing or unreadable, or belongs to another model.
        """
        state = TrainingState.read(folder)
        scalars, tensors = state.scalars, dict(state.optimizer)
        with self.policy.lock:
            try:
                self.policy.load_trainable_state(state.weights)
            except ModelError as error:
                raise StoreError(f"{folder} is of another model: {error}") from error
            self._load_optimizer(tensors, scalars["learning_rates"])
            self._trl.masters.load(tensors)
            self._trl.lr_scheduler.load_state_dict(dict(scalars["scheduler"]))
            # It may have been saved on a GPU and go on without one, or the other way round.
            self._rng |= {device: own for device, own in state.rng.items() if device in self._rng}
            self.policy.step = scalars["step"]
            self.bad_steps = scalars.get("bad_steps", 0)  # earlier versions did not count
        return state

    # --- inside -----------------------------------------------------------------------------------

    def _check(self, rows: Sequence[TrainingRow]) -> None:
        if not all(row.completion_ids_T for row in rows):
            raise TrainingError("a training row has no completion; leave such rows out")
        if not all(row.temperature > 0 for row in rows):
            raise TrainingError("a training row is greedy, without a gradient; leave such rows out")
        if self._trl.whole is not self.policy.model:
            raise TrainingError("the policy's adapters were changed; make a new SlowTrainer")
        sampled = [(row.completion_ids_T, row.advantage) for row in rows]
        distributed.check_same("training rows", sampled)

    def _halve_micro_batch(self, error: BaseException) -> None:
        """After memory ran out: weights and optimizer are as before the step."""
        if self._trl.is_fsdp_enabled:
            raise TrainingError(
                "memory ran out in the middle of a step that FSDP shares out; go on from the last "
                "checkpoint with a smaller micro_batch_size, or begin anew with more processes"
            ) from error
        if release(self.policy):
            logger.warning("memory ran out; going on without what decoding had kept")
            return
        if self.micro_batch_size == 1 and self._trl.save_memory():
            logger.warning("memory ran out on a single row; going on with activation checkpointing")
            return
        if self.micro_batch_size == 1:
            raise TrainingError(
                "memory ran out on a single row; shorten prompts or max_tokens, use lora=True, or "
                "a smaller model"
            ) from error
        self.micro_batch_size = max(1, min(self.micro_batch_size, self._most_rows) // 2)
        self._most_tokens //= 2
        logger.warning("memory ran out; going on with micro_batch_size=%d", self.micro_batch_size)
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def _micro_batches(self, rows: Sequence[TrainingRow]) -> list[dict[str, Any]]:
        """The rows in micro-batches of one temperature each, as TRL's output layer has but one."""
        parts: list[list[TrainingRow]] = []
        for temperature in dict.fromkeys(row.temperature for row in rows):
            parts += self._cut([row for row in rows if row.temperature == temperature])
        self._most_rows = max(map(len, parts), default=0)
        pad_id, device = self.policy.tokenizer.pad_token_id, self.policy.device
        return [collate(part, pad_id, device, allowed_tokens(self.policy, part)) for part in parts]

    def _cut(self, rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        """At least one row, in parts that are not too large."""
        read_N = read_of([(row.prompt_ids_T, row.completion_ids_T) for row in rows])
        # Rows are not counted, unless they are asked to be: it is their tokens that take memory.
        most_rows = self.micro_batch_size if self.slow.micro_batch_size else len(rows)
        bins = None
        if self._trl.continues and min(len(row.prompt_ids_T) for row in rows) > 1:
            bins = worthwhile_bins(self.policy.model, read_N, most_rows)
        if bins is not None:
            parts = self._cut_bins(bins, read_N, most_rows)
            return [[rows[number] for part in own for number in part.rows] for own in parts]
        size = self.micro_batch_size
        if len(rows) > size or _padded_tokens(rows) > self._most_tokens:
            # Rows of like length together need the least padding; one batch keeps its order.
            prompts = [row.prompt_ids_T for row in rows]
            shared = self._trl.continues and worthwhile_prefixes(prompts) is not None
            rows = sorted(rows, key=_alike if shared else row_tokens)
        cut: list[list[TrainingRow]] = [[]]
        for row in rows:
            part = cut[-1]
            if part and (len(part) == size or _padded_tokens([*part, row]) > self._most_tokens):
                cut.append([])
            cut[-1].append(row)
        return cut

    def _cut_bins(
        self, bins: Sequence[Bin], read_N: Sequence[tuple[int, ...]], most_rows: int
    ) -> list[list[Bin]]:
        most_tokens = self._most_tokens
        if self.policy.device.type == "cpu":
            most_tokens = min(most_tokens, PACKED_TOKENS)
        parts: list[list[Bin]] = [[]]
        for part in bins:
            longer = [*parts[-1], part]
            many = sum(len(each.rows) for each in longer) > most_rows
            if parts[-1] and (many or tokens_of(longer, read_N) > most_tokens):
                parts.append([])
            parts[-1].append(part)
        return parts

    def _idle(self, rows: Sequence[TrainingRow], own: int) -> list[dict[str, Any]]:
        """Under FSDP, what a process runs while others still have micro-batches of their own."""
        if not self._trl.is_fsdp_enabled:
            return []
        return self._micro_batches(rows[:1]) * (distributed.most(own) - own)

    def _add_reference(self, batches: Sequence[dict[str, Any]]) -> None:
        with self.policy.at(self.policy.base_version):
            for batch in batches:
                batch["ref_per_token_logps"] = self._trl.reference_logprobs(batch)

    def _over_processes(self, own: Gradients, own_rows: Sequence[TrainingRow]) -> Gradients:
        """The gradients of all processes added up, and what was measured over all their tokens."""
        if distributed.processes() == 1:
            return own
        tokens = completion_tokens(own_rows)
        means = [own.entropy, own.clip_share, own.drift, 1.0]
        figures = [own.loss, *(mean * tokens for mean in means)]
        figures_5 = torch.tensor(figures, dtype=torch.float64, device=self.policy.device)
        weights = [] if self._trl.is_fsdp_enabled else self._trl.parameters  # FSDP has added up
        figures_5 = distributed.sum_gradients(weights, figures_5)
        loss, *sums, all_tokens = figures_5.tolist()
        return Gradients(loss, *(total / all_tokens for total in sums))

    def _update(
        self, rows: Sequence[TrainingRow], gradients: Gradients, shorten: float = 1.0
    ) -> StepStats:
        trl = self._trl
        if gradients.drift > DRIFT_LIMIT:
            logger.warning(
                "sampling and training disagree by %.3f nats a token on the log-probabilities of "
                "the same weights; the step is not quite on policy%s",
                gradients.drift,
                DROPPED if trl.has_dropout else "",
            )
        limit = self.slow.max_grad_norm or math.inf
        norm = distributed.whole(torch.nn.utils.clip_grad_norm_(trl.parameters, limit)).item()
        if not (math.isfinite(gradients.loss) and math.isfinite(norm)):
            self.bad_steps += 1
            return self._stats(rows, gradients, norm, "non_finite")
        self.bad_steps = 0
        with self._rates_times(shorten):
            stats = self._stats(rows, gradients, norm, None)
            self._move()
        trl.lr_scheduler.step()
        self.policy.step += 1
        return stats

    def _move(self) -> None:
        """The optimizer's step, which cannot be taken again: some weights have moved by then."""
        try:
            self._trl.optimizer.step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                "memory ran out in the middle of an optimizer's step, where fewer rows at a time "
                "are of no help; go on from the last checkpoint on a larger machine, or train "
                "adapters (lora=True) or a smaller model"
            ) from error

    def _pass_over(self, rows: Sequence[TrainingRow], seen: Gradients) -> StepStats:
        """A step that has no gradient: only the schedule goes on."""
        stats = self._stats(rows, seen, 0.0, "constant")
        with warnings.catch_warnings():
            # torch takes it for a mistake where the optimizer has taken no step before.
            warnings.simplefilter("ignore", UserWarning)
            self._trl.lr_scheduler.step()
        return stats

    def _live_share(self, live: int, rows: int) -> float:
        """What a step is shortened to, in (0, 1], where so many of its rows say something."""
        if self._all_count or not self.slow.damp_constant:
            return 1.0
        return math.sqrt(live / rows)

    @contextmanager
    def _rates_times(self, factor: float) -> Iterator[None]:
        """Multiplied learning rates for one step; the schedule goes on from its own."""
        groups = self._trl.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        yield
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _stats(
        self, rows: Sequence[TrainingRow], seen: Gradients, norm: float, skipped: str | None
    ) -> StepStats:
        return StepStats(
            loss=_finite(seen.loss),
            grad_norm=_finite(norm),
            learning_rate=self._trl.optimizer.param_groups[0]["lr"],
            entropy=_finite(seen.entropy),
            clip_share=_finite(seen.clip_share),
            rows=len(rows),
            drift=_finite(seen.drift),
            skipped=skipped,
        )

    def _load_optimizer(self, tensors: dict[str, Tensor], learning_rates: list[float]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        weights = [w for group in self._trl.optimizer.param_groups for w in group["params"]]
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            if index != MASTERS:
                weight = weights[int(index)]
                if tensor.shape == weight.shape:  # the count of steps is a single number
                    tensor = distributed.part_like(tensor, weight)
                state.setdefault(int(index), {})[key] = tensor
        groups = self._trl.optimizer.state_dict()["param_groups"]
        for group, learning_rate in zip(groups, learning_rates, strict=True):
            group["lr"] = learning_rate
        self._trl.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Dropout draws from the trainer's own stream, whatever else draws between steps."""
        device = self.policy.device
        with torch.random.fork_rng([device] if "cuda" in self._rng else []):
            torch.set_rng_state(self._rng["cpu"])
            if "cuda" in self._rng:
                torch.cuda.set_rng_state(self._rng["cuda"], device)
            if distributed.processes() > 1:
                # What is saved is process 0's stream: each step begins a new one everywhere.
                torch.manual_seed(hash((self.seed, self.policy.step, distributed.rank())))
            yield
            self._rng["cpu"] = torch.get_rng_state()
            if "cuda" in self._rng:
                self._rng["cuda"] = torch.cuda.get_rng_state(device)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def completion_tokens(rows: Sequence[TrainingRow]) -> int:
    """Completion tokens of some rows."""
    return sum(len(row.completion_ids_T) for row in rows)


def row_tokens(row: TrainingRow) -> int:
    """Tokens of a row, prompt and completion."""
    return len(row.prompt_ids_T) + len(row.completion_ids_T)


def _alike(row: TrainingRow) -> tuple[int, tuple[int, ...]]:
    """Sorts by prompt within completions of up to 2, 4, 8, ... tokens."""
    return (len(row.completion_ids_T) - 1).bit_length(), row.prompt_ids_T


def _padded_tokens(rows: Sequence[TrainingRow]) -> int:
    """Of a micro-batch, whose prompts and completions are padded each to the longest."""
    prompt = max((len(row.prompt_ids_T) for row in rows), default=0)
    completion = max((len(row.completion_ids_T) for row in rows), default=0)
    return len(rows) * (prompt + completion)


def sampled_entropy(rows: Sequence[TrainingRow]) -> float:
    """Mean of ``-log p`` over sampled tokens: unbiased for the entropy of what they came from."""
    logprobs = [logprob for row in rows for logprob in row.logprobs_T]
    return -sum(logprobs) / len(logprobs) if logprobs else 0.0


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state as JSON holds it; its functions are made anew from the settings."""
    return {key: value for key, value in state.items() if key != "lr_lambdas"} | (
        {"lr_lambdas": [None] * len(state["lr_lambdas"])} if "lr_lambdas" in state else {}
    )
