"""The values that code depends on, beside its source: by these ``partial(metric, 5)`` is another.

Of a function they are its defaults, what it closes over and what a ``functools.partial`` gives it;
of an object or a module its attributes; and those of the functions and objects among them. Short
numbers are told as they are, other plain values by a hash, and what has no stable form by its
class. Left out is what says nothing of how the code behaves, or not for long:

- names that begin with an underscore, or that are those of secrets, and what looks like one;
- containers of more than ``MOST_ITEMS`` values, which hold data;
- what DSPy and this package put on modules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import inspect
import itertools
import math
import numbers
import re
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import dspy
from dspy.predict.parameter import Parameter
from pydantic import BaseModel

from fst_dspy.student.candidate import canonical_json, content_hash
from fst_dspy.student.modules import attributes

MOST_ITEMS = 100
"""Of a container, and of those within it."""
MOST_TOLD = 10**15
"""Up to which a whole number is told as it is."""

_SECRET_NAME = re.compile(
    r"(api|access|private|secret|auth)_?key|secret|passw|token$|credential|bearer|^auth$",
    re.IGNORECASE,
)
_SECRET = re.compile(r"(sk-|hf_|gh[a-z]_|xox|AKIA|AIza|eyJ|Bearer )\S{12,}")


def values_of(
    code: Any, of_predictors: Collection[str] = ("signature", "lm", "config")
) -> dict[str, Any]:
    """The values that a function, an object or a module depends on, by their dotted names.

    Args:
        code: It.
        of_predictors: Which of the attributes count that DSPy gives every predictor.

    Returns:
        Values that JSON can hold, the same ones in every process.
    """
    found: dict[str, Any] = {}
    _collect(code, "", found, _Walk(of_predictors))
    return found


def called(code: Any) -> Any:
    """What has a name and a source: a function, or the class of an object; partials are undone."""
    while isinstance(code, functools.partial):
        code = code.func
    return code if hasattr(code, "__qualname__") else type(code)


def name_of(thing: Any) -> str:
    """A class's or function's name, with its module's."""
    return f"{getattr(thing, '__module__', None)}.{thing.__qualname__}"


def own_classes(kind: type) -> list[type]:
    """A class and those that it is derived from, but for DSPy's and Python's."""
    others = ("dspy", "builtins")
    return [one for one in kind.__mro__ if one.__module__.partition(".")[0] not in others]


def lm_identity(lm: Any) -> dict[str, Any] | None:
    """A language model's name and settings, by hash: keys and the like do not go into a folder."""
    if lm is None:
        return None
    settings = {k: v for k, v in (getattr(lm, "kwargs", None) or {}).items() if "key" not in k}
    return {
        "model": str(getattr(lm, "model", type(lm).__name__)),
        "settings": content_hash(settings),
    }


@dataclasses.dataclass
class _Walk:
    """What counts, and what has been gone through, by id."""

    of_predictors: Collection[str]
    seen: set[int] = dataclasses.field(default_factory=set)


def _collect(code: Any, prefix: str, found: dict[str, Any], walk: _Walk) -> None:
    subject = _subject(code)
    if id(code) in walk.seen:
        return
    walk.seen |= {id(code), id(subject)}
    for name, value in _held(code, walk.of_predictors).items():
        path = f"{prefix}{name}"
        if _is_hidden(name, value):
            continue
        if _is_code(value):
            found[path] = name_of(called(value))
            _collect(value, f"{path}.", found, walk)
            continue
        with contextlib.suppress(Exception):  # too long, or whatever a class of others raises
            found[path] = _told(value)
    if isinstance(subject, dspy.Module):  # also those within its containers
        for path, module in subject.named_sub_modules(dspy.Module):
            _collect(module, f"{prefix}{path.partition('.')[2]}.", found, walk)


def _subject(code: Any) -> Any:
    """What is called in the end: partials are undone, and a method is its object's."""
    while isinstance(code, functools.partial):
        code = code.func
    return code.__self__ if isinstance(code, types.MethodType) else code


def _held(code: Any, of_predictors: Collection[str]) -> dict[str, Any]:
    """The values that code holds itself, by name."""
    if isinstance(code, type):
        return {}
    if isinstance(code, functools.partial):
        return {**_held(code.func, of_predictors), **_given(code)}
    if isinstance(code, types.MethodType):
        return {**_held(code.__self__, of_predictors), **_held(code.__func__, of_predictors)}
    if isinstance(code, types.FunctionType):
        return {**_defaults(code), **dict(_closed_over(code))}
    if hasattr(code, "__wrapped__"):  # by what is no function of Python's own, such as a cache
        return _held(code.__wrapped__, of_predictors)
    skipped: Collection[str] = ()
    if isinstance(code, Parameter):
        skipped = _of_every_predictor() - set(of_predictors)
    elif isinstance(code, dspy.Module):
        skipped = ("history", "callbacks")
    return {name: value for name, value in attributes(code).items() if name not in skipped}


