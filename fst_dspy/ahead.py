"""Rollouts of the next optimizer step, sampled while this one trains: one step off policy.

They are sampled in a thread from a copy of the weights as they are before the update. So they do
not depend on which of the two is done first, and the same seed gives the same rollouts; sampling
and training hold a lock each and not the same one. The importance ratio of the update that uses
them is that of one optimizer step, which CISPO caps.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from fst_dspy import distributed
from fst_dspy.errors import ConfigError
from fst_dspy.policy import Policy
from fst_dspy.problems import ProblemStream
from fst_dspy.reuse import as_read_back, rollout_from_json
from fst_dspy.types import Group

Attempts = tuple[tuple[Group, ...], ...]
"""The groups of one optimizer step. There are several attempts where constant ones are drawn again;
the last is trained on."""


class Ahead:
    """Samples the groups of the next step while the policy is trained.

    Args:
        policy: What is trained, its adapters in place. The copy of it takes as much memory again as
            the weights that are trained; frozen ones are shared.

    Raises:
        ConfigError: The policy generates with an engine of its own, which cannot be copied.
    """

    def __init__(self, policy: Policy) -> None:
        if policy.generator is not None:
            raise ConfigError("off_policy_steps=1 needs the built-in engine; set it to 0 with vLLM")
        self._live = policy
        frozen = {id(p): p for p in policy.model.parameters() if not p.requires_grad}
        model = copy.deepcopy(policy.model, frozen)
        self._copy = Policy(model, policy.tokenizer, policy.name, policy.source)
        self._thread = ThreadPoolExecutor(1, "rollouts ahead")

    def begin(
        self, sample: Callable[[Policy], tuple[Attempts, ProblemStream]]
    ) -> Future[tuple[Attempts, ProblemStream]]:
        """Start sampling from the weights as they are now; afterwards they may be trained.

        Args:
            sample: Called in the thread with the copy.

        Returns:
            The groups, as a resumed run would read them from a checkpoint, and the problems behind
            them.
        """
        self._follow()
        if distributed.processes() > 1:
            # Both would talk to the other processes at once, in an order of chance.
            done: Future[tuple[Attempts, ProblemStream]] = Future()
            done.set_result(_as_saved(sample(self._copy)))
            return done
        context = contextvars.copy_context()  # dspy.context's settings, which threads lack
        return self._thread.submit(context.run, lambda: _as_saved(sample(self._copy)))

    def close(self) -> None:
        """Wait for what is being sampled, if anything is."""
        self._thread.shutdown()

    @torch.no_grad()
    def _follow(self) -> None:
        with self._live.lock, self._copy.lock:
            both = zip(self._copy.model.parameters(), self._live.model.parameters(), strict=True)
            for own, live in both:
                if live.requires_grad:
                    own.copy_(live)
            self._copy.step = self._live.step


def attempts_from_json(plain: Sequence[Sequence[Mapping[str, Any]]]) -> Attempts:
    """The groups from JSON lists of objects, of which each has the fields of a dataclass."""
    return tuple(
        tuple(
            Group(group["example_id"], tuple(map(rollout_from_json, group["rollouts_G"])))
            for group in groups
        )
        for groups in plain
    )


def as_saved(attempts: Attempts) -> Attempts:
    """The groups as a resumed run would read them from a checkpoint."""
    return tuple(
        tuple(
            Group(group.example_id, tuple(map(as_read_back, group.rollouts_G))) for group in groups
        )
        for groups in attempts
    )


def _as_saved(sampled: tuple[Attempts, ProblemStream]) -> tuple[Attempts, ProblemStream]:
    attempts, stream = sampled
    return as_saved(attempts), stream
