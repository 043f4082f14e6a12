"""Strategies: conditions tried in order, the first that holds decides."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from fst_dspy.smollm2.corpus.base import Exercise, Turn
from fst_dspy.smollm2.corpus.signatures import make_signature
from fst_dspy.smollm2.corpus.words import OUTPUT_NAMES, labels, message, words

NUMBERS = ("amount", "age", "weight", "count", "price", "distance", "score")
OVER = ("over", "above", "more than", "greater than")
UNDER = ("under", "below", "less than")
HEADS = (
    "Try the rules in order; the first that matches decides.",
    "The first rule that applies wins.",
    "Go through these steps in order and stop at the first that fits.",
    "Rules, in order of priority:",
)
HELD_OUT_HEADS = ("Check from top to bottom. Whatever fits first is the answer.",)
ANSWER = ("answer {v}", "the {o} is {v}", "choose {v}", "it is {v}")
HELD_OUT_ANSWER = ("give {v}", "pick {v}")
TASKS = ("Decide on the {o}.", "Find the {o}.", "Give the right {o}.")


@dataclass(frozen=True)
class _Rule:
    """A condition on the number (``limit``) or on the text (``word``), and its label."""

    condition: str
    value: str
    over: bool = True
    limit: int | None = None
    word: str | None = None

    def holds(self, number: int, word: str) -> bool:
        if self.limit is None:
            return self.word == word
        return number > self.limit if self.over else number < self.limit

    def said(self, number: int, word: str) -> str:
        """Why it holds, or not."""
        if self.limit is None:
            return f"it {'mentions' if self.word == word else 'does not mention'} {self.word}"
        side = self.condition.split(" is ")[1]
        return f"{number} is {'' if self.holds(number, word) else 'not '}{side}"


def strategies(rng: Random, held_out: bool, reasoning: bool) -> Exercise:
    """Numbers and words in conditions; satisfies ``Skill``."""
    source, output = rng.choice(("message", "note", "text", "request")), rng.choice(OUTPUT_NAMES)
    number = rng.choice(NUMBERS)
    count = rng.randint(2, 4)
    chosen = rng.sample(words(held_out), count + 8)
    keys, others = chosen[:count], chosen[count:]
    values = labels(rng, count + 1, held_out, chosen)
    said = rng.choice(HELD_OUT_ANSWER if held_out else ANSWER)
    numeric = rng.randrange(count)  # exactly one looks at the number
    listed = []
    for place in range(count):
        if place == numeric:
            over = rng.random() < 0.6
            limit = rng.randrange(20, 90, 5)
            side = f"{rng.choice(OVER if over else UNDER)} {limit}"
            listed.append(_Rule(f"the {number} is {side}", values[place], over, limit))
        else:
            listed.append(
                _Rule(f"the {source} mentions {keys[place]}", values[place], word=keys[place])
            )
    lines = [
        f"{place + 1}. If {rule.condition}, {said.format(v=rule.value, o=output)}."
        for place, rule in enumerate(listed)
    ]
    last = f"{count + 1}. Otherwise {said.format(v=values[count], o=output)}."
    head = rng.choice(HELD_OUT_HEADS if held_out else HEADS)
    task = rng.choice(TASKS).format(o=output)
    kind: Any = Literal[tuple(rng.sample(values, count + 1))] if rng.random() < 0.5 else str
    signature = make_signature(
        {source: str, number: int},
        {output: kind},
        "\n".join([task, head, *lines, last]),
        reasoning,
    )

    def turn() -> Turn:
        amount = rng.randint(1, 99)
        word = rng.choice([*[k for n, k in enumerate(keys) if n != numeric], others[0]])
        thought = []
        value, place = values[count], count
        for place, rule in enumerate(listed):
            thought.append(f"Rule {place + 1}: {rule.said(amount, word)}.")
            if rule.holds(amount, word):
                value = rule.value
                break
        else:
            place = count
            thought.append("No rule matches.")
        thought.append(f"So {said.format(v=value, o=output)}.")
        given = {source: message(rng, word, others[1:], held_out), number: amount}
        answer = {"reasoning": " ".join(thought)} if reasoning else {}
        return Turn(given, {**answer, output: value})

    demos = () if held_out or rng.random() < 0.8 else (turn(),)
    return Exercise(signature, demos, tuple(turn() for _ in range(1 if held_out else 5)))
