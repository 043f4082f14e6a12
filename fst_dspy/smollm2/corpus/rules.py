"""Rules that send what a message mentions to a label, in many wordings and layouts.

Also with a rule for everything else, with exceptions, with the rules in an input field, and with
none at all where the demos show the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from fst_dspy.smollm2.corpus.base import Exercise, Turn
from fst_dspy.smollm2.corpus.signatures import OPTION_LISTS, field_names, make_signature
from fst_dspy.smollm2.corpus.words import labels, message, words

SENTENCES = (
    "{k} {n} go to {v}.",
    "{k} {n} go to {v}.",
    "{k} goes to {v}.",
    "{k} {n} belong to {v}.",
    "Send {k} {n} to {v}.",
    "If it mentions {k}, answer {v}.",
    "If the {i} is about {k}, the {o} is {v}.",
    "When you see {k}, answer {v}.",
    "Use {v} for {k}.",
    "{v} handles {k}.",
    "For {k} the {o} is {v}.",
    "{n} about {k} should get {v}.",
    "Choose {v} whenever {k} comes up.",
    "The {o} of {k} {n} is {v}.",
)
HELD_OUT_SENTENCES = (
    "{v} takes care of everything about {k}.",
    "Whenever the {i} names {k}, pick {v}.",
    "{k} falls under {v}.",
    "All {k} {n} have to be passed to {v}.",
    "Anything on {k}? Then {v}.",
)
TABLES = ("{k} -> {v}", "{k}: {v}", "{k} = {v}", "| {k} | {v} |", "{k} => {v}", "{k}, {v}")
HELD_OUT_TABLES = ("{k} | {v}", "{k} ==> {v}")
NOUNS = ("messages", "cases", "requests", "questions", "items", "things", "letters", "topics")
TASKS = (
    "Choose the {o} for the {i}.",
    "Find the right {o}.",
    "Read the {i} and give the {o}.",
    "Decide which {o} fits the {i}.",
    "Say which {o} the {i} belongs to.",
    "Classify the {i}.",
    "Given the {i}, produce the {o}.",
    "What is the {o}?",
)
HELD_OUT_TASKS = ("Sort each {i} into its {o}.", "Name the {o} that the {i} should get.")
LEADS = ("Rules:", "Follow these rules:", "Lessons:", "Remember:", "Policy:", "Notes:", "Guide:")
DEFAULTS = ("Everything else goes to {v}.", "Otherwise answer {v}.", "In all other cases: {v}.")
EXCEPTIONS = (
    "But if it also mentions {e}, answer {v}.",
    "Exception: with {e} in it, it is {v}.",
    "Unless {e} is mentioned too: then {v}.",
)


@dataclass(frozen=True)
class _Stated:
    """Rules as text, and each as the reasoning quotes it."""

    text: str
    quotes: Mapping[str, str]


def _state(
    rng: Random, rules: Mapping[str, str], names: tuple[str, str], held_out: bool
) -> _Stated:
    tables = HELD_OUT_TABLES if held_out else TABLES
    sentences = HELD_OUT_SENTENCES if held_out else SENTENCES
    is_table = rng.random() < 0.25
    wording = rng.choice(tables if is_table else sentences)
    noun = rng.choice(NOUNS)

    def line(k: str, v: str) -> str:
        said = wording.format(k=k, v=v, n=noun, i=names[0], o=names[1])
        return said if is_table else said[0].upper() + said[1:]

    lines = {k: line(k, v) for k, v in rules.items()}
    # A table is quoted as a sentence, a sentence as it stands.
    quotes = {k: f"{k} goes to {rules[k]}." for k in rules} if is_table else lines
    marks: Sequence[str] = rng.choice((("",), ("",), ("- ",), ("* ",), ("{n}. ",)))
    listed = [marks[0].format(n=n + 1) + each for n, each in enumerate(lines.values())]
    if wording.startswith("| "):
        listed = [f"| {names[0]} | {names[1]} |", "| --- | --- |", *lines.values()]
    glue = " " if not is_table and rng.random() < 0.25 and not marks[0] else "\n"
    lead = [rng.choice(LEADS)] if rng.random() < 0.5 else []
    return _Stated(glue.join([*lead, *listed]), quotes)


def rules(rng: Random, held_out: bool, reasoning: bool) -> Exercise:
    """Key words and labels; satisfies ``Skill``."""
    names = field_names(rng)
    count = 8 if held_out else rng.randint(2, 9)
    pool = words(held_out)
    chosen = rng.sample(pool, count + 8)
    keys, others = chosen[:count], chosen[count:]
    values = labels(rng, count, held_out, chosen)
    if rng.random() < 0.3:  # several keys may share a label
        values = rng.choices(values[: max(2, count // 2)], k=count)
    table = dict(zip(keys, values, strict=True))
    stated = _state(rng, table, names, held_out)
    options = list(dict.fromkeys(values))
    text, cases = stated.text, [(key, table[key], stated.quotes[key]) for key in keys]
    extra = rng.random()
    told: dict[str, str] = {}
    exception = None
    if not held_out and extra < 0.15:
        default = labels(rng, 1, held_out, [*chosen, *values])[0]
        line = rng.choice(DEFAULTS).format(v=default)
        text, options = f"{text}\n{line}", [*options, default]
        strangers = [others.pop() for _ in range(2)]
        cases += [(word, default, f"No rule names it. {line}") for word in strangers]
    elif not held_out and extra < 0.25:
        special, value = others.pop(), labels(rng, 1, held_out, [*chosen, *values])[0]
        line = rng.choice(EXCEPTIONS).format(e=special, v=value)
        text, options = f"{text}\n{line}", [*options, value]
        exception = (special, value, line)
    tasks = HELD_OUT_TASKS if held_out else TASKS
    task = rng.choice(tasks).format(i=names[0], o=names[1])
    outputs: dict[str, Any] = {names[1]: str}
    listing = rng.random()
    rng.shuffle(options)
    if listing < 0.35:
        outputs[names[1]] = Literal[tuple(options)]
    elif listing < 0.65:
        told[names[1]] = rng.choice(OPTION_LISTS).format(", ".join(options))
    inputs: dict[str, Any] = {names[0]: str}
    shown = "demos" if not held_out and rng.random() < 0.1 and count <= 4 else "stated"
    in_field = not held_out and shown == "stated" and rng.random() < 0.1
    if in_field:
        inputs["rules"] = str
    instructions = task if in_field or shown == "demos" else f"{task}\n{text}"
    signature = make_signature(inputs, outputs, instructions, reasoning, told)

    def turn(case: tuple[str, str, str]) -> Turn:
        key, value, quote = case
        content = message(rng, key, others, held_out)
        if exception is not None and rng.random() < 0.4:
            special, value, line = exception
            content += f" {message(rng, special, others, held_out)}"
            quote = f"{quote} {line}" if key in table else line
        given = {names[0]: content}
        if in_field:
            given["rules"] = text
        answer = {"reasoning": f"It is about {key}. {quote}"} if reasoning else {}
        return Turn(given, {**answer, names[1]: value})

    if shown == "demos":
        demos = tuple(turn(case) for case in rng.sample(cases, len(cases)))
        asked = rng.choices(cases, k=4)
        return Exercise(signature, demos, tuple(map(turn, asked)), learn_demos=False)
    few = 0 if held_out or rng.random() < 0.75 else rng.randint(1, 2)
    asked = rng.sample(cases, min(len(cases), 1 if held_out else 5))
    return Exercise(
        signature,
        tuple(turn(case) for case in rng.choices(cases, k=few)),
        tuple(map(turn, asked)),
    )
