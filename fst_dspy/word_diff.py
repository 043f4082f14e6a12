"""What changed between two texts, word by word."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from html import escape
from typing import Literal

Piece = tuple[Literal["same", "removed", "added"], str]

MOST_WORDS = 4000
"""Texts with more words than this are compared line by line: difflib takes quadratic time."""

_WORDS = re.compile(r"\n|[^\S\n]+|\w+|[^\w\s]")


def word_diff(before: str, after: str) -> list[Piece]:
    """The pieces that turn ``before`` into ``after``.

    The ``same`` and ``removed`` pieces in order give ``before`` back, ``same`` and ``added`` give
    ``after``. White space that stands alone between two changes counts as changed with them, so
    that a rewritten phrase reads as one change.
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if max(len(old), len(new)) > MOST_WORDS:
        old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    opcodes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    pieces: list[Piece] = []
    removed = added = ""
    for number, (kind, i1, i2, j1, j2) in enumerate(opcodes):
        same = "".join(old[i1:i2]) if kind == "equal" else ""
        inside = 0 < number < len(opcodes) - 1
        if kind != "equal" or (inside and same.isspace()):
            removed += "".join(old[i1:i2])
            added += "".join(new[j1:j2])
            continue
        pieces += _change(removed, added)
        removed = added = ""
        pieces.append(("same", same))
    return pieces + list(_change(removed, added))


def _change(removed: str, added: str) -> Iterator[Piece]:
    if removed:
        yield "removed", removed
    if added:
        yield "added", added


def diff_html(before: str, after: str) -> str:
    """The diff as escaped HTML with ``<del>`` and ``<ins>``."""
    tags = {"same": ("", ""), "removed": ("<del>", "</del>"), "added": ("<ins>", "</ins>")}
    return "".join(
        tags[kind][0] + escape(text) + tags[kind][1] for kind, text in word_diff(before, after)
    )


def readable(component: str, text: str) -> str:
    """A component's text as people read it: the JSON of demos with a line a field."""
    if component.endswith(".demos"):
        try:
            return json.dumps(json.loads(text), indent=1, ensure_ascii=False)
        except json.JSONDecodeError:
            return text
    return text


def changed_components(
    before: Mapping[str, str], after: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """The components that differ, as ``(name, text before, text after)``, sorted by name."""
    return [
        (name, readable(name, before.get(name, "")), readable(name, after.get(name, "")))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
