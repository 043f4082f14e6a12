"""The lines of an instruction: which hold still, in what words, how many, in which order."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from fst_dspy.fast.proposers.labels import Rule
from fst_dspy.fast.proposers.lesson import Lesson, contradicts
from fst_dspy.fast.proposers.words import blanked, holds, key_of

Rank = tuple[int, int, int]
"""How well a line is supported; higher is better."""


def outdated(
    line: str, memory: Mapping[str, Lesson], said: Mapping[str, Sequence[str]], is_added: bool
) -> bool:
    """Whether a line is no longer true, by what is said now and the subject of each saying.

    Where the proposer added it, it also goes with the lesson that it was.
    """
    key = key_of(line)
    lesson = memory.get(key)
    if lesson is not None and (is_added or lesson.live):
        return is_added and (not lesson.live or lesson.verdict)
    return any(contradicts(other, key, subject) for other, subject in said.items())


def in_short(
    lines: Sequence[str], added: Collection[str], rules: Sequence[Rule]
) -> list[tuple[str, str]]:
    """Lines in the words of rules of labels, each once, and each as it was.

    Only a lesson that differs from another in its cue and answer alone is one of those rules.
    """
    forms: dict[str, tuple[str, Rule]] = {}
    for line in lines:
        key = key_of(line)
        told = [rule for rule in rules if restates(key, rule)] if line in added else []
        if len(told) == 1 and key != key_of(told[0].text):
            forms[line] = blanked(key, map(key_of, (told[0].cue, told[0].answer))), told[0]
    counts = Counter(form for form, _ in forms.values())
    found, seen = [], set()
    for line in lines:
        form, rule = forms.get(line, ("", None))
        short = rule.text if rule is not None and counts[form] > 1 else line
        if line not in added or short not in seen:
            found.append((short, line))
            seen.add(short)
    return found


def within(
    room: int,
    lines: Sequence[str],
    rank: Mapping[str, Rank],
    tokens: Callable[[Sequence[str]], int],
) -> list[str]:
    """Lines without the weakest of those with a rank, in at most so many tokens."""
    best_first = sorted(rank, key=lambda line: rank[line], reverse=True)

    def with_best(count: int) -> list[str]:
        dropped = set(best_first[count:])
        return [line for line in lines if line not in dropped]

    def is_too_long(count: int) -> bool:
        return tokens(with_best(count)) > room

    # To drop one after the other would count what is left as often as there are lessons.
    return with_best(bisect_left(range(len(best_first) + 1), True, key=is_too_long) - 1)


def reordered(lines: Sequence[str], known: Collection[str], rng: random.Random) -> list[str]:
    """Lines whose keys are known in another order, the others where they stand."""
    places = [i for i, line in enumerate(lines) if key_of(line) in known]
    shuffled = [lines[i] for i in places]
    rng.shuffle(shuffled)
    moved = dict(zip(places, shuffled, strict=True))
    return [moved.get(i, line) for i, line in enumerate(lines)]


def restates(lesson: str, rule: Rule) -> bool:
    """Whether a lesson, by its key, gives the answer of a rule of labels, of the rule's cue."""
    return holds(lesson, key_of(rule.cue)) and holds(lesson, key_of(rule.answer))
