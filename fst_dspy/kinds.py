"""Values of settings, checked against the annotations of the dataclass that holds them."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal, Union

WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "True or False",
    type(None): "None",
    Mapping: "a mapping of names to texts",
}
"""What people read for the types of settings."""


def wrong_kind(config: Any, label: str = "", but: Iterable[str] = ()) -> str | None:
    """What is wrong with a field of a frozen dataclass; for use in its ``__post_init__``.

    A number of another library, such as numpy's, becomes Python's, and a whole number that was
    written as ``6.0`` becomes ``6`` where one is wanted.

    Args:
        config: The dataclass, of which the annotations are checked.
        label: Stands before the field's name in a message.
        but: Fields that are checked elsewhere.

    Returns:
        A message that names field, kind and value; ``None`` where all is right.
    """
    kind: Any = type(config)
    for name, annotation in _annotations(kind).items():
        if name in but:
            continue
        value = getattr(config, name)
        fitting = [reading for reading in _readings(value) if _is_a(annotation, reading)]
        if not fitting:
            return (
                f"{label}{name} must be {in_words(annotation)}, got {value!r} "
                f"({type(value).__name__})"
            )
        if fitting[0] is not value:
            object.__setattr__(config, name, fitting[0])
    return None


def in_words(annotation: Any) -> str:
    """A type as people say it: ``"a whole number or None"``, ``"'fast' or 'slow'"``."""
    *others, last = _parts_in_words(annotation)
    return f"{', '.join(others)} or {last}" if others else last


def _parts_in_words(annotation: Any) -> list[str]:
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return [word for part in typing.get_args(annotation) for word in _parts_in_words(part)]
    if origin is Literal:
        return [repr(value) for value in typing.get_args(annotation)]
    kind = origin or annotation
    return [WORDS.get(kind) or f"a {kind.__name__}"]


def _readings(value: Any) -> list[Any]:
    """What a value may stand for: itself, or the number that it is."""
    if isinstance(value, bool | str) or not isinstance(value, numbers.Real):
        return [value]
    if isinstance(value, numbers.Integral):
        return [value if type(value) is int else int(value)]
    number = value if type(value) is float else float(value)
    return [number, int(number)] if number.is_integer() else [number]


@cache
def _annotations(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@cache
def _validator(annotation: Any) -> Any:
    from pydantic import TypeAdapter  # takes a while, and the command's help needs none

    return TypeAdapter(annotation).validator


def _is_a(annotation: Any, value: Any) -> bool:
    return bool(_validator(annotation).isinstance_python(value, strict=True))
