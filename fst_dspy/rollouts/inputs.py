"""Examples to run a program on, and inputs that are one's own: of an example for one rollout, of a
call as it was made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import dspy

from fst_dspy.errors import DataError
from fst_dspy.student.candidate import with_id
from fst_dspy.student.copies import own_value


def checked_examples(name: str, examples: Iterable[dspy.Example] | None) -> list[dspy.Example]:
    """Examples that a program can be run on, each with the id that it has now.

    Args:
        name: Of the set, for messages.
        examples: Gone through once.

    Raises:
        DataError: There are none, or things that are no examples, or do not say their inputs.
    """
    try:
        given = [] if examples is None else list(examples)
    except TypeError:
        raise DataError(
            f"the {name} must be a list of dspy.Example, got {type(examples).__name__}"
        ) from None
    if not given:
        raise DataError(f"the {name} is empty; FST needs at least one dspy.Example")
    known = []
    for position, example in enumerate(given):
        if not isinstance(example, dspy.Example):
            raise DataError(
                f"{name}[{position}] is a {type(example).__name__}, not a dspy.Example; make each "
                'row one: dspy.Example(**row).with_inputs("field", ...)'
            )
        if example._input_keys is None:
            raise DataError(
                f"{name}[{position}] does not say which fields are inputs; "
                'call .with_inputs("field", ...) on it'
            )
        try:
            known.append(with_id(example))
        except RecursionError:
            raise DataError(
                f"{name}[{position}] holds a value that holds itself; leave that field out"
            ) from None
    return known


def own_inputs(example: dspy.Example) -> dict[str, Any]:
    """An example's inputs, for one rollout alone.

    Their types are the example's. What a program could write into is copied, as the rollouts of a
    group run at once; ``fst_dspy.student.copies`` says what that is, and what is shared.
    """
    return own_values(example.inputs())


def own_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that stay as they are now, whatever is written into them later; copied as above."""
    return own_value(dict(values.items()))
