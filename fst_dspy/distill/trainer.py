"""Distillation steps: a student's calls, read again by a teacher under another context.

The teacher is a fixed version of the weights under one candidate, the student the live weights
under another. Every call that the student sampled is rendered again as the teacher's program would
have put it, and the student is moved towards the teacher's next-token distributions on the
student's own completion, at the temperature it was sampled at: reverse KL, exact over the
vocabulary (Agarwal et al., 2024, "On-policy distillation of language models"). Reading costs no
rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.distill.reader import Reading
from fst_dspy.model.hardware import is_out_of_memory
from fst_dspy.model.logprobs import (
    CHUNK_BYTES,
    completion_logprobs,
    completion_states,
    logprobs_of,
    output_layer,
    state_bytes,
    temperatures,
    with_output_layer,
)
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import allowed_tokens
from fst_dspy.slow.trainer import MICRO_BATCH_ROWS, SlowTrainer
from fst_dspy.slow.trl_stepper import Gradients
from fst_dspy.types import StepStats

logger = logging.getLogger(__name__)


class DistillTrainer(SlowTrainer):
    """The slow channel's optimizer, schedule and checkpoints, with the distillation loss.

    Dropout is off, as in TRL's distillation trainers.

    Args:
        policy, slow, sampling, total_steps, seed: As for
            :class:`~fst_dspy.slow.trainer.SlowTrainer`.
        teacher_version: The teacher's weights, at hand in the policy.

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
        teacher_version: str,
    ) -> None:
        distributed.refuse_fsdp("distillation")
        super().__init__(policy, slow, sampling, total_steps, seed)
        # Logits over the whole vocabulary are held of all rows, on a GPU as well.
        self.micro_batch_size = slow.micro_batch_size or MICRO_BATCH_ROWS
        self.teacher_version = teacher_version

    def imitate(self, readings: Sequence[Reading]) -> StepStats:
        """Take exactly one optimizer step towards the teacher.

        As in ``advance``, a loss or gradient that is not finite is dropped, several processes share
        the readings out, and where memory runs out the micro-batches are halved. Where the student
        is the teacher to the last bit (``"constant"``) no step is taken.

        Args:
            readings: At least one, sampled from the live weights.

        Returns:
            The loss is the reverse KL, nats a token, before the step.
        """
        sampled = [reading.student.completion_ids_T for reading in readings]
        distributed.check_same("training rows", sampled)
        while True:
            try:
                return self._imitate(readings)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve_micro_batch(error)

    def _imitate(self, readings: Sequence[Reading]) -> StepStats:
        rows = [reading.student for reading in readings]
        tokens = sum(len(row.completion_ids_T) for row in rows)
        with self.policy.lock:
            own = distributed.own_share(readings, _tokens)
            try:
                gradients = self._accumulate(own, tokens)
                if distributed.processes() > 1:
                    gradients = self._over_processes(gradients, [r.student for r in own])
                if gradients.loss == 0:
                    # What is left of the gradient is rounding, which Adam would blow up.
                    return self._pass_over(rows, gradients)
                return self._update(rows, gradients)
            finally:
                self._trl.model.zero_grad()

    def _accumulate(self, readings: Sequence[Reading], tokens: int) -> Gradients:
        """Forward and backward; the loss is divided by the tokens of the whole step."""
        loss = entropy = 0.0
        own_tokens = sum(len(reading.student.completion_ids_T) for reading in readings)
        for chunk in self._chunks(readings):
            # The teacher reads a whole chunk at once, to swap its weights in as rarely as can be.
            with self.policy.at(self.teacher_version), torch.no_grad(), self._precision():
                layer = output_layer(self.policy)
                states = [
                    completion_states(self.policy, [r.teacher for r in batch]) for batch in chunk
                ]
            for batch, teacher_ND in zip(chunk, states, strict=True):
                rows = [reading.student for reading in batch]
                temperature_N = temperatures(rows, self.policy.device)
                with torch.no_grad(), self._precision(), with_output_layer(self.policy, layer):
                    allowed_NW = allowed_tokens(self.policy, rows)
                    teacher_NV = logprobs_of(self.policy, teacher_ND, temperature_N, allowed_NW)
                with self._precision():
                    student_NV = completion_logprobs(self.policy, rows)
                value = reverse_kl(student_NV, teacher_NV) / tokens
                value.backward()
                loss += value.item()
                entropy += torch.special.entr(student_NV.detach().exp()).sum().item() / own_tokens
        return Gradients(loss, entropy, clip_share=0.0)

    def _chunks(self, readings: Sequence[Reading]) -> Iterator[list[Sequence[Reading]]]:
        """Micro-batches by length, in chunks whose hidden states fit in ``CHUNK_BYTES``."""
        ordered = sorted(readings, key=_tokens)
        size = self.micro_batch_size
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        token_bytes = state_bytes(self.policy)
        chunk: list[Sequence[Reading]] = []
        used = 0
        for batch in batches:
            need = sum(len(reading.student.completion_ids_T) for reading in batch) * token_bytes
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
    gone_NV = student_NV == -torch.inf
    teacher_NV, student_NV = (x.masked_fill(gone_NV, 0) for x in (teacher_NV, student_NV))
    return kl_div(teacher_NV, student_NV, reduction="sum", log_target=True)


def _tokens(reading: Reading) -> int:
    row = reading.student
    return len(row.prompt_ids_T) + len(row.completion_ids_T)
