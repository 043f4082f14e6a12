"""Line charts as SVG text, coloured by the page's style sheet: no script, no attribute styles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 38
COLOURS = 6
MARKED = 24
"""A line with more points than this has no marks at them."""


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        label: Its name.
        points: ``(x, y)``, in the order in which they are joined.
        colour: Number of its colour and dash, any integer from 0.
        names: What the pointer is told at each point; the values where empty.
        faint: Whether the line only joins what belongs together.
    """

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int = 0
    names: tuple[str, ...] = ()
    faint: bool = False


def line_chart(
    title: str,
    xlabel: str,
    series: Sequence[Series],
    *,
    low: float | None = None,
    high: float | None = None,
    whole: bool = False,
    caption: str = "",
) -> str:
    """A figure with a caption; a sentence in its place where there is nothing to draw.

    Args:
        title: What the y axis shows; the figure's heading.
        xlabel: What the x axis shows, with its unit.
        series: Any number of lines; points that are not finite are left out.
        low, high: Values that the y axis must include.
        whole: Whether only whole numbers are marked on the x axis, as for cycles.
        caption: More words under the title.
    """
    head = (
        f"<figcaption><b>{escape(title)}</b>{escape(' ' + caption if caption else '')}</figcaption>"
    )
    lines = [(one, _finite(one)) for one in series]
    xs = [x for _, points in lines for _, x, _ in points]
    ys = [y for _, points in lines for _, _, y in points]
    if not xs:
        return f"<figure>{head}<p class=none>Nothing measured yet.</p></figure>"
    x_low, x_high = _span(min(xs), max(xs))
    x_ticks = [
        x for x in ticks(x_low, x_high) if x_low <= x <= x_high and not (whole and x != round(x))
    ]
    y_ticks = ticks(
        min([*ys, *([low] if low is not None else [])]),
        max([*ys, *([high] if high is not None else [])]),
    )

    def place(x: float, y: float) -> tuple[str, str]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f}",
            f"{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}",
        )

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class=yt x="{LEFT - 5}" y="{y}">{number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        side = " end" if float(x) > WIDTH - RIGHT - 8 else ""
        parts.append(
            f'<text class="xt{side}" x="{x}" y="{HEIGHT - BOTTOM + 14}">{number(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts.append(f'<text class=xl x="{middle}" y="{HEIGHT - 5}">{escape(xlabel)}</text>')
    for one, points in lines:
        colour = f"c{one.colour % COLOURS}" + (" dash" if one.colour >= COLOURS else "")
        spots = [place(x, y) for _, x, y in points]
        path = "M" + "L".join(f"{x} {y}" for x, y in spots)
        parts.append(f'<path class="line {"faint" if one.faint else colour}" d="{path}"/>')
        if len(spots) <= MARKED:
            for (n, px, py), (x, y) in zip(points, spots, strict=True):
                name = one.names[n] if one.names else f"{number(px)}: {number(py)}"
                parts.append(
                    f'<circle class="{colour}" cx="{x}" cy="{y}" r="3"><title>'
                    f"{escape(one.label)}, {escape(name)}</title></circle>"
                )
    label = f"{title} against {xlabel}"
    return (
        f'<figure>{head}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg></figure>'
    )


def legend(labels: Sequence[str]) -> str:
    """Which colour is which, as a list."""
    items = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{n % COLOURS}'
        f'{" dash" if n >= COLOURS else ""}" d="M0 4L22 4"/></svg>{escape(label)}</li>'
        for n, label in enumerate(labels)
    )
    return f"<ul class=legend>{items}</ul>"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, evenly spaced, from at or below ``low`` to at or above ``high``."""
    low, high = _span(low, high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _span(low: float, high: float) -> tuple[float, float]:
    """The two, apart from one another."""
    if high - low >= 1e-12 * max(1.0, abs(high)):
        return low, high
    pad = abs(high) / 2 or 0.5
    return low - (pad if low else 0.0), high + pad


def number(value: float) -> str:
    """A short form: ``12k``, ``0.25``, ``1e-05``."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def _finite(series: Series) -> list[tuple[int, float, float]]:
    return [
        (n, x, y) for n, (x, y) in enumerate(series.points) if math.isfinite(x) and math.isfinite(y)
    ]
