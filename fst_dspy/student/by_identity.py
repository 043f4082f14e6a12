"""A cache over objects whose classes others wrote: adapters, programs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def cached_by_identity(most: int) -> Callable[[Function], Function]:
    """As ``functools.lru_cache``, but for the first argument.

    That is told from others by identity: its class may have an ``__eq__`` and no ``__hash__``, as
    dataclasses do, and of two that are equal each may answer in its own way. And it is not kept
    alive.

    Args:
        most: Results that are kept.
    """

    def cached(function: Function) -> Function:
        @functools.lru_cache(most)
        def found(key: _Itself, *rest: Hashable) -> Any:
            return function(key.subject(), *rest)

        @functools.wraps(function)
        def asked(subject: Any, *rest: Hashable) -> Any:
            return found(_Itself(subject), *rest)

        return cast(Function, asked)

    return cached


class _Itself:
    """An object as a key, which equals keys of the same object while that lives."""

    def __init__(self, subject: Any) -> None:
        self.subject, self._hash = weakref.ref(subject), id(subject)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        # Ids are given again to others, once an object is gone.
        own = self.subject()
        return own is not None and isinstance(other, _Itself) and own is other.subject()
