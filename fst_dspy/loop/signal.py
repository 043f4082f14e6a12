"""What is told of a cycle that went wrong, and whether there is anything to learn from."""

from __future__ import annotations

from fst_dspy.errors import TrainingError
from fst_dspy.loop.parts import Parts
from fst_dspy.rollouts.health import told_failures
from fst_dspy.types import CycleRecord

ALL = 0.999
"""Share from which on a figure is that of all rollouts."""


def troubles(parts: Parts, record: CycleRecord) -> list[str]:
    """What a user should know of a cycle while there is time: failures, and steps without gradient.

    Each with its first cause and what to do about it.
    """
    texts = told_failures(record.failure_shares, record.failure_messages)
    if (
        record.train_reward is not None
        and _learns_from_rewards(parts)
        and record.constant_group_share >= ALL
        and not all_equal(record)
    ):
        texts.append(
            "no optimizer step had a gradient: the rollouts of every problem are all as good as "
            "each other (where they are not solved: mix easier and harder problems, or give "
            "partial credit in the metric)"
        )
    return texts


def all_equal(record: CycleRecord) -> bool:
    """Whether all rollouts of a cycle that are learned from had one and the same reward."""
    return record.reward_range is not None and record.reward_range[0] == record.reward_range[1]


def without_signal(parts: Parts, record: CycleRecord) -> str | None:
    """Why neither channel had anything to learn from in a full cycle; ``None`` where one had.

    Raises:
        TrainingError: None of its rollouts succeeded, and the run is to stop then.
    """
    learner = parts.learner
    opening = learner is not None and record.train_reward is None
    if record.cycle == 0 or opening or not _learns_from_rewards(parts) or not all_equal(record):
        return None
    assert record.reward_range is not None
    text = (
        f"every rollout of cycle {record.cycle} had the reward {record.reward_range[0]:g}, so that "
        "there is nothing to learn from"
    )
    failures = told_failures(record.failure_shares, record.failure_messages)
    if sum(record.failure_shares.values()) < ALL:
        return text
    text = "; ".join([text, *failures])
    if parts.config.budget.on_no_signal == "stop":
        raise TrainingError(f'{text}. on_no_signal="warn" goes on all the same')
    return text


def _learns_from_rewards(parts: Parts) -> bool:
    return parts.learner is None or parts.learner.learns_from_rewards
