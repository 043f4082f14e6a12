"""A chart as HTML: a figure that carries its own numbers, which the page's script draws with uPlot.

The numbers stand in an attribute, as JSON: no script but the page's own is in the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from fst_dspy.report.charts.intervals import Bounds

COLOURS = 6

Ends = tuple[float | None, float | None]
ZERO: Ends = (0.0, None)
SHARE: Ends = (0.0, 1.0)


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        label: Its name.
        points: ``(x, y)``, in the order in which they are joined; a y that is ``None`` or not
            finite is left out.
        colour: Number of its colour and dash, from 0; or the name of a colour of the style sheet.
        bounds: Low and high of each point, ``None`` where not known; empty for a line alone.
        names: What each point is called when it is pointed at; empty for its x alone.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    colour: int | str = 0
    bounds: Sequence[Bounds | None] = ()
    names: Sequence[str] = ()


def figure(
    title: str,
    xlabel: str,
    lines: Sequence[Line],
    *,
    ends: Ends = (None, None),
    whole: bool = False,
    kind: Literal["lines", "path", "stack"] = "lines",
    caption: str = "",
) -> str:
    """A figure with a caption; a sentence in its place where there is nothing to draw.

    Args:
        title: What the y axis shows; the figure's heading.
        xlabel: What the x axis shows, with its unit.
        lines: Any number; those without a point to draw are left out.
        ends: Where the y axis begins and ends, if no value lies beyond; ``None`` where it is the
            values' own.
        whole: Whether x is a whole number, as for cycles.
        kind: ``"lines"`` over a growing x; ``"path"``, joined as given, whatever way x goes;
            ``"stack"``, bars upon one another, which begin at 0.
        caption: More words under the title.
    """
    more = escape(" " + caption if caption else "")
    head = f"<figcaption><b>{escape(title)}</b>{more}</figcaption>"
    drawn = [line for line in lines if any(_finite(x) and _finite(y) for x, y in line.points)]
    if not drawn:
        return f"<figure>{head}<p class=none>Nothing measured yet.</p></figure>"
    data: dict[str, Any] = {
        **_aligned(drawn, kind == "path"),
        "x": xlabel,
        "y": title,
        "kind": kind,
        "whole": whole,
    }
    data |= {name: end for name, end in zip(("low", "high"), ends, strict=True) if end is not None}
    text = escape(json.dumps(data, ensure_ascii=False, separators=(",", ":")), quote=False)
    quoted = text.replace("'", "&#x27;")
    return f"<figure data-chart='{quoted}'>{head}</figure>"


def score_range(values: Sequence[float | None]) -> Ends:
    """The ends of an axis of scores: 0 and 1 where none lies beyond, else what there is."""
    found = [value for value in values if value is not None]
    inside = bool(found) and min(found) >= 0 and max(found) <= 1
    return SHARE if inside else (None, None)


def legend(labels: Sequence[str]) -> str:
    """Which colour is which, as a list."""
    items = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{n % COLOURS}'
        f'{" dash" if n >= COLOURS else ""}" d="M0 4L22 4"/></svg>{escape(label)}</li>'
        for n, label in enumerate(labels)
    )
    return f"<ul class=legend>{items}</ul>"


def _aligned(lines: Sequence[Line], ordered: bool) -> dict[str, Any]:
    """All lines over one growing x, as uPlot wants them: ``None`` where a line has no point.

    Points of one line that share an x stay apart. ``ordered`` keeps the order in which they came.
    """
    places: dict[tuple[float, int], int] = {}
    keyed = []
    for line in lines:
        seen: dict[float, int] = {}
        keys = []
        for x, y in line.points:
            at = seen[x] = seen.get(x, -1) + 1
            keys.append((x, at) if _finite(x) and _finite(y) else None)
        keyed.append(keys)
        places |= dict.fromkeys((key for key in keys if key is not None), 0)
    places = {key: n for n, key in enumerate(sorted(places))}
    columns = []
    for line, keys in zip(lines, keyed, strict=True):
        rows = [(n, places[key]) for n, key in enumerate(keys) if key is not None]
        ys: list[Any] = [None] * len(places)
        column: dict[str, Any] = {"label": line.label, "colour": line.colour, "ys": ys}
        for n, place in rows:
            ys[place] = _short(line.points[n][1])
        if any(line.bounds):
            column["lo"], column["hi"] = [None] * len(places), [None] * len(places)
            for n, place in rows:
                if bound := line.bounds[n]:
                    column["lo"][place], column["hi"][place] = map(_short, bound)
        if line.names:
            column["names"] = [""] * len(places)
            for n, place in rows:
                column["names"][place] = line.names[n]
        if ordered:
            column["order"] = [place for _, place in rows]
        columns.append(column)
    return {"xs": [_short(x, 10) for x, _ in places], "lines": columns}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float | None, digits: int = 5) -> float | int | None:
    if value is None:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
