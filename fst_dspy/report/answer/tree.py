"""The tree of candidates as SVG: a row each, indented under its parent, and a link to its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, INDENT, LEFT, TEXT = 26, 20, 14, 300
"""Pixels: height of a row, indentation of a generation, the margin, room for a row's text."""

LEGEND = (
    "<p><small>★ chosen, ● in the newest population, ○ left it, × rejected. The number is the "
    "last mean score. A row leads to the candidate’s texts.</small></p>"
)


@dataclass(frozen=True)
class Twig:
    """A row of the tree.

    Attributes:
        place: The id of what it leads to.
        name: Of the candidate.
        cycle: In which it was proposed.
        score: The last mean score, if there is one.
        outcome: ``"accepted"``, ``"rejected"`` or ``"given"``.
        alive: Whether it is in the newest population.
        chosen: Whether the run has chosen it.
        depth: Generations above it; a row's parent is the last one before it of a depth less.
    """

    place: str
    name: str
    cycle: int
    score: float | None
    outcome: str
    alive: bool
    chosen: bool
    depth: int

    @property
    def sign(self) -> str:
        """What stands for its fate."""
        if self.outcome == "rejected":
            return "×"
        return "★" if self.chosen else "●" if self.alive else "○"


def tree(twigs: Sequence[Twig]) -> str:
    """The tree in a box that scrolls; every row can be reached by keyboard."""
    lines, rows = [], []
    above: dict[int, int] = {}  # the latest row of each depth
    for number, twig in enumerate(twigs):
        x, y = LEFT + INDENT * twig.depth, ROW * number + ROW // 2
        if twig.depth and twig.depth - 1 in above:
            top = ROW * above[twig.depth - 1] + ROW // 2 + 8
            lines.append(f'<path d="M{x - INDENT} {top}V{y}H{x - 8}"/>')
        above[twig.depth] = number
        rows.append(_row(twig, x, y))
    width = LEFT + INDENT * max((twig.depth for twig in twigs), default=0) + TEXT
    return (
        f'{LEGEND}<div class=scroll tabindex=0 role=group aria-label="Tree of candidates">'
        f'<svg class=twigs width="{width}" height="{ROW * len(twigs)}" role="group" '
        f'aria-label="Candidates, each under its parent">{"".join(lines)}{"".join(rows)}</svg>'
        "</div>"
    )


def _row(twig: Twig, x: int, y: int) -> str:
    fate = twig.outcome if twig.score is None else f"{twig.score:.3f}"
    fate += " chosen" if twig.chosen else ""
    return (
        f'<a href="#{twig.place}">'
        f'<rect x="{x - 10}" y="{y - 12}" width="{TEXT - 10}" height="24" rx="4"/>'
        f'<text class="{twig.outcome}{" chosen" if twig.chosen else ""}" x="{x}" y="{y}">'
        f"<tspan class=sign>{twig.sign} </tspan>"
        f'<tspan x="{x + 14}">{escape(twig.name[:12])} </tspan>'
        f'<tspan x="{x + 122}">cycle {twig.cycle:d} </tspan>'
        f'<tspan x="{x + 194}">{fate}</tspan></text></a>'
    )
