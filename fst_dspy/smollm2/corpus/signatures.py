"""Signatures as users write them, made from names, types and instructions."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import dspy

from fst_dspy.smollm2.corpus.words import INPUT_NAMES, OUTPUT_NAMES

OPTION_LISTS = ("one of: {}", "One of {}", "Choose from: {}", "must be one of {}", "options: {}")


def make_signature(
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    instructions: str,
    reasoning: bool,
    described: Mapping[str, str] | None = None,
) -> type[dspy.Signature]:
    """A signature of typed fields; with ``reasoning`` it is what ``dspy.ChainOfThought`` uses.

    Args:
        inputs, outputs: Types by field name.
        instructions: How to answer.
        reasoning: Whether a field for it comes first.
        described: Descriptions by field name; DSPy's own for the others.
    """
    told = described or {}
    fields: dict[str, tuple[Any, Any]] = {}
    for kinds, make in ((inputs, dspy.InputField), (outputs, dspy.OutputField)):
        for name, kind in kinds.items():
            fields[name] = (kind, make(desc=told[name]) if name in told else make())
    signature = dspy.Signature(fields, instructions)
    return dspy.ChainOfThought(signature).predict.signature if reasoning else signature


def field_names(rng: Random) -> tuple[str, str]:
    """Names of an input and of an output."""
    return rng.choice(INPUT_NAMES), rng.choice(OUTPUT_NAMES)
