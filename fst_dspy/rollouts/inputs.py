"""Inputs that nobody else writes into: of an example, and of a predictor's call."""

from __future__ import annotations

from typing import Any

import dspy
from pydantic import BaseModel


def own_inputs(example: dspy.Example) -> dict[str, Any]:
    """An example's inputs, for one rollout alone.

    Their types are the example's. What a program could write into (lists, dicts, a
    ``dspy.History``) is copied, as the rollouts of a group run at once; what is in it, if it is no
    such thing itself (an array, an image's pixels), is shared.
    """
    return {name: own_value(value) for name, value in example.inputs().items()}


def own_value(value: Any) -> Any:
    """A value whose lists, dicts and the like are copied, those within them too."""
    kind = type(value)
    if kind in (list, set):
        return kind(map(own_value, value))
    if kind is tuple:
        return tuple(map(own_value, value))
    if kind is dict:
        return {key: own_value(item) for key, item in value.items()}
    if isinstance(value, dspy.Example):
        copied = value.copy()
        for name, item in value.items():
            copied[name] = own_value(item)
        return copied
    if isinstance(value, BaseModel):
        own = {name: own_value(item) for name, item in vars(value).items()}
        changed = {name: item for name, item in own.items() if item is not vars(value)[name]}
        return value.model_copy(update=changed) if changed else value
    return value
