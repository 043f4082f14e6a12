"""Which policies a compile has in hand: two at once would train, and sample from, each other's."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from fst_dspy.errors import ModelError

_claimed: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def claim(policy: Any) -> None:
    """Take a policy's live weights for a compile, until ``release``.

    Raises:
        ModelError: Another compile in this process has them.
    """
    with _lock:
        if policy in _claimed:
            raise ModelError(
                f"another compile in this process is at work on {policy.name}, whose weights would "
                "be trained by both; wait for it, or give each a LocalLM of its own"
            )
        _claimed.add(policy)


def release(policy: Any) -> None:
    """Give the live weights back."""
    with _lock:
        _claimed.discard(policy)
