"""The register of living language models: which weights somebody still answers with.

Weights move on in place, but a program names the weights it was made for. Whoever wants to let a
version go asks here first. Entries are weak: a language model that nobody holds is not in use.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol, TypeVar

from fst_dspy.model.policy import Policy


class NamesWeights(Protocol):
    """Anything that answers with weights: hashable, open to weak references, compared by identity.

    Attributes:
        policy: Whose weights they are.
        model: Their version id, or ``policy.live_id``.
    """

    model: str

    @property
    def policy(self) -> Policy: ...


Named = TypeVar("Named", bound=NamesWeights)

_alive: weakref.WeakSet[NamesWeights] = weakref.WeakSet()
_alive_lock = threading.Lock()


def remember(lm: Named) -> Named:
    """Enter a language model into the register, for as long as it lives; it is returned."""
    with _alive_lock:
        _alive.add(lm)
    return lm


def versions_in_use(policy: Policy, *, besides: object = None) -> set[str]:
    """Version ids that language models over a policy name, wherever they are; but for one."""
    with _alive_lock:
        return {lm.model for lm in _alive if lm.policy is policy and lm is not besides}


def over_base(base_version: str) -> list[NamesWeights]:
    """The living language models whose policies, maybe several, have these base weights.

    The policies are the caller's to ask, outside the register: that takes locks of their own.
    """
    with _alive_lock:
        return [lm for lm in _alive if lm.policy.base_version == base_version]
