"""What is run: jobs in, rollouts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import dspy

from fst_dspy.types import Call, Candidate, Rollout

Channel = Literal["fast", "slow", "eval"]


@dataclass(frozen=True)
class RolloutJob:
    """One rollout to run: which example, under which candidate, and its number among its equals.

    Attributes:
        example: The problem, with its inputs set.
        candidate: The texts to bind into the program.
        index: Tells apart rollouts of the same example and candidate; part of the sampling seed.
    """

    example: dspy.Example
    candidate: Candidate
    index: int = 0


class Runner(Protocol):
    """What the fast phase and evaluation need: jobs in, rollouts out, in the same order."""

    def run(
        self,
        jobs: Sequence[RolloutJob],
        *,
        channel: Channel,
        salt: int,
        version: str | None = None,
    ) -> list[Rollout]: ...


def calls_of(rollouts: Sequence[Rollout]) -> list[Call]:
    """All calls of the local model in some rollouts, in order."""
    return [call for rollout in rollouts for call in rollout.calls]