@functools.cache
def _of_every_predictor() -> frozenset[str]:
    """The attributes that DSPy gives every predictor, one of them drawn by chance."""
    return frozenset(vars(dspy.Predict("question -> answer")))


def _given(code: functools.partial[Any]) -> dict[str, Any]:
    """The arguments of a partial function, by name where its signature says it."""
    try:
        named = inspect.signature(code.func).bind_partial(*code.args).arguments
    except (TypeError, ValueError):
        named = {str(place): value for place, value in enumerate(code.args)}
    return {**named, **code.keywords}


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = function.__defaults__ or ()
    named = zip(names[len(names) - len(values) :], values, strict=True)
    return {**dict(named), **(function.__kwdefaults__ or {})}


def _closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it is empty
            yield name, cell.cell_contents


def _is_hidden(name: str, value: Any) -> bool:
    """Whether a value is private or secret, or what this package leaves on compiled programs."""
    return (
        name.startswith(("_", "fst_"))
        or _SECRET_NAME.search(name) is not None
        or (isinstance(value, str) and _SECRET.match(value) is not None)
        or type(value).__module__.partition(".")[0] == "fst_dspy"
    )


def _is_code(value: Any) -> bool:
    """Whether a value is something that is called, and that can be looked into."""
    if isinstance(value, type | dspy.BaseLM | BaseModel):
        return False
    own_call = getattr(type(value), "__call__", None)  # noqa: B004  (its class's, if any)
    known = (types.FunctionType, types.MethodType, functools.partial, dspy.Module)
    return isinstance(value, known) or isinstance(own_call, types.FunctionType)


class _TooLongError(Exception):
    """A value holds more than ``MOST_ITEMS`` values, or itself."""


def _told(value: Any) -> Any:
    """What is told of a value: itself where it is short and no text, else a hash."""
    plain = _stable(value, itertools.count(1))
    if plain is None or isinstance(plain, bool):
        return plain
    if isinstance(plain, int) and abs(plain) < MOST_TOLD:
        return plain
    if isinstance(plain, float) and math.isfinite(plain):
        return plain
    if isinstance(plain, dict) and plain.keys() == {"class"}:
        return plain["class"]
    return f"sha256:{content_hash(plain)}"


def _stable(value: Any, counted: Iterator[int]) -> Any:
    """A value as JSON can hold it, whatever the process; by its class where there is no such form.

    Args:
        value: Any.
        counted: Counts the values.
    """
    if next(counted) > MOST_ITEMS:
        raise _TooLongError
    if isinstance(value, enum.Enum):
        return {"class": type(value).__qualname__, "name": value.name}
    if isinstance(value, str | bool | None):
        return value
    for kinds, form in _FORMS:
        if isinstance(value, kinds):
            return form(value)
    if isinstance(value, list | tuple | deque):
        return [_stable(item, counted) for item in value]
    if isinstance(value, set | frozenset):
        return {"set": sorted(canonical_json(_stable(item, counted)) for item in value)}
    if isinstance(value, Mapping):
        pairs = [[_stable(key, counted), _stable(item, counted)] for key, item in _open(value)]
        return {"dict": sorted(map(canonical_json, pairs))}
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        fields = {name: _stable(item, counted) for name, item in _open(attributes(value))}
        return {"class": type(value).__qualname__, "fields": fields}
    name = getattr(value, "__qualname__", None)  # of a function
    return {"class": name if isinstance(name, str) else type(value).__qualname__}


def _open(values: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The items of a mapping that are not hidden."""
    return [(name, value) for name, value in values.items() if not _is_hidden(str(name), value)]


def _signature(signature: Any) -> dict[str, Any]:
    fields = [
        [name, str(field.annotation), str((field.json_schema_extra or {}).get("desc", ""))]
        for name, field in signature.fields.items()
    ]
    return {"instructions": signature.instructions, "fields": fields}


def _class(kind: type) -> dict[str, Any]:
    return {"class": name_of(kind)}


_FORMS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (numbers.Integral, int),
    (numbers.Real, float),
    (numbers.Number, str),
    (bytes, bytes.hex),
    ((datetime.date, datetime.time, datetime.timedelta), str),
    (dspy.BaseLM, lm_identity),
    (type(dspy.Signature), _signature),
    (type, _class),
)
