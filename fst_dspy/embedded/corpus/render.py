"""Training chats in exactly the formats of DSPy's adapters, for signatures of all shapes.

The adapters themselves render them, so no format can drift from what a program will send.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import dspy

from fst_dspy.embedded.corpus.base import Message
from fst_dspy.embedded.corpus.words import ENGLISH, made_up, word_list

HEAVY = 5.0  # loss weight of the tokens that carry the answer
LIGHT = 0.3  # of answers that nothing in the prompt decides: taught as guesses, not as facts
PLAIN = 1.0  # of all other assistant tokens

ADAPTERS: tuple[dspy.Adapter, ...] = (dspy.ChatAdapter(), dspy.XMLAdapter(), dspy.JSONAdapter())
SHARES = (0.55, 0.3, 0.15)
"""Of the adapters, among all chats."""
HEADERS = {
    dspy.ChatAdapter: "[[ ## {} ## ]]\n",
    dspy.XMLAdapter: "<{}>",
    dspy.JSONAdapter: '"{}": ',
}
"""What stands before a field's value in an answer."""
CLOSED = 0.3
"""Share of the chats with options that have them as the field's type."""
THOUGHT = 0.15
"""Share of chats whose reasoning is a ``dspy.Reasoning``, as in a ``dspy.ChainOfThought``."""

INPUT_NAMES = word_list(
    """
    ticket question message text email request note item input query document comment report story
    passage problem case entry review context task log subject memo record letter post
    """
)
OUTPUT_NAMES = word_list(
    """
    queue answer label category team output result choice decision class route target response
    department owner action code tag folder verdict place value group destination reply
    """
)


@dataclass(frozen=True)
class Piece:
    """A stretch of an output value and the loss weight of its tokens."""

    text: str
    weight: float = PLAIN


@dataclass(frozen=True)
class Turn:
    """One example: input values, and output values in weighted pieces.

    An output field that is absent is left out of the demo, as DSPy does for labelled examples
    without reasoning; such a turn is shown, and not learned.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, Sequence[Piece]]


def field_name(rng: Random, pool: Sequence[str], taken: Sequence[str] = ()) -> str:
    """A field name: mostly from the pool, else any English or made-up word, or two of them."""
    while True:
        draw = rng.random()
        if draw < 0.6:
            name = rng.choice(pool)
        elif draw < 0.75:
            name = rng.choice(ENGLISH)
        elif draw < 0.85:
            name = f"{rng.choice(ENGLISH)}_{rng.choice(pool)}"
        else:
            name = made_up(rng)
        if name not in taken and name != "reasoning":
            return name


def draw_adapter(rng: Random) -> dspy.Adapter:
    """The adapter of a chat."""
    (adapter,) = rng.choices(ADAPTERS, SHARES)
    return adapter


def draw_types(rng: Random, options: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """Types of a chat's outputs that are no plain text: of a reasoning, and of fields that have
    ``options``, now and then.
    """
    types: dict[str, Any] = {}
    if rng.random() < THOUGHT:
        types["reasoning"] = dspy.Reasoning
    for name, listed in (options or {}).items():
        if rng.random() < CLOSED:
            types[name] = Literal[tuple(listed)]
    return types


def make_signature(
    inputs: Mapping[str, str | None],
    outputs: Mapping[str, str | None],
    instructions: str | None,
    types: Mapping[str, Any] | None = None,
) -> type[dspy.Signature]:
    """A signature of fields, given as name to description (``None``: DSPy's default).

    Without ``instructions`` it has the ones DSPy makes up from the field names. ``types`` are those
    of outputs that are no ``str``.
    """

    def described(kind: Any, name: str, desc: str | None) -> tuple[Any, Any]:
        type_ = (types or {}).get(name, str)
        return type_, kind() if desc is None else kind(desc=desc)

    fields = {name: described(dspy.InputField, name, desc) for name, desc in inputs.items()}
    fields |= {name: described(dspy.OutputField, name, desc) for name, desc in outputs.items()}
    return dspy.Signature(fields, instructions)


def _values(signature: type[dspy.Signature], turn: Turn) -> dict[str, Any]:
    """The output values of a turn; of a field that holds no text, what its JSON stands for."""
    texts = {name: "".join(p.text for p in pieces) for name, pieces in turn.outputs.items()}
    fields = signature.output_fields
    return {n: json.loads(t) if _is_nested(fields[n]) else t for n, t in texts.items()}


def _is_nested(field: Any) -> bool:
    return field.annotation == dict[str, Any]


def _assistant(adapter: dspy.Adapter, signature: type[dspy.Signature], turn: Turn) -> Message:
    content = adapter.format_assistant_message_content(signature, _values(signature, turn))
    header = HEADERS[type(adapter)]
    spans: list[tuple[int, int, float]] = []
    start = 0
    for name, pieces in turn.outputs.items():
        start = content.index(header.format(name), start) + len(header.format(name))
        for piece in pieces:
            if piece.weight == PLAIN and _is_nested(signature.output_fields[name]):
                continue  # the adapter may write it in another way
            start = content.index(piece.text, start)
            if piece.weight != PLAIN:
                spans.append((start, start + len(piece.text), piece.weight))
            start += len(piece.text)
    return Message("assistant", content, PLAIN, tuple(spans))


def render_chat(
    adapter: dspy.Adapter, signature: type[dspy.Signature], turns: Sequence[Turn]
) -> list[Message]:
    """A chat of demo turns and one final turn, as the adapter renders them.

    Complete turns are learned, demos included. As in DSPy, incomplete demos come first.
    """
    *demos, last = turns
    whole = [demo for demo in demos if demo.outputs.keys() == signature.output_fields.keys()]
    partial = [demo for demo in demos if demo not in whole]
    texts = [{**demo.inputs, **_values(signature, demo)} for demo in partial + whole]
    rendered = adapter.format(signature, texts, dict(last.inputs))
    learned = iter([_assistant(adapter, signature, demo) for demo in whole])
    messages: list[Message] = []
    for index, message in enumerate(rendered):
        if message["role"] == "assistant" and index // 2 > len(partial):
            messages.append(next(learned))
        else:
            messages.append(Message(message["role"], message["content"]))
    return [*messages, _assistant(adapter, signature, last)]
