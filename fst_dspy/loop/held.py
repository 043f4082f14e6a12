"""Which policies a compile has in hand: two at once would train, and sample from, each other's."""

from __future__ import annotations

import threading
import weakref

from fst_dspy.errors import ModelError
from fst_dspy.model.policy import Policy

_held: weakref.WeakSet[Policy] = weakref.WeakSet()
_held_lock = threading.Lock()


def hold(policy: Policy) -> None:
    """Take a policy's live weights for a compile, until ``let_go``.

    Raises:
        ModelError: Another compile in this process has them.
    """
    with _held_lock:
        if policy in _held:
            raise ModelError(
                f"another compile in this process is at work on {policy.name}, whose weights would "
                "be trained by both; wait for it, or give each a LocalLM of its own"
            )
        _held.add(policy)


def let_go(policy: Policy) -> None:
    """Give the live weights back."""
    with _held_lock:
        _held.discard(policy)
