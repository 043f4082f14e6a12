"""Steps with a teacher: the policy's own completions, read again by one who knows more.

The teacher is weights of the same model under another prompt: one with the metric's feedback in it
(``fst_dspy.loop.self_teacher``), or an evolved one (``fst_dspy.distill``). On what the policy
sampled it is moved towards the teacher's next-token distributions, token by token, at the
temperature each was sampled at, exactly over the vocabulary or what a format left of it (Agarwal et
al., 2024, "On-policy distillation of language models"). Reading costs no rollouts. The rewards may
have their say beside it, as GRPO's advantages.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.model.hardware import as_current, is_out_of_memory
from fst_dspy.model.logprobs import (
    CHUNK_BYTES,
    completion_states,
    logprobs_of,
    output_layer,
    state_bytes,
    vocabulary_parts,
    with_output_layer,
)
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import (
    MICRO_BATCH_ROWS,
    SlowTrainer,
    completion_tokens,
    row_tokens,
    sampled_entropy,
)
from fst_dspy.slow.trl_stepper import Gradients
from fst_dspy.types import StepStats, TrainingRow, Untaught

logger = logging.getLogger(__name__)

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Of two sets of log-probabilities, N x V each, in nats, summed over N."""


@dataclass(frozen=True)
class Reading:
    """One completion of the policy's, under its own prompt and under the teacher's.

    Attributes:
        student, teacher: Rows with the same completion; the temperature of a greedy one is 0.
    """

    student: TrainingRow
    teacher: TrainingRow

    @classmethod
    def under(
        cls, prompt_ids_T: tuple[int, ...], student: TrainingRow, most: int
    ) -> Self | Literal["long"]:
        """A row read under another prompt, unless that makes it longer than ``most`` tokens."""
        teacher = replace(student, prompt_ids_T=prompt_ids_T)
        return cls(student, teacher) if row_tokens(teacher) <= most else "long"


@dataclass(frozen=True)
class Readings:
    """What could be read of some rollouts.

    Attributes:
        found: One for each call that could be.
        untaught: How many could not, by reason.
    """

    found: Sequence[Reading]
    untaught: Mapping[Untaught, int]

    @classmethod
    def of(cls, made: Sequence[Reading | Untaught]) -> Self:
        """Those that there are, and the reasons of the others counted."""
        found = [reading for reading in made if isinstance(reading, Reading)]
        return cls(found, Counter(why for why in made if not isinstance(why, Reading)))


