"""An average of the trained weights over the steps, to be used in their place for a while.

Of a teacher that learns from itself the live weights make a moving target; an exponential moving
average of them (Tarvainen and Valpola, 2017, "Mean teachers are better role models"; TRL's SDPO:
``teacher_model_kind="ema"``) follows more slowly.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fst_dspy import distributed
from fst_dspy.model.policy import Policy


class AveragedWeights:
    """Begins as a policy's trained weights are, and moves towards them after each step.

    It is in float32 and on the CPU: steps of a hundredth would be rounded away in bfloat16.

    Args:
        policy: Its adapters, where it has any, are in place.
        rate: Share of the way to the live weights that a step goes, in (0, 1).

    Raises:
        ConfigError: accelerate is set up for FSDP.
    """

    def __init__(self, policy: Policy, rate: float) -> None:
        distributed.refuse_fsdp("an averaged teacher (teacher_update_rate)")
        self._policy, self._rate = policy, rate
        self._tensors = _wide(policy.trainable_state(copy=False))

    def follow(self) -> None:
        """Move towards the live weights, after a step."""
        for name, weight in self._policy.trainable_state(copy=False).items():
            self._tensors[name].lerp_(weight.float(), self._rate)

    def state(self) -> Mapping[str, Tensor]:
        """The average, not copied."""
        return self._tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        self._tensors = _wide(tensors)


def _wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
