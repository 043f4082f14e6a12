"""Training chats in exactly the format of DSPy's ``ChatAdapter``, for signatures of all shapes.

The adapter itself renders them, so the format cannot drift from what a program will send.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import dspy

from fst_dspy.embedded.corpus.base import Message
from fst_dspy.embedded.corpus.words import ENGLISH, made_up, word_list

HEAVY = 5.0  # loss weight of the tokens that carry the answer
LIGHT = 0.3  # of answers that nothing in the prompt decides: taught as guesses, not as facts
PLAIN = 1.0  # of all other assistant tokens

ADAPTER = dspy.ChatAdapter()

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


def make_signature(
    inputs: Mapping[str, str | None], outputs: Mapping[str, str | None], instructions: str | None
) -> type[dspy.Signature]:
    """A signature of text fields, given as name to description (``None``: DSPy's default).

    Without ``instructions`` it has the ones DSPy makes up from the field names.
    """

    def described(kind: Callable[..., Any], desc: str | None) -> tuple[type, Any]:
        return str, kind() if desc is None else kind(desc=desc)

    fields = {name: described(dspy.InputField, desc) for name, desc in inputs.items()}
    fields |= {name: described(dspy.OutputField, desc) for name, desc in outputs.items()}
    return dspy.Signature(fields, instructions)


def _assistant(signature: type[dspy.Signature], turn: Turn) -> Message:
    values = {
        name: "".join(piece.text for piece in pieces) for name, pieces in turn.outputs.items()
    }
    content = ADAPTER.format_assistant_message_content(signature, values)
    spans: list[tuple[int, int, float]] = []
    for name, pieces in turn.outputs.items():
        header = f"[[ ## {name} ## ]]\n"
        start = content.index(header) + len(header)
        for piece in pieces:
            if piece.weight != PLAIN:
                spans.append((start, start + len(piece.text), piece.weight))
            start += len(piece.text)
    return Message("assistant", content, PLAIN, tuple(spans))


def render_chat(signature: type[dspy.Signature], turns: Sequence[Turn]) -> list[Message]:
    """A chat of demo turns and one final turn, as ``ChatAdapter`` renders them.

    Complete turns are learned, demos included. As in DSPy, incomplete demos come first.
    """
    *demos, last = turns
    whole = [demo for demo in demos if demo.outputs.keys() == signature.output_fields.keys()]
    partial = [demo for demo in demos if demo not in whole]
    texts = [
        {**demo.inputs, **{k: "".join(p.text for p in v) for k, v in demo.outputs.items()}}
        for demo in partial + whole
    ]
    rendered = ADAPTER.format(signature, texts, dict(last.inputs))
    learned = iter([_assistant(signature, demo) for demo in whole])
    messages: list[Message] = []
    for index, message in enumerate(rendered):
        if message["role"] == "assistant" and index // 2 > len(partial):
            messages.append(next(learned))
        else:
            messages.append(Message(message["role"], message["content"]))
    return [*messages, _assistant(signature, last)]