class TaughtTrainer(SlowTrainer):
    """The slow channel's optimizer, schedule and checkpoints, with a teacher's say in the loss.

    Where the teacher is read dropout is off, as in TRL's distillation trainers.

    Args:
        policy, slow, sampling, total_steps, seed: As for
            :class:`~fst_dspy.slow.trainer.SlowTrainer`.
        teaching: ``with teaching():`` puts the teacher's weights into the policy.
        divergence: What a step lowers, of the student's log-probabilities and the teacher's.

    Raises:
        ConfigError: accelerate is set up for FSDP.
    """

    def __init__(
        self,
        policy: Policy,
        slow: SlowConfig,
        sampling: SamplingConfig,
        total_steps: int,
        seed: int,
        *,
        teaching: Callable[[], AbstractContextManager[None]],
        divergence: Divergence,
    ) -> None:
        distributed.refuse_fsdp("a teacher of the weights (distillation, or slow_signal)")
        super().__init__(policy, slow, sampling, total_steps, seed)
        self._teaching, self._divergence = teaching, divergence
        self._reading_rows = slow.micro_batch_size or MICRO_BATCH_ROWS

    def imitate(
        self, readings: Sequence[Reading], rows: Sequence[TrainingRow] = (), weight: float = 1.0
    ) -> StepStats:
        """Take exactly one optimizer step towards the teacher, and by the rows' advantages.

        As in ``advance``, a loss or gradient that is not finite is dropped, several processes share
        the work out, and where memory runs out the micro-batches are halved. Where there is nothing
        to go by, or the student is the teacher to the last bit, no step is taken (``"constant"``).

        Args:
            readings: Sampled from the live weights; their students may be among ``rows``.
            rows: All that were sampled, where rewards count as well.
            weight: Of the teacher, in (0, 1]; advantages have the rest.

        Returns:
            ``lesson`` is the divergence from the teacher before the step, nats a token read.
        """
        counted = rows or [reading.student for reading in readings]
        self._check(rows)
        sampled = [reading.student.completion_ids_T for reading in readings]
        distributed.check_same("readings", sampled)
        if not rows:  # on a GPU there may be more, of which only some logits are held
            self.micro_batch_size = self._reading_rows
        by_reward = [replace(row, advantage=(1 - weight) * row.advantage) for row in rows]
        live_rows = [row for row in by_reward if row.has_gradient or self._all_count]
        read = {id(reading.student) for reading in readings}
        pairs = zip(rows, by_reward, strict=True)
        live = sum(own.has_gradient or id(row) in read for row, own in pairs)
        if not (live_rows or readings):
            return self._pass_over(rows, Gradients(0.0, sampled_entropy(rows), 0.0))
        shorten = self._live_share(live, len(rows)) if rows else 1.0
        while True:
            try:
                return self._taught_step(counted, live_rows, readings, weight, shorten)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_readings(error, len(readings))

    # --- inside -----------------------------------------------------------------------------------

    def _taught_step(
        self,
        counted: Sequence[TrainingRow],
        live_rows: Sequence[TrainingRow],
        readings: Sequence[Reading],
        weight: float,
        shorten: float,
    ) -> StepStats:
        own_rows = distributed.own_share(live_rows, row_tokens)
        own_readings = distributed.own_share(readings, _reading_tokens)
        students = [reading.student for reading in own_readings]
        current = as_current(self.policy.device)
        with self.policy.lock, current, self._at_rest_afterwards():
            scored = told = Gradients(0.0, 0.0, 0.0)
            if own_rows:
                with self._ready():
                    scored = self._accumulate(counted, *self._batches(live_rows, own_rows))
                self._trl.model.eval()
            if own_readings:
                told = self._read(own_readings, weight / completion_tokens(counted))
            gradients = _together(
                scored, completion_tokens(own_rows), told, completion_tokens(students)
            )
            gradients = self._over_processes(gradients, [*own_rows, *students])
            if gradients.loss == 0 and not live_rows:
                # What is left of the gradient is rounding, which Adam would blow up.
                return self._pass_over(counted, gradients)
            stats = self._update(counted, gradients, shorten)
            return replace(stats, lesson=self._lesson(told.loss, students, counted, weight))

    def _halve_readings(self, error: BaseException, count: int) -> None:
        """After memory ran out, which may have been in either part of the step."""
        at_once = min(self._reading_rows, count)
        if at_once > 1:
            self._reading_rows = at_once // 2
        if at_once > 1 and self.micro_batch_size == 1:
            logger.warning("memory ran out; going on with %d read at once", self._reading_rows)
        else:
            self._halve_micro_batch(error)

    def _lesson(
        self,
        loss: float,
        students: Sequence[TrainingRow],
        counted: Sequence[TrainingRow],
        weight: float,
    ) -> float:
        """The divergence a token read, over all processes."""
        own_2 = torch.tensor([loss, completion_tokens(students)], dtype=torch.float64)
        if distributed.processes() > 1:
            own_2 = distributed.sum_gradients([], own_2.to(self.policy.device))
        total, tokens = own_2.tolist()
        return float(total) * completion_tokens(counted) / weight / max(1, tokens)

    def _read(self, readings: Sequence[Reading], scale: float) -> Gradients:
        """The teacher's part, forward and backward; the summed divergence is multiplied."""
        loss = entropy = 0.0
        for chunk in self._chunks(readings):
            # The teacher reads a whole chunk at once, to swap its weights in as rarely as can be.
            with self._teaching(), torch.no_grad(), self._precision():
                layer = output_layer(self.policy)
                states = [
                    completion_states(self.policy, [r.teacher for r in batch]) for batch in chunk
                ]
            for batch, teacher_ND in zip(chunk, states, strict=True):
                rows = [reading.student for reading in batch]
                with self._precision():
                    student_ND = completion_states(self.policy, rows)
                # What is over the vocabulary is made and differentiated some tokens at a time.
                leaf_ND = student_ND.detach().requires_grad_()
                for part, temperature_n, allowed_nW in vocabulary_parts(self.policy, rows):
                    asked = temperature_n, allowed_nW
                    with (
                        torch.no_grad(),
                        self._precision(),
                        with_output_layer(self.policy, layer),
                    ):
                        teacher_nV = logprobs_of(self.policy, teacher_ND[part], *asked)
                    with self._precision():
                        student_nV = logprobs_of(self.policy, leaf_ND[part], *asked)
                    value = scale * self._divergence(student_nV, teacher_nV)
                    value.backward()
                    loss += value.item()
                    entropy += torch.special.entr(student_nV.detach().exp()).sum().item()
                student_ND.backward(leaf_ND.grad)
        return Gradients(
            loss, entropy / completion_tokens([r.student for r in readings]), clip_share=0.0
        )

    def _chunks(self, readings: Sequence[Reading]) -> Iterator[list[Sequence[Reading]]]:
        """Micro-batches by length, in chunks whose hidden states fit in ``CHUNK_BYTES``."""
        ordered = sorted(readings, key=_reading_tokens)
        size = self._reading_rows
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        token_bytes = state_bytes(self.policy)
        chunk: list[Sequence[Reading]] = []
        used = 0
        for batch in batches:
            need = completion_tokens([reading.student for reading in batch]) * token_bytes
            if chunk and used + need > CHUNK_BYTES:
                yield chunk
                chunk, used = [], 0
            chunk.append(batch)
            used += need
        if chunk:
            yield chunk

    def _precision(self) -> AbstractContextManager[None]:
        return self._trl.compute_loss_context_manager()


