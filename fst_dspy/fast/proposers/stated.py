"""The sentences of feedback that may be lessons: those after a marker, or those that tell."""

from __future__ import annotations

import re

from fst_dspy.fast.proposers.sentences import HEADING, after_markers, markers, sentences
from fst_dspy.fast.proposers.verdicts import VERDICT
from fst_dspy.fast.proposers.words import key_of, length

BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
MIN_WORDS = 4
"""Shorter sentences without a marker ("Well done.") teach nothing."""


def marked_lessons(feedback: str, inputs: str = "") -> list[str]:
    """The sentences after a marker such as ``Lesson:``, to the end of its line.

    A marker that ends its line holds for the lines up to the next blank one, and one that is a
    heading also for those after a blank one, up to the next.

    Args:
        feedback: What the metric said.
        inputs: What it is about: what that holds, the metric only repeats.
    """
    lessons: list[str] = []
    in_block, is_awaited = False, False
    lines, about = [BULLET.sub("", raw).strip() for raw in feedback.split("\n")], key_of(inputs)
    for number, line in enumerate(lines):
        found = markers(line, "\n".join(lines[number + 1 : number + 3]), about)
        if HEADING.match(line):
            in_block = is_awaited = True
        elif found:
            rest = after_markers(line, found)
            lessons += sentences(rest)
            in_block, is_awaited = not rest, False
        elif in_block and line:
            in_block, is_awaited = not line.startswith("# ") and not line.startswith("##"), False
            lessons += sentences(line) if in_block else []
        elif not line:
            in_block = is_awaited
    return lessons


def unmarked_sentences(feedback: str) -> list[str]:
    """The sentences of feedback without markers that may say more than right or wrong.

    Quotations stay whole, however many sentences they hold: a part of one says nothing.
    """
    lines = [BULLET.sub("", line).strip() for line in feedback.split("\n")]
    return [
        sentence
        for line in lines
        for sentence in sentences(line, quotations_whole=True)
        if length(sentence) >= MIN_WORDS and not VERDICT.search(sentence)
    ]
