"""What stands for a value in a hash where JSON has no form of it.

That is its ``repr``, but where this may leave something out: arrays, tensors and tables of more
than a few values show the first and last ones alone, and images none. Of those it is a hash of what
they hold. A function's has its address, which is another in every process: it is told by its name
and its code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

_ARRAYS = ("__array__", "__array_interface__", "__dlpack__")
"""By one of these a class says that numpy can read what its objects hold."""
_BESIDE = ("axes", "columns", "column_names", "name", "mask")
"""What an array of numpy's leaves out of a table, of a series and of an array with gaps."""


def is_array(kind: type) -> bool:
    """Whether the objects of a class are arrays or the like: tensors, tables, images, buffers."""
    return kind is memoryview or any(hasattr(kind, name) for name in _ARRAYS)


def contents(value: Any) -> Any:
    """What tells a value from others of its kind: of arrays and those within it, what they hold.

    It is stable over processes where the value's ``repr`` is.
    """
    if (own := _array(value)) is not None:
        return own
    if isinstance(value, functools.partial):
        given = [*value.args, *(part for pair in sorted(value.keywords.items()) for part in pair)]
        return ["partial", *map(contents, (value.func, *given))]
    if isinstance(value, types.FunctionType):
        held = [*(value.__defaults__ or ()), *_closed_over(value)]
        name = f"{value.__module__}.{value.__qualname__}"
        return [name, *_code(value.__code__), *(map(_named, held))]
    inside = list(_arrays_within(value, set()))
    return [repr(value), *inside] if inside else repr(value)


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty
            yield cell.cell_contents


def _named(value: Any) -> Any:
    """What a function holds; other functions by their names, as they may hold each other."""
    return value.__qualname__ if isinstance(value, types.FunctionType) else contents(value)


def _code(code: types.CodeType) -> list[Any]:
    """What a function does, without where it lies."""
    constants = [
        _code(one)
        if isinstance(one, types.CodeType)
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _arrays_within(value: Any, seen: set[int]) -> Iterator[dict[str, Any]]:
    """What the arrays hold that lie in a dataclass or container, in its order."""
    if id(value) in seen or isinstance(value, str | bytes):
        return
    seen.add(id(value))
    if (own := _array(value)) is not None:
        yield own
        return
    held: list[Any] = []
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        held = list(value.values())
    elif isinstance(value, list | tuple | deque):
        held = list(value)
    for item in held:
        yield from _arrays_within(item, seen)


def _array(value: Any) -> dict[str, Any] | None:
    """An array's kind, shape and contents; ``None`` of what is none, or cannot be read as one."""
    if not is_array(type(value)):
        return None
    import numpy as np

    if isinstance(value, np.generic):  # a number, of which the ``repr`` says all
        return None
    try:
        array = _read(value)
    except Exception:  # whatever a library raises where it has no such form
        return None
    data = array.tolist() if array.dtype.hasobject else hashlib.sha256(array.tobytes()).hexdigest()
    found = ((name, getattr(value, name, None)) for name in _BESIDE)
    return {
        "array": type(value).__name__,
        "dtype": str(getattr(value, "dtype", array.dtype)),
        "shape": list(array.shape),
        "data": data,
        **{name: held for name, held in found if held is not None and not callable(held)},
    }


def _read(value: Any) -> Any:
    """The value as an array of numpy's; tensors from wherever they are, and of any kind."""
    import numpy as np

    if not hasattr(type(value), "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu().to_dense()
    try:
        return np.asarray(tensor)
    except TypeError:  # a kind of number that numpy does not have, such as bfloat16
        return np.asarray(tensor.float())
