"""What changed between two texts, as a page shows it: line by line, then words inside a line.

Changes are marked by signs and by ``<del>`` and ``<ins>``, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fst_dspy.display import line_diff, word_diff

AROUND = 2
"""Lines that stayed the same, shown before and after a change; longer stretches are folded."""


def diff_of(before: str, after: str) -> str:
    """A block of HTML with the lines that changed, and some of those around them."""
    rows: list[str] = []
    stretches = list(line_diff(before.splitlines(), after.splitlines()))
    for number, (same, lines) in enumerate(stretches):
        if same:
            head = AROUND if number else 0
            tail = AROUND if number < len(stretches) - 1 else 0
            rows += _same([line for line, _ in lines if line is not None], head, tail)
        else:
            for pair in lines:
                rows += _changed(*pair)
    return f"<div class=diff>{''.join(rows)}</div>"


def text_block(text: str) -> str:
    """A text as it stands."""
    return f"<pre>{escape(text)}</pre>"


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
