"""What changed between two texts, as a page shows it: line by line, then words inside a line.

Changes are marked by signs and by ``<del>`` and ``<ins>``, not by colour alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from fst_dspy.display import word_diff

AROUND = 2
"""Lines that stayed the same, shown before and after a change; longer stretches are folded."""
ALIKE = 0.4
"""Two lines that share less than this of their words are two lines, not one that was changed."""
MOST_LINES = 2000
"""Of a text; in longer ones lines that come again and again are no anchors, which saves time."""
MOST_PAIRS = 400
"""Of lines that are compared word by word in one block: it takes time for each."""

Pair = tuple[str | None, str | None]
"""A line before and after; ``None`` where there is none."""


def diff_of(before: str, after: str) -> str:
    """A block of HTML with the lines that changed, and some of those around them."""
    rows: list[str] = []
    old, new = before.splitlines(), after.splitlines()
    long = max(len(old), len(new)) > MOST_LINES
    opcodes = SequenceMatcher(None, old, new, autojunk=long).get_opcodes()
    for number, (kind, i1, i2, j1, j2) in enumerate(opcodes):
        if kind == "equal":
            head = AROUND if number else 0
            tail = AROUND if number < len(opcodes) - 1 else 0
            rows += _same(old[i1:i2], head, tail)
        else:
            for pair in _pairs(old[i1:i2], new[j1:j2]):
                rows += _changed(*pair)
    return f"<div class=diff>{''.join(rows)}</div>"


def text_block(text: str) -> str:
    """A text as it stands."""
    return f"<pre>{escape(text)}</pre>"


def demos_text(text: str) -> str:
    """Demos as people read them, a line a field; what is no list of demos as it stands."""
    try:
        demos = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(demos, list) or not all(isinstance(demo, dict) for demo in demos):
        return text
    return "\n\n".join(
        f"Example {number}\n{_fields(demo)}" for number, demo in enumerate(demos, start=1)
    )


def shown_text(component: str, text: str) -> str:
    """A component's text as people read it."""
    return demos_text(text) if component.endswith(".demos") else text


def _fields(demo: Mapping[str, Any]) -> str:
    return "\n".join(
        f"  {name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in demo.items()
    )


def _same(lines: Sequence[str], head: int, tail: int) -> Iterator[str]:
    folded = len(lines) - head - tail
    if folded < 2:
        yield from (_row(" ", escape(line)) for line in lines)
        return
    yield from (_row(" ", escape(line)) for line in lines[:head])
    inner = "".join(_row(" ", escape(line)) for line in lines[head : len(lines) - tail])
    yield f"<details><summary>{folded} lines the same</summary>{inner}</details>"
    yield from (_row(" ", escape(line)) for line in lines[len(lines) - tail :])


def _changed(old: str | None, new: str | None) -> Iterator[str]:
    if old is None or new is None:
        if old is not None:
            yield _row("−", f"<del>{escape(old)}</del>", "gone")
        if new is not None:
            yield _row("+", f"<ins>{escape(new)}</ins>", "new")
        return
    pieces = word_diff(old, new)
    for sign, skipped, tag, name in (("−", "added", "del", "gone"), ("+", "removed", "ins", "new")):
        words = "".join(
            escape(text) if kind == "same" else f"<{tag}>{escape(text)}</{tag}>"
            for kind, text in pieces
            if kind != skipped
        )
        yield _row(sign, words, name)


def _row(sign: str, html: str, name: str = "") -> str:
    return f"<p{f' class={name}' if name else ''}><b>{sign}</b><span>{html}</span></p>"


def _pairs(old: Sequence[str], new: Sequence[str]) -> Iterator[Pair]:
    """The lines of a block that was replaced: a line and what became of it, in order."""
    at, fresh = 0, list[str]()  # lines without a likeness, shown after those that went for them
    for line in new:
        found = _likest(old[at:], line) if (len(old) - at) * len(new) <= MOST_PAIRS else None
        if found is None:
            fresh.append(line)
            continue
        yield from ((gone, None) for gone in old[at : at + found])
        yield from ((None, one) for one in fresh)
        yield old[at + found], line
        at, fresh = at + found + 1, []
    yield from ((gone, None) for gone in old[at:])
    yield from ((None, one) for one in fresh)


def _likest(old: Sequence[str], line: str) -> int | None:
    words = line.split()
    shares = [SequenceMatcher(None, one.split(), words).quick_ratio() for one in old]
    best = max(range(len(shares)), key=shares.__getitem__, default=None)
    return best if best is not None and shares[best] >= ALIKE else None
