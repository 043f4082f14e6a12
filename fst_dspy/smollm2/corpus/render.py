"""Exercises as chats, in the very words of DSPy's adapters: these render them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import dspy
from dspy.adapters import Adapter

from fst_dspy.smollm2.corpus.base import Exercise, Turn

ADAPTERS: Mapping[str, Adapter] = {
    "chat": dspy.ChatAdapter(),
    "xml": dspy.XMLAdapter(),
    "json": dspy.JSONAdapter(),
}


@dataclass(frozen=True)
class Message:
    """A message of a chat, and whether its words are taught: those of answers are."""

    role: str
    content: str
    taught: bool = False


@dataclass(frozen=True)
class Tree:
    """A prompt's messages, and each question with its answer as a branch from them."""

    stem: tuple[Message, ...]
    branches: tuple[tuple[Message, ...], ...]


def prompt(
    adapter: Adapter, signature: type[dspy.Signature], demos: tuple[Turn, ...], turn: Turn
) -> list[dict[str, str]]:
    """The messages that a program would send."""
    shown = [{**demo.inputs, **demo.outputs} for demo in demos]
    return adapter.format(signature, shown, dict(turn.inputs))


def render(exercise: Exercise, adapter: Adapter) -> Tree:
    """The chats of an exercise; what they have in common is said once."""
    signature = exercise.signature
    branches: list[tuple[Message, ...]] = []
    stem: tuple[Message, ...] = ()
    for turn in exercise.turns:
        *before, last = [
            Message(each["role"], each["content"], taught=each["role"] == "assistant")
            for each in prompt(adapter, signature, exercise.demos, turn)
        ]
        stem = tuple(
            Message(each.role, each.content, each.taught and exercise.learn_demos)
            for each in before
        )
        answer = adapter.format_assistant_message_content(signature, dict(turn.outputs))
        branches.append((last, Message("assistant", answer, taught=True)))
    return Tree(stem, tuple(branches))
