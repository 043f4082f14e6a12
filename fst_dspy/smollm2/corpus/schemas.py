"""Reading several typed fields off a text: words, numbers, choices, yes or no, lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from fst_dspy.smollm2.corpus.base import Exercise, Turn
from fst_dspy.smollm2.corpus.signatures import make_signature
from fst_dspy.smollm2.corpus.words import DAYS, NAMES, TOWNS, words

SIZES = ("small", "medium", "large")
TEXTS = (
    "{name} from {town} wants {count} {size} {item}s by {day}.{gift}",
    "On {day} {name} ordered {count} {item}s ({size}), to be sent to {town}.{gift}",
    "Please send {count} {size} {item}s to {name} in {town} before {day}.{gift}",
    "{name} called. {count} {item}s, {size}, delivery to {town} on {day}.{gift}",
    "order for {name}: {size} {item} x{count}, {town}, {day}.{gift}",
)
HELD_OUT_TEXTS = (
    "We promised {name} {count} {size} {item}s; the van leaves for {town} on {day}.{gift}",
    "{town}, {day}. {name} still waits for {count} {item}s in size {size}.{gift}",
)
TASKS = (
    "Read the order.",
    "Extract the fields from the text.",
    "Fill in the form.",
    "Note it down.",
)


@dataclass(frozen=True)
class _Field:
    """A field to read: its names, type, description, and how reasoning speaks of it."""

    names: tuple[str, ...]
    kind: Any
    desc: str
    said: Callable[[Any], str]


FIELDS = {
    "name": _Field(("customer", "name", "person"), str, "who it is for", lambda v: f"for {v}"),
    "town": _Field(("town", "city", "place"), str, "where it goes", lambda v: f"to {v}"),
    "count": _Field(("count", "quantity", "pieces"), int, "how many", lambda v: f"{v} pieces"),
    "size": _Field(("size",), Literal[SIZES], "the size", lambda v: f"size {v}"),
    "item": _Field(("item", "product", "article"), str, "in the singular", lambda v: f"a {v}"),
    "day": _Field(("day", "weekday"), Literal[DAYS], "the day of the week", lambda v: f"on {v}"),
    "gift": _Field(
        ("is_gift", "gift"), bool, "is it a present?", lambda v: "a present" if v else "no present"
    ),
    "all": _Field(
        ("tags", "keywords"),
        list[str],
        "town, item and day, in this order",
        lambda v: "the tags are " + ", ".join(v),
    ),
}


def schemas(rng: Random, held_out: bool, reasoning: bool) -> Exercise:
    """Two to four fields of an order; satisfies ``Skill``."""
    chosen = rng.sample(sorted(FIELDS), rng.randint(2, 4))
    named = {kind: rng.choice(FIELDS[kind].names) for kind in chosen}
    source = rng.choice(("text", "order", "note", "message"))
    signature = make_signature(
        {source: str},
        {named[kind]: FIELDS[kind].kind for kind in chosen},
        rng.choice(TASKS),
        reasoning,
        {named[kind]: FIELDS[kind].desc for kind in chosen},
    )

    def turn() -> Turn:
        gift = rng.random() < 0.5
        values: dict[str, Any] = {
            "name": rng.choice(NAMES),
            "town": rng.choice(TOWNS),
            "count": rng.randint(2, 60),
            "size": rng.choice(SIZES),
            "item": rng.choice(words(held_out)),
            "day": rng.choice(DAYS),
        }
        text = rng.choice(HELD_OUT_TEXTS if held_out else TEXTS).format(
            **values, gift=" It is a present." if gift else ""
        )
        values |= {"gift": gift, "all": [values["town"], values["item"], values["day"]]}
        said = "; ".join(FIELDS[kind].said(values[kind]) for kind in chosen)
        answer = {"reasoning": f"The text says: {said}."} if reasoning else {}
        return Turn({source: text}, {**answer, **{named[k]: values[k] for k in chosen}})

    demos = tuple(turn() for _ in range(0 if held_out else rng.choice((0, 0, 1))))
    turns = tuple(turn() for _ in range(1 if held_out else 3))
    return Exercise(signature, demos, turns)
