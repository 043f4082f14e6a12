"""Where a sentence of feedback ends, what is quoted in it, and the marks before a lesson."""

from __future__ import annotations

import re

from fst_dspy.fast.proposers.words import holds, key_of

QUOTED = re.compile(
    r"(?<!\d)\"[^\"]+\"|`[^`]+`|(?<!\w)'[^']+'(?!\w)|“[^“”]+”|«[^«»]+»|「[^「」]+」|『[^『』]+』"
)
"""What stands in quotation marks. A number before one makes it inches."""
MARK = r"(?:lesson|rule|hint|note|remember|tip)s?"
MARKER = re.compile(
    rf"(?<![^\W_])(?P<bold>[*_]{{1,3}})?{MARK}"
    r"(?(bold)(?P<end>[*_]{0,3}))\s*[:：](?(bold)(?P<late>[*_]{0,3}))\s*",
    re.IGNORECASE,
)
HEADING = re.compile(
    rf"(?:#{{1,6}}\s+[*_]{{0,3}}|[*_]{{1,3}}){MARK}[*_]{{0,3}}\s*[:：]?[*_]{{0,3}}$", re.IGNORECASE
)
"""A marker that is a line of its own, as markdown has headings."""
BEFORE_MARKER = re.compile(r"(?:^\W*|[.!?…;:|()\[\]{}。！？；：]\s*|[\"'`”’»」』]\s+|\s[-–—]+\s*)$")
"""What ends before a marker: a sentence, or a clause that stands for one. Elsewhere it is a word
like others ("he left a note: gone")."""

_GAP = re.compile(
    r"(?<=[.!?])\s+|(?<=[。！？｡])(?![。！？｡”’」』）])\s*|(?<=[。！？｡][”’」』）])\s*"
)
_INITIALS = re.compile(r"(?<!\w)[^\W\d_]\.(?:\s?[^\W\d_]\.)+$")
_INITIAL = re.compile(r"(?<!\w)[^\W\d_]\.$")
_ABBREVIATED = re.compile(
    r"(?<!\w)(?:dr|mrs?|ms|prof|st|vs|cf|approx|resp|bzw|ca)\.$", re.IGNORECASE
)
_NUMBERED = re.compile(r"(?<!\w)(?:nos?|nr|figs?|sec|art|vol|ch|eq|pp?|para)\.$", re.IGNORECASE)
_MAY_END = re.compile(r"(?<!\w)(?:etc|usw|inc|ltd|co|corp|jr|sr|al)\.$", re.IGNORECASE)
LOOK = 200
"""Characters in which a marker and two words are looked for."""
_LONGEST = 16
"""Characters before a gap that an abbreviation is looked for in."""


def sentences(line: str, *, quotations_whole: bool = False) -> list[str]:
    """The sentences of one line; where quotations are whole, none ends within one."""
    ends = gaps(line, quotations_whole=quotations_whole)
    starts = [0, *(end for _, end in ends)]
    parts = [line[a:b].strip() for a, b in zip(starts, [*(a for a, _ in ends), None], strict=True)]
    return [part for part in parts if part]


def gaps(text: str, *, quotations_whole: bool = False) -> list[tuple[int, int]]:
    """From where to where the gaps between sentences are."""
    quoted = [found.span() for found in QUOTED.finditer(text)] if quotations_whole else []
    return [
        found.span()
        for found in _GAP.finditer(text)
        if _is_end(text, *found.span())
        and not any(start < found.start() < end for start, end in quoted)
    ]


def markers(line: str, following: str = "", inputs: str = "") -> list[re.Match[str]]:
    """The markers in a line after which a lesson stands.

    Args:
        line: Without its bullet.
        following: The next lines.
        inputs: The key of what the feedback is about: what that holds is not the metric's word.
    """
    quoted = [found.span() for found in QUOTED.finditer(line)]
    return [
        found
        for found in MARKER.finditer(line)
        if BEFORE_MARKER.search(line[: found.start()])
        and not any(start <= found.start() < end for start, end in quoted)
        and not _is_repeated(f"{line[found.start() :][:LOOK]}\n{following[:LOOK]}", inputs)
    ]


def after_markers(line: str, found: list[re.Match[str]]) -> str:
    """A line from its first marker on, without the markers."""
    text = ""
    for marker, end in zip(found, [*(m.start() for m in found[1:]), len(line)], strict=True):
        rest = line[marker.end() : end]
        bold = marker["bold"]
        # One that encloses the lesson too ends somewhere in it.
        still_bold = bold and not (marker["end"] or marker["late"])
        text += rest.replace(bold, "", 1) if still_bold else rest
    return text.strip()


def _is_end(line: str, start: int, end: int) -> bool:
    """Whether a sentence ends at a gap of a line."""
    before, after = line[max(0, start - _LONGEST) : start], line[end : end + 2]
    if not before.endswith(".") or not after:
        return True
    if after[0] in ",;:)]}" or _INITIALS.search(before) or _ABBREVIATED.search(before):
        return False
    if _INITIAL.search(before):  # of a name, as in "J. Smith"; or of several, as in "z. B."
        return not (_INITIAL.match(after) or (before[-2].isupper() and after[0].isupper()))
    if _NUMBERED.search(before):
        return not after[0].isdigit()
    return not (_MAY_END.search(before) and after[0].islower())


def _is_repeated(text: str, inputs: str) -> bool:
    """Whether the inputs hold how a text begins: the marker, and two words after it."""
    beginning = key_of(text).split()[:3]
    return len(beginning) == 3 and holds(inputs, " ".join(beginning))
