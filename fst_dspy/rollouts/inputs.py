"""Inputs that are one's own: of an example for one rollout, of a call as it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
from pydantic import BaseModel


def own_inputs(example: dspy.Example) -> dict[str, Any]:
    """An example's inputs, for one rollout alone.

    Their types are the example's. What a program could write into (lists, dicts, a
    ``dspy.History``) is copied, as the rollouts of a group run at once; what is in it, if it is no
    such thing itself (an array, an image's pixels), is shared.
    """
    return own_values(example.inputs())


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that stay as they are now, whatever is written into them later; copied as above."""
    return {name: _own(value) for name, value in values.items()}


def _own(value: Any) -> Any:
    kind = type(value)
    if kind in (list, set):
        return kind(map(_own, value))
    if kind is tuple:
        return tuple(map(_own, value))
    if kind is dict:
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, dspy.Example):
        copied = value.copy()
        for name, item in value.items():
            copied[name] = _own(item)
        return copied
    if isinstance(value, BaseModel):
        own = {name: _own(item) for name, item in vars(value).items()}
        changed = {name: item for name, item in own.items() if item is not vars(value)[name]}
        return value.model_copy(update=changed) if changed else value
    return value
