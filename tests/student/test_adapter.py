"""What is asked of an adapter: the line that it puts behind every answer."""

from __future__ import annotations

import dspy
import pytest

from fst_dspy.student.adapter import end_marker


class Shouting(dspy.ChatAdapter):
    """An adapter with an end of its own."""

    def format_assistant_message_content(self, signature, outputs, missing_field_message=None):
        said = "\n".join(f"{name}! {outputs[name]}" for name in signature.output_fields)
        return f"{said}\n=== OVER ==="


class Bare(dspy.Adapter):
    """An adapter that does nothing."""


@pytest.mark.parametrize(
    ("adapter", "marker"),
    [
        (None, "[[ ## completed ## ]]"),
        (dspy.ChatAdapter(), "[[ ## completed ## ]]"),
        (Shouting(), "=== OVER ==="),
        (dspy.XMLAdapter(), None),
        (dspy.JSONAdapter(), None),
        (dspy.TwoStepAdapter(dspy.utils.DummyLM([])), None),
        (Bare(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_line_behind_every_answer(adapter: dspy.Adapter | None, marker: str | None) -> None:
    assert end_marker(adapter) == marker
