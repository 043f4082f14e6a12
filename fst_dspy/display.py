"""Texts and tables as HTML for a notebook and as text for a terminal, from plain values.

What is shown may be whatever a language model or a stranger's file says. In HTML every text is
escaped; the colours are those of the notebook's own theme, light or dark. On a terminal every text
goes through ``as_text``: rich's markup in it is shown as it stands, and what a terminal would act
on (escape sequences, control characters, changes of writing direction) is shown as a sign.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_STYLE = (
    "<style>.fst{font-family:system-ui,sans-serif;line-height:1.4}"
    ".fst table{border-collapse:collapse;margin:.4em 0}"
    ".fst td,.fst th{text-align:left;padding:.15em .7em;border-bottom:1px solid #8886;"
    "vertical-align:top}.fst .n{text-align:right;font-variant-numeric:tabular-nums}"
    ".fst pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0 .6em;padding:.4em .6em;"
    "border-left:3px solid #8886;background:none;color:inherit}"
    ".fst ins{background:#2a9d5733;text-decoration:underline}"
    ".fst del{background:#d4433a33;text-decoration:line-through}</style>"
)

Ranked = tuple[float | None, int, str, Mapping[str, str]]
"""A candidate's mean score, on how many examples none is better, its origin and its texts."""


# --- a terminal -----------------------------------------------------------------------------------

_BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_SIGNS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys([*range(0x80, 0xA0), *map(ord, _BIDI)], "\ufffd"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),  # half a pair, which no terminal can be sent
}


def visible(text: str) -> str:
    """The text with a sign in place of every character that a terminal would act on.

    Line ends and tabs stay.
    """
    return text.replace("\r\n", "\n").translate(_SIGNS)


def as_text(value: object, style: str = "") -> Text:
    """Anything as text for a terminal that shows what it says and does nothing else."""
    return Text(visible(str(value)), style=style)


class Terminal(Console):
    """A console that no text can make do anything, whoever prints it.

    Strings are no markup, and what slipped by ``as_text`` is made visible on its way out.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(visible(text), style)


def show(thing: Any, console: Console | None = None) -> None:
    """Print a candidate, a population or a result to a terminal.

    Args:
        thing: Anything with ``__rich__``.
        console: A new one on standard output when ``None``.
    """
    (console or Terminal()).print(thing)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", left: int = 0
) -> Table:
    """A table for a terminal.

    Args:
        columns: Heads.
        rows: As many cells each.
        title: Above it; may be empty.
        left: So many columns, the first ones, are texts; the others are figures, to the right.
    """
    made = Table(title=as_text(title) if title else None, title_justify="left")
    for number, name in enumerate(columns):
        made.add_column(as_text(name), justify="left" if number < left else "right")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else as_text(cell) for cell in row))
    return made


def named_lines(rows: Iterable[tuple[str, object]]) -> Table:
    """Figures with their names before them, for a terminal."""
    made = Table.grid(padding=(0, 2))
    for name, value in rows:
        made.add_row(as_text(name, "dim"), as_text(value))
    return made


def panel(title: str, body: RenderableType, border: str = "none") -> Panel:
    """A titled box for a terminal; a body that is a string is text, not markup."""
    inner = as_text(body) if isinstance(body, str) else body
    return Panel(inner, title=as_text(title), title_align="left", border_style=border)


# --- in an interpreter and in logs ----------------------------------------------------------------

WIDTH, HEIGHT = 100, 10
"""Characters and lines of a ``repr``."""

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel = 60, 60, 2
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 4


def brief(record: Any) -> str:
    """A ``repr`` that fits a screen, of a dataclass: long values are cut, and so is a long end."""
    values = (
        f"{field.name}={_SHORT.repr(getattr(record, field.name))}"
        for field in dataclasses.fields(record)
        if field.repr
    )
    return on_a_screen(f"{type(record).__name__}({', '.join(values)})".splitlines())


def on_a_screen(lines: Iterable[str]) -> str:
    """Lines broken to 100 characters; of more than ten the last ones are left out."""
    broken = [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""]
    ]
    return "\n".join(broken if len(broken) <= HEIGHT else [*broken[: HEIGHT - 1], "  …"])


# --- candidates and populations -------------------------------------------------------------------


def notebook_html(body: str) -> str:
    """HTML for a notebook's output, with the style that goes with it."""
    return f'<div class="fst">{_STYLE}{body}</div>'


def texts_html(origin: str, components: Mapping[str, str]) -> str:
    """A candidate's origin and texts."""
    return notebook_html(f"<p><b>Candidate</b> {escape(origin)}</p>{_components_html(components)}")


