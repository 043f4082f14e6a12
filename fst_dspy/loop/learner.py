"""What learns from the groups of a step: the slow channel's GRPO, or another in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fst_dspy.config import FSTConfig
from fst_dspy.model.policy import Policy
from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.slow.training_state import TrainingState
from fst_dspy.types import Group, StepStats


class Learner(Protocol):
    """Moves the policy's weights, and can be saved and gone on with.

    Attributes:
        learns_from_rewards: Whether groups of equal rewards teach it nothing.
    """

    learns_from_rewards: bool

    @property
    def bad_steps(self) -> int:
        """Steps in a row up to now whose loss or gradient was not finite."""
        ...

    def advance(self, groups_P: Sequence[Group]) -> StepStats:
        """Exactly one optimizer step on the groups of P problems, or a word why there was none."""
        ...

    def state(self) -> TrainingState:
        """All there is to go on from; every process takes part."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what ``state().write`` wrote, bit for bit."""
        ...


class GRPOLearner:
    """The slow channel: advantages over each group, a row a call, one GRPO step on them."""

    learns_from_rewards = True

    def __init__(self, policy: Policy, config: FSTConfig, seed: int) -> None:
        self._slow = config.slow
        self._trainer = SlowTrainer(
            policy, config.slow, config.sampling, schedule_steps(config), seed
        )

    def advance(self, groups_P: Sequence[Group]) -> StepStats:
        """See :meth:`Learner.advance`."""
        slow = self._slow
        rows = group_rows(groups_P, slow.scale_rewards, credit=slow.credit, discount=slow.discount)
        return self._trainer.advance(rows)

    @property
    def bad_steps(self) -> int:
        """See :meth:`Learner.bad_steps`."""
        return self._trainer.bad_steps

    def state(self) -> TrainingState:
        """See :meth:`Learner.state`."""
        return self._trainer.state()

    def load(self, folder: Path) -> None:
        """See :meth:`Learner.load`."""
        self._trainer.load(folder)


def schedule_steps(config: FSTConfig) -> int:
    """Length of the learning rate schedule, in optimizer steps."""
    return (config.budget.max_cycles or 1) * config.slow.steps_per_cycle
