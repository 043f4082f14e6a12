"""What is asked of an adapter: the line that it puts behind every answer, and a prompt's texts."""

from __future__ import annotations

from dataclasses import dataclass

import dspy
import pytest
from dspy import lm15

from fst_dspy.student.adapter import end_lines, end_marker, texts_of_prompt


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


@pytest.mark.parametrize(
    ("adapter", "signature", "lines"),
    [
        (None, "task -> answer", 1),
        (dspy.ChatAdapter(), "completed -> answer: int, why: list[str]", 1),
        (dspy.ChatAdapter(), "task -> completed: bool", 2),
        (dspy.ChatAdapter(), "task -> notes, completed: bool, why", 2),
        (Shouting(), "task -> completed: bool", 1),
        (dspy.JSONAdapter(), "task -> completed: bool", 0),
        (Bare(), "task -> completed: bool", 0),
    ],
)
def test_lines_that_begin_as_the_last_one_does(adapter, signature, lines) -> None:
    assert end_lines(adapter, dspy.Signature(signature)) == lines


@dataclass(frozen=True)
class Prompt:
    """What ``format`` gives from DSPy 3.5 on, in its form."""

    messages: tuple[lm15.Message, ...]
    system: str | tuple[lm15.TextPart, ...] | None = None


def test_texts_of_prompts_of_both_forms() -> None:
    signature = dspy.Signature("question -> answer")
    demos = [{"question": "where?", "answer": "here"}]
    messages = dspy.XMLAdapter().format(signature, demos, {"question": "when?"})
    system, *turns = (message["content"] for message in messages)
    prompt = Prompt(tuple(lm15.Message.user(text) for text in turns), system)
    assert texts_of_prompt(messages) == texts_of_prompt(prompt) == [system, *turns]
    in_parts = Prompt(prompt.messages, (lm15.TextPart(system),))
    assert texts_of_prompt(in_parts) == [system, *turns]
    with_image = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert texts_of_prompt(with_image) == ["a"]