def reverse_kl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """KL(student || teacher), nats, summed over N tokens.

    As TRL's ``GKDTrainer.generalized_jsd_loss`` at ``beta=1``, without its division.

    Args:
        student_NV, teacher_NV: Log-probabilities over the vocabulary; minus infinity for what the
            student cannot say, which adds nothing.
    """
    student_NV, teacher_NV = _sayable(student_NV, teacher_NV)
    return _kl(student_NV, teacher_NV)


def jensen_shannon(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Jensen-Shannon divergence, nats, summed over N tokens; at most log 2 each.

    As TRL's ``GKDTrainer.generalized_jsd_loss`` at ``beta=0.5``, without its division. Unlike the
    reverse KL it has a gradient towards what the student all but rules out, and unlike the forward
    KL a bounded one.

    Args:
        student_NV, teacher_NV: As for :func:`reverse_kl`.
    """
    student_NV, teacher_NV = _sayable(student_NV, teacher_NV)
    mixed_NV = torch.logaddexp(student_NV, teacher_NV) - math.log(2)
    return (_kl(student_NV, mixed_NV) + _kl(teacher_NV, mixed_NV)) / 2


def _kl(own_NV: Tensor, other_NV: Tensor) -> Tensor:
    return kl_div(other_NV, own_NV, reduction="sum", log_target=True)


def _sayable(student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Both without what the student cannot say: there each is 0, and so is every difference."""
    gone_NV = student_NV == -torch.inf
    return student_NV.masked_fill(gone_NV, 0), teacher_NV.masked_fill(gone_NV, 0)


def _together(first: Gradients, tokens: int, second: Gradients, more: int) -> Gradients:
    """Two passes as one: losses add up, the rest is a mean over both passes' tokens."""
    share = tokens / max(1, tokens + more)
    return Gradients(
        first.loss + second.loss,
        share * first.entropy + (1 - share) * second.entropy,
        share * first.clip_share,
        share * first.drift,
    )


def _reading_tokens(reading: Reading) -> int:
    return row_tokens(reading.student)