def texts_rich(origin: str, components: Mapping[str, str]) -> RenderableType:
    """The same for a terminal: a panel."""
    texts: list[Text] = []
    for name, text in sorted(components.items()):
        texts += [as_text(name, "bold"), as_text(readable(name, text) + "\n")]
    return panel(origin, Group(*texts))


def _components_html(components: Mapping[str, str]) -> str:
    return "".join(
        f"<div><code>{escape(name)}</code><pre>{escape(readable(name, text))}</pre></div>"
        for name, text in sorted(components.items())
    )


def population_html(title: str, rows: Sequence[Ranked]) -> str:
    """A table of candidates in the order given, each with its texts folded under it."""
    body = "".join(
        f"<tr><td class=n>{score_text(mean)}</td><td class=n>{wins:d}</td>"
        f"<td><details><summary>{escape(origin)}</summary>"
        f"{_components_html(components)}</details></td></tr>"
        for mean, wins, origin, components in rows
    )
    return notebook_html(
        f"<p><b>{escape(title)}</b></p><table><thead><tr><th>mean score</th>"
        f"<th>best on</th><th>candidate</th></tr></thead><tbody>{body}</tbody></table>"
    )


def population_rich(title: str, rows: Sequence[Ranked]) -> RenderableType:
    """The same for a terminal, with the first line of each candidate's instructions."""
    made = table(("mean score", "best on"), (), title)
    made.add_column("candidate")
    made.add_column("instructions", overflow="ellipsis", no_wrap=True, ratio=1)
    for mean, wins, origin, components in rows:
        texts = [text for name, text in components.items() if name.endswith(".instructions")]
        first = " / ".join(" ".join(text.split()) for text in texts)
        made.add_row(score_text(mean), str(wins), as_text(origin), as_text(first))
    return made


def score_text(value: float | None) -> str:
    """Three digits, or a dash where nothing was measured."""
    return "—" if value is None else f"{value:.3f}"


# --- what changed between two texts, by lines and then by words -----------------------------------

Piece = tuple[Literal["same", "removed", "added"], str]

MOST_WORDS = 4000
"""Texts with more words than this are compared line by line: difflib takes quadratic time."""
ALIKE = 0.4
"""Two lines that share less than this of their words are two lines, not one that was changed."""
MOST_PAIRS = 400
"""Of lines that are compared with each other in one place; it takes time for each."""

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


def text_diff(before: str, after: str) -> list[Piece]:
    """The pieces that turn ``before`` into ``after``: whole lines, and words of a changed line.

    They give both texts back, as ``word_diff``'s do. Words are compared within a line and what
    became of it alone: over a whole text they meet in lines that have nothing in common.
    """
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    pieces: list[Piece] = []
    for kind, i1, i2, j1, j2 in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(old[i1:i2])))
            continue
        for was, now in _changed_lines(old[i1:i2], new[j1:j2]):
            pieces += word_diff(was, now)
    return pieces


def _changed_lines(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, str]]:
    """Each line with what became of it, in order; empty where there is none.

    Of all ways to pair them, the one in which the pairs are most alike.
    """
    gone, come = [(line, "") for line in old], [("", line) for line in new]
    if len(old) * len(new) > MOST_PAIRS:
        return gone + come
    # row[j]: how alike the rest of the old lines and new[j:] can be, and the pairs that make it so.
    row = [(0.0, come[j:]) for j in range(len(new) + 1)]
    for i in reversed(range(len(old))):
        below, row = row, [(0.0, gone[i:])]
        for j in reversed(range(len(new))):
            skipped = max(
                (below[j][0], [gone[i], *below[j][1]]), (row[0][0], [come[j], *row[0][1]]),
                key=lambda way: way[0],
            )  # fmt: skip
            share = _share(old[i], new[j])
            paired = below[j + 1][0] + share, [(old[i], new[j]), *below[j + 1][1]]
            row.insert(0, paired if share >= ALIKE and paired[0] > skipped[0] else skipped)
    return row[0][1]


def _share(old: str, new: str) -> float:
    """How many of their words two lines have in common, from 0 to 1."""
    before, after = old.split(), new.split()
    if max(len(before), len(after)) > MOST_WORDS:
        return 0.0
    return SequenceMatcher(None, before, after, autojunk=False).ratio()


def diff_html(before: str, after: str) -> str:
    """The diff as escaped HTML with ``<del>`` and ``<ins>``."""
    tags = {"same": ("", ""), "removed": ("<del>", "</del>"), "added": ("<ins>", "</ins>")}
    return "".join(
        tags[kind][0] + escape(text) + tags[kind][1] for kind, text in text_diff(before, after)
    )


def diff_text(before: str, after: str) -> Text:
    """The diff for a terminal: removed words struck through, added ones underlined."""
    styles = {"same": "", "removed": "red strike", "added": "green underline"}
    return Text().join(as_text(text, styles[kind]) for kind, text in text_diff(before, after))


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
