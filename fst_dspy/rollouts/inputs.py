"""Inputs that are one's own: of an example for one rollout, of a call as it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy

from fst_dspy.student.copies import own_value


def own_inputs(example: dspy.Example) -> dict[str, Any]:
    """An example's inputs, for one rollout alone.

    Their types are the example's. What a program could write into is copied, as the rollouts of a
    group run at once; ``fst_dspy.student.copies`` says what that is, and what is shared.
    """
    return own_values(example.inputs())


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that stay as they are now, whatever is written into them later; copied as above."""
    return own_value(dict(values.items()))
