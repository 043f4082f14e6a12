"""Answers to validation examples as they are written: what a reader needs, without the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from fst_dspy.student.candidate import plain_fields, value_text
from fst_dspy.types import Rollout

MOST_CHARACTERS = 2000
"""Of a field; longer ones lose their end."""


def answer_rows(
    rollouts: Sequence[Rollout], examples: Sequence[dspy.Example] | None = None
) -> list[dict[str, Any]]:
    """A row a rollout: what was answered last, its reward and feedback.

    Args:
        rollouts: Any.
        examples: Those that they were run on, to be written as well: in the same order, each as
            often, its rollouts one after another.
    """
    rows = [
        {
            "candidate_id": rollout.candidate_id,
            "example_id": rollout.example_id,
            "reward": rollout.reward,
            "feedback": _cut(rollout.feedback),
            "failure": rollout.failure.kind if rollout.failure is not None else None,
            **_answer(rollout),
        }
        for rollout in rollouts
    ]
    if examples is None:
        return rows
    samples = len(rows) // max(1, len(examples))
    shown = [
        {
            "inputs": _fields(plain_fields(example.inputs())),
            "labels": _fields(plain_fields(example.labels())),
        }
        for example in examples
        for _ in range(samples)
    ]
    return [{**row, **own} for row, own in zip(rows, shown, strict=True)]


def _answer(rollout: Rollout) -> dict[str, Any]:
    """The fields of the last predictor, or the text that could not be read; neither without one."""
    if not rollout.traces:
        return {"outputs": None, "text": ""}
    last = rollout.traces[-1]
    if last.outputs is None:
        return {"outputs": None, "text": _cut(last.text)}
    return {"outputs": _fields(last.outputs), "text": ""}


def _fields(fields: Mapping[str, Any]) -> dict[str, str]:
    """Fields as texts."""
    return {str(name): _cut(value_text(value)) for name, value in fields.items()}


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
