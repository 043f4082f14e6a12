"""Copies of what a program or a metric is given, which it may write into without harm.

Of a field's value there are copied

- containers and those within them, of whatever class: lists, dicts, sets, deques, tuples;
- dataclasses, pydantic models and ``dspy.Example``, with what is in them;
- other objects that are made of attributes, such as the state of a game, with all that they hold,
  if it can be copied and is no more than ``MAX_WALKED_ITEMS`` values;
- objects whose class says how, by ``copy_for_rollout()`` or ``__deepcopy__``.

All else is shared: arrays, tensors, images, modules, language models; connections, files and
whatever else cannot be copied; objects that hold such a thing, as half a copy of a client would use
its connections too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import dspy
from pydantic import BaseModel

from fst_dspy.student.contents import is_array
from fst_dspy.student.modules import (
    MAX_WALKED_ITEMS,
    NOT_OF_THE_PROGRAM,
    OWN_COPY,
    attributes,
)

_LEAVES = (str, bytes, bytearray, int, float, complex, type(None), type, types.ModuleType)
_SHARED = (*_LEAVES, dspy.Module, dspy.BaseLM, dspy.Adapter)
_RECORDS = (dspy.Example, BaseModel)
_CONTAINERS = (list, deque, dict, set, tuple, frozenset)


def own_value(value: Any) -> Any:
    """A copy of a value; see above. What lies in it twice does so in the copy."""
    return _Copier().copy(value)


class _TooMuchError(Exception):
    """An object holds more than is copied."""


class _Copier:
    """Copies one value: what has been copied so far, by id, and what an object may still hold."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.items_left: int | None = None  # of the object that is being copied, if any

    def copy(self, value: Any) -> Any:
        kind: Any = type(value)
        make = _maker(kind)
        if make is None:
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        if self.items_left is not None:  # an object is copied as a whole, or not at all
            self._count(value)
            return make(self, value)
        before = len(self.made)
        if not _is_data(kind):
            self.items_left = MAX_WALKED_ITEMS
        try:
            return make(self, value)
        except Exception:  # whatever its class raises
            for key in list(self.made)[before:]:
                del self.made[key]
            return value
        finally:
            self.items_left = None

    def _count(self, value: Any) -> None:
        assert self.items_left is not None
        self.items_left -= len(value) if isinstance(value, _CONTAINERS) else 1
        if self.items_left < 0:
            raise _TooMuchError

    def _sequence(self, items: Any) -> Any:
        twin = self._twin(items, copy.copy(items))
        for place, (item, own) in enumerate(self._pairs(items)):
            if own is not item:
                twin[place] = own
        return twin

    def _dict(self, items: dict[Any, Any]) -> Any:
        twin = self._twin(items, copy.copy(items))
        keys, values = self._pairs(items), self._pairs(items.values())
        if any(own is not key for key, own in keys):
            twin.clear()
        for (_, key), (_, value) in zip(keys, values, strict=True):
            twin[key] = value
        return twin

    def _set(self, items: set[Any]) -> Any:
        twin = self._twin(items, copy.copy(items))
        pairs = self._pairs(items)
        if any(own is not item for item, own in pairs):
            twin.clear()
            twin.update(own for _, own in pairs)
        return twin

    def _fixed(self, items: Any) -> Any:
        pairs = self._pairs(items)
        if all(own is item for item, own in pairs):
            return self.made.setdefault(id(items), items)
        values = [own for _, own in pairs]
        twin = type(items)(*values) if hasattr(items, "_fields") else type(items)(values)
        return self.made.setdefault(id(items), twin)

    def _method(self, method: types.MethodType) -> Any:
        return types.MethodType(method.__func__, self.copy(method.__self__))

    def _by_its_class(self, item: Any) -> Any:
        own = getattr(item, OWN_COPY)() if hasattr(item, OWN_COPY) else copy.deepcopy(item)
        return self.made.setdefault(id(item), own)

    def _object(self, item: Any) -> Any:
        twin = copy.copy(item)  # raises for what is no data: a lock, a file, a connection
        if twin is item or not attributes(item):
            return self.made.setdefault(id(item), item)
        return self._twin(item, twin)

    def _twin(self, item: Any, twin: Any) -> Any:
        """A shallow copy of an item, with its own values of the attributes."""
        self.made[id(item)] = twin
        held = {} if type(item) in _CONTAINERS else attributes(item)
        for name, (value, own) in zip(held, self._pairs(held.values()), strict=True):
            if own is not value:
                object.__setattr__(twin, name, own)  # also where it is frozen
        return twin

    def _pairs(self, items: Iterable[Any]) -> list[tuple[Any, Any]]:
        """Each value with its own copy."""
        # Most are texts.
        return [(one, one if type(one) is str else self.copy(one)) for one in list(items)]


_Maker = Callable[[_Copier, Any], Any]
_MAKERS: tuple[tuple[Any, _Maker], ...] = (
    ((list, deque), _Copier._sequence),
    (dict, _Copier._dict),
    (set, _Copier._set),
    ((tuple, frozenset), _Copier._fixed),
    (types.MethodType, _Copier._method),
    (_RECORDS, _Copier._object),
)


@functools.cache
def _maker(kind: type) -> _Maker | None:
    """What copies the objects of a class; ``None`` where they are shared."""
    if hasattr(kind, OWN_COPY):
        return _Copier._by_its_class
    if is_array(kind) or issubclass(kind, _SHARED) or hasattr(kind, NOT_OF_THE_PROGRAM):
        return None
    made = next((make for kinds, make in _MAKERS if issubclass(kind, kinds)), None)
    return made or (_Copier._by_its_class if hasattr(kind, "__deepcopy__") else _Copier._object)


@functools.cache
def _is_data(kind: type) -> bool:
    """Whether the objects of a class are data, whatever lies in them."""
    return issubclass(kind, (*_CONTAINERS, *_RECORDS)) or dataclasses.is_dataclass(kind)
