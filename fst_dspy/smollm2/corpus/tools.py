"""Short tool calls: which tool, with which arguments, as ``dspy.ToolCalls`` and as in ReAct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import dspy

from fst_dspy.smollm2.corpus.base import Exercise, Turn
from fst_dspy.smollm2.corpus.words import NAMES, TOWNS, words


@dataclass(frozen=True)
class _Kind:
    """A tool, requests that need it, and how its arguments are drawn."""

    verb: str
    described: str
    args: Mapping[str, type]
    requests: tuple[str, ...]


KINDS = (
    _Kind("find", "Looks up {w}s by town.", {"town": str},
          ("Which {w}s are there in {town}?", "Show me every {w} near {town}.")),
    _Kind("buy", "Buys a number of {w}s.", {"count": int},
          ("Get me {count} {w}s.", "I need {count} more {w}s.")),
    _Kind("send", "Sends a {w} to a person.", {"name": str},
          ("Let {name} have a {w}.", "{name} should receive the {w}.")),
    _Kind("move", "Moves the {w} to a town, in some days.", {"town": str, "days": int},
          ("Bring the {w} to {town} within {days} days.",
           "The {w} goes to {town} in {days} days.")),
    _Kind("ask", "Asks a person about the {w}.", {"name": str},
          ("What does {name} think of the {w}?", "Check with {name} about the {w}.")),
)  # fmt: skip


def _nothing(**_: Any) -> None:
    """Tools are described here, never called."""


def _draw(rng: Random) -> dict[str, Any]:
    return {
        "town": rng.choice(TOWNS),
        "count": rng.randint(2, 40),
        "name": rng.choice(NAMES),
        "days": rng.randint(2, 9),
    }


def tools(rng: Random, held_out: bool, reasoning: bool) -> Exercise:
    """Two or three tools; satisfies ``Skill``. ``reasoning`` makes it a step of ReAct."""
    things = rng.sample(words(held_out), 3)
    chosen = [(rng.choice(KINDS), thing) for thing in things[: rng.randint(2, 3)]]
    listed = [
        dspy.Tool(
            _nothing,
            name=f"{kind.verb}_{thing}",
            desc=kind.described.format(w=thing),
            args={n: {"type": "integer" if t is int else "string"} for n, t in kind.args.items()},
        )
        for kind, thing in chosen
    ]
    source = rng.choice(("request", "question", "task"))
    signature: type[dspy.Signature]
    answer: Callable[[str, dict[str, Any], str], dict[str, Any]]
    if reasoning:
        signature = dspy.ReAct(f"{source} -> answer", tools=listed).react.signature

        def answer(name: str, args: dict[str, Any], thing: str) -> dict[str, Any]:
            thought = f"It is about {thing}, so {name} is the tool."
            return {"next_thought": thought, "next_tool_name": name, "next_tool_args": args}

        given: dict[str, Any] = {"trajectory": ""}
    else:
        signature = dspy.Signature(
            {
                source: (str, dspy.InputField()),
                "tools": (list[dspy.Tool], dspy.InputField()),
                "calls": (dspy.ToolCalls, dspy.OutputField()),
            },
            rng.choice(("Call the right tool.", "Use a tool for this.", "Which call is needed?")),
        )

        def answer(name: str, args: dict[str, Any], thing: str) -> dict[str, Any]:
            calls = dspy.ToolCalls.from_dict_list([{"name": name, "args": args}])
            return {"calls": calls}

        given = {"tools": listed}

    def turn() -> Turn:
        kind, thing = rng.choice(chosen)
        values = _draw(rng)
        request = rng.choice(kind.requests).format(w=thing, **values)
        args = {name: values[name] for name in kind.args}
        return Turn({source: request, **given}, answer(f"{kind.verb}_{thing}", args, thing))

    return Exercise(signature, (), tuple(turn() for _ in range(1 if held_out else 4)))
