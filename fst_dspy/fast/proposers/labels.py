"""Rules read off labelled examples: which words of the inputs go with which answer.

For feedback that names the right answer and not why it is right ("Expected amber, got onyx."):
what an example teaches is then in its inputs and labels. A word is a cue for an answer where the
examples that hold it have that answer far more often than chance would have it.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, TypeVar

import dspy

from fst_dspy.fast.proposers.protocol import both_ends, well_formed
from fst_dspy.fast.proposers.verdicts import parts_of
from fst_dspy.fast.proposers.words import key_of, length, telling_words
from fst_dspy.student.candidate import value_text

MAX_EXAMPLES = 512
"""Examples whose labels are looked at."""
SHORT_ANSWER = 6
"""Labels of at most this many words are answers; others are prose."""
PRECISION = 0.9
"""Share of the examples with a cue that must have its answer."""
CHANCE = 0.05
"""Probability that any word at all would be taken for a cue of an answer by chance."""
MAX_CUES = 3
"""Cues for one answer."""

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """A cue and its answer.

    Attributes:
        text: As it stands in an instruction.
        cue: A word of the inputs, in lower case.
        answer: The label.
        support: Examples that hold the cue and have the answer.
    """

    text: str
    cue: str
    answer: str
    support: int


def read_rules(examples: Sequence[dspy.Example], fields: Sequence[str]) -> list[Rule]:
    """The rules that examples tell for some output fields, best supported first.

    Args:
        examples: Training examples; labels that are no short texts of one line, or differ in most
            of them, tell no rules.
        fields: Names of output fields; those that are no labels are passed over.
    """
    rules: list[Rule] = []
    rows = [(example, words_of(dict(example.inputs()))) for example in drawn(examples)]
    several = sum(any(name in example.labels() for example, _ in rows) for name in fields) > 1
    for name in fields:
        pairs = [
            (words, well_formed(value_text(example[name])).strip())
            for example, words in rows
            if name in example.labels()
        ]
        label = f"{name} " if several else ""
        rules += [
            Rule(f"{cue}: {label}{answer}", cue, answer, support)
            for cue, answer, support in _cues(pairs)
        ]
    return sorted(rules, key=lambda rule: (-rule.support, rule.text))


def drawn(examples: Sequence[T]) -> list[T]:
    """Those whose labels are looked at, in their order; of many some, from everywhere among them.

    Data sets are often sorted by their labels, so that the first have one answer alone.
    """
    count = min(len(examples), MAX_EXAMPLES)
    numbers = random.Random(0).sample(range(len(examples)), count)
    return [examples[number] for number in sorted(numbers)]


def words_of(fields: Mapping[str, Any]) -> frozenset[str]:
    """The words of some fields' values, in lower case; of long ones, those at both ends."""
    texts = [both_ends(value_text(value)) for value in fields.values()]
    return frozenset(telling_words(well_formed(" ".join(texts))))


def answers_in(examples: Sequence[dspy.Example], fields: Sequence[str]) -> frozenset[str]:
    """The keys of the answers that the labels of some output fields have, and of their parts."""
    values = {
        well_formed(value_text(example.labels()[name]))
        for example in drawn(examples)
        for name in fields
        if name in example.labels()
    }
    parts = {value_text(part) for value in values for part in parts_of(value)}
    return frozenset(key_of(part) for part in parts if _is_answer(part)) - {""}


def _cues(pairs: Sequence[tuple[frozenset[str], str]]) -> list[tuple[str, str, int]]:
    """Cues, their answers and their support, from (words, answer) of the examples."""
    of_answer: dict[str, list[frozenset[str]]] = defaultdict(list)
    for words, answer in pairs:
        if _is_answer(answer):
            of_answer[answer].append(words)
    if len(of_answer) < 2 or 2 * len(of_answer) > len(pairs):
        return []
    total = Counter(word for words, _ in pairs for word in words)
    found = []
    for answer, rows in sorted(of_answer.items()):
        own = Counter(word for words in rows for word in words)
        share = len(rows) / len(pairs)
        good = [
            word
            for word, count in sorted(own.items(), key=lambda pair: (-pair[1], pair[0]))
            if count >= PRECISION * total[word]
            and _tail(count, total[word], share) * len(total) < CHANCE
        ]
        left = list(rows)
        for _ in range(MAX_CUES):
            covers = {word: sum(word in words for words in left) for word in good}
            cue = max(good, key=lambda word: covers[word], default=None)  # the first of equals
            if cue is None or covers[cue] < 2:
                break
            found.append((cue, answer, own[cue]))
            left = [words for words in left if cue not in words]
    return found


def _is_answer(label: str) -> bool:
    """Whether a label is short enough to be told, and of one line, as rules are."""
    return 0 < length(label) <= SHORT_ANSWER and len(label.splitlines()) == 1


def _tail(least: int, draws: int, share: float) -> float:
    """The probability of at least ``least`` successes in ``draws`` at a chance of ``share``."""
    return sum(
        comb(draws, n) * share**n * (1 - share) ** (draws - n) for n in range(least, draws + 1)
    )
