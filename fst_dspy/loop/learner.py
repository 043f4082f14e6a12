"""What learns from the groups of a step: the slow channel's GRPO, or another in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import dspy

from fst_dspy.config import FSTConfig, SlowConfig
from fst_dspy.distributed import uses_fsdp
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.loop.self_teacher import SelfTeacher
from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.averaged_weights import AveragedWeights
from fst_dspy.slow.taught_trainer import TaughtTrainer, jensen_shannon
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.slow.training_state import TrainingState
from fst_dspy.types import Candidate, Group, StepStats


class Learner(Protocol):
    """Moves the policy's weights, and can be saved and gone on with."""

    @property
    def learns_from_rewards(self) -> bool:
        """Whether groups of equal rewards teach it nothing."""
        ...

    @property
    def learns_from_text(self) -> bool:
        """Whether the metric's text teaches it."""
        ...

    def learn_from_text(self) -> None:
        """Let the metric's text teach as well from now on, where it does not yet."""
        ...

    @property
    def bad_steps(self) -> int:
        """Steps in a row up to now whose loss or gradient was not finite."""
        ...

    def advance(self, groups_P: Sequence[Group], candidates: Mapping[str, Candidate]) -> StepStats:
        """Exactly one optimizer step on the groups of P problems, or a word why there was none.

        Args:
            groups_P: Sampled from the weights as they are.
            candidates: Those that their rollouts ran under, by id.
        """
        ...

    def state(self) -> TrainingState:
        """All there is to go on from; every process takes part."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what ``state().write`` wrote, bit for bit."""
        ...


class GRPOLearner:
    """The slow channel: advantages over each group, a row a call, one GRPO step on them.

    Args:
        lm: The local model.
        program: The program that the rollouts run.
        config: The settings.
        seed: Seed of dropout.
    """

    def __init__(self, lm: LocalLM, program: dspy.Module, config: FSTConfig, seed: int) -> None:
        slow, self._lm = config.slow, lm
        self._slow, self._reads = slow, False
        settings = lm.policy, slow, config.sampling, schedule_steps(config), seed
        self._averaged: AveragedWeights | None = None
        if not may_learn_from_text(slow):
            self._trainer = SlowTrainer(*settings)
            return
        self._teacher = SelfTeacher(program, lm, config.fast.perfect_score)
        self._trainer = TaughtTrainer(*settings, teaching=self._teaching, divergence=jensen_shannon)
        if slow.slow_signal != "auto":
            self.learn_from_text()

    @property
    def learns_from_rewards(self) -> bool:
        """See :meth:`Learner.learns_from_rewards`."""
        return not self._reads

    @property
    def learns_from_text(self) -> bool:
        """See :meth:`Learner.learns_from_text`."""
        return self._reads

    def learn_from_text(self) -> None:
        """See :meth:`Learner.learn_from_text`; the teacher begins as the weights are now."""
        if self._reads or not isinstance(self._trainer, TaughtTrainer):
            return
        self._reads, rate = True, self._slow.teacher_update_rate
        if rate < 1:
            self._averaged = AveragedWeights(self._lm.policy, rate)

    def advance(self, groups_P: Sequence[Group], candidates: Mapping[str, Candidate]) -> StepStats:
        """See :meth:`Learner.advance`."""
        slow, trainer = self._slow, self._trainer
        rows = group_rows(groups_P, slow.scale_rewards, credit=slow.credit, discount=slow.discount)
        if not (self._reads and isinstance(trainer, TaughtTrainer)):
            return trainer.advance(rows)
        readings = self._teacher.read(groups_P, rows, candidates)
        weight = 1.0 if slow.slow_signal == "feedback" else slow.distillation_weight
        stats = trainer.imitate(readings.found, rows, weight)
        if self._averaged is not None:
            self._averaged.follow()
        return replace(stats, taught=len(readings.found), untaught=readings.untaught)

    def _teaching(self) -> AbstractContextManager[None]:
        """The teacher's weights in the policy's place: an average, or the live ones."""
        averaged = self._averaged
        return nullcontext() if averaged is None else self._lm.policy.holding(averaged.state())

    @property
    def bad_steps(self) -> int:
        """See :meth:`Learner.bad_steps`."""
        return self._trainer.bad_steps

    def state(self) -> TrainingState:
        """See :meth:`Learner.state`."""
        state = self._trainer.state()
        if self._averaged is None or not state.weights:  # none: another process writes
            return state
        teacher = self._averaged.state()
        if not state.live:  # the trainer's tensors came from a device; these are here, and move on
            teacher = {name: tensor.clone() for name, tensor in teacher.items()}
        return replace(state, teacher=teacher)

    def load(self, folder: Path) -> None:
        """See :meth:`Learner.load`."""
        state = self._trainer.load(folder)
        if self._averaged is not None:
            self._averaged.load(state.teacher)


def may_learn_from_text(slow: SlowConfig) -> bool:
    """Whether the settings, and the processes, let the metric's text teach, now or later."""
    return slow.slow_signal != "reward" and not (slow.slow_signal == "auto" and uses_fsdp())


def schedule_steps(config: FSTConfig) -> int:
    """Length of the learning rate schedule, in optimizer steps."""
    return (config.budget.max_cycles or 1) * config.slow.steps_per_cycle
