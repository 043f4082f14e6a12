"""What a run cost: rollouts, time, tokens, memory, money."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from fst_dspy.report import data
from fst_dspy.report.charts.curves import folded
from fst_dspy.report.charts.figure import Line, figure
from fst_dspy.report.data import Run
from fst_dspy.report.sections import Html, duration, percent, table

NAMES = {"fast": "fast", "slow": "slow", "eval": "validation"}
CHANNELS = {channel: (name, channel) for channel, name in NAMES.items()}
TOKENS = {"prompt": ("prompt", "c2"), "completion": ("completion", "c3")}
"""Parts of what a cycle cost: their names, and their colours in the style sheet."""
MEANT = {"tokens": ": prompts below, completions above"}
GIB = 2**30


def cost(run: Run) -> str:
    """Figures, and bars by cycle with a table of the channels."""
    if not run.cycles:
        return "<p class=none>Nothing measured yet.</p>"
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in cost_facts(run)
    )
    key = "".join(
        f'<li><span class="key {channel}"></span>{name}</li>' for channel, name in NAMES.items()
    )
    bars = _bars(run)
    figures = [
        figure(name.title(), "cycle", lines, whole=True, kind="stack",
               caption=f"of each cycle{MEANT.get(name, '')}")
        for name, lines in bars.items()
    ]  # fmt: skip
    return (
        f"<dl>{facts}</dl><ul class=legend>{key}</ul><div class=charts>{''.join(figures)}</div>"
        f"{_channels(run)}{_counted_as(run)}{_table(run, bars)}"
    )


def _counted_as(run: Run) -> str:
    """Where validation's rollouts are counted, in runs that count them elsewhere."""
    fast = run.config.get("settings", {}).get("fast", {})
    if run.config.get("arm") == "rl_only" or (
        run.config.get("arm") == "fst" and fast.get("reuse") is not False
    ):
        return ""
    return (
        "<p><small>The rollouts that validate the population count as fast, since the fast channel "
        "learns from their scores; their time is under validation.</small></p>"
    )


def _table(run: Run, bars: Mapping[str, Sequence[Line]]) -> str:
    """The figures of the bars, which are of each cycle."""
    head = [f"{line.label}, {name}" for name, lines in bars.items() for line in lines]
    rows = [
        [str(cycle["cycle"])]
        + [f"{line.points[n][1]:,.0f}" for lines in bars.values() for line in lines]
        for n, cycle in enumerate(run.cycles)
    ]
    title = f"What each cycle of {run.label} cost, as a table"
    return folded(title, ["cycle", *head], rows, f"Cost of {run.label}")


def cost_facts(run: Run) -> list[tuple[str, str, str]]:
    """Name, value and note of each sum, of those that the run recorded."""
    last = run.cycles[-1]
    counts, tokens = last["total_rollouts"], last["tokens"]
    seconds = sum(data.spent(run).values())
    facts = [
        (
            "rollouts",
            f"{data.total(counts):,}",
            f"{counts['reused']:,} more reused, which cost nothing",
        ),
        ("time", duration(seconds), f"{data.total(counts) / max(seconds, 1e-9):.3g} a second"),
        (
            "tokens",
            f"{sum(tokens.values()):,}",
            ", ".join(f"{n:,} {kind}" for kind, n in tokens.items()),
        ),
    ]
    if peak := max((cycle.get("peak_memory", 0) for cycle in run.cycles), default=0):
        facts.append(("peak memory", f"{peak / GIB:.2f} GiB", "of the process, or of its GPU"))
    reflection = last.get("proposals", {}).get("reflection")
    if reflection:
        unpriced = reflection["unpriced"]
        facts.append(
            (
                "reflection LM",
                f"${reflection['cost']:,.4f}",
                f"{reflection['calls']:,} calls, {reflection['tokens']:,} tokens"
                + (f"; {unpriced:,} calls at a price that is not known" if unpriced else ""),
            )
        )
    return facts


def _bars(run: Run) -> dict[str, list[Line]]:
    """Rollouts, seconds and tokens: for each part of them what a cycle added to it."""
    return {
        "rollouts": _parts(run, "total_rollouts", CHANNELS),
        "seconds": _parts(run, "seconds", CHANNELS),
        "tokens": _parts(run, "tokens", TOKENS),
    }


def _parts(run: Run, key: str, parts: Mapping[str, tuple[str, str]]) -> list[Line]:
    """From sums since the start of the run."""
    lines = []
    for part, (name, colour) in parts.items():
        before, points = 0.0, []
        for cycle in run.cycles:
            now = float(cycle[key].get(part, before))
            points.append((float(cycle["cycle"]), max(0.0, now - before)))
            before = now
        lines.append(Line(name, points, colour))
    return lines


def _channels(run: Run) -> str:
    last = run.cycles[-1]
    counts, seconds = last["total_rollouts"], data.spent(run)
    rows = []
    for channel, name in NAMES.items():
        share = counts[channel] / max(1, data.total(counts))
        time_share = seconds.get(channel, 0.0) / max(1e-9, sum(seconds.values()))
        rows.append(
            [
                Html(f'<span class=nowrap><span class="key {channel}"></span>{name}</span>'),
                f"{counts[channel]:,}",
                percent(share),
                duration(seconds.get(channel, 0.0)),
                percent(time_share),
            ]
        )
    rows.append(["reused", f"{counts['reused']:,}", "", "", ""])
    return table(["channel", "rollouts", "share", "time", "share of time"], rows)


def money(run: Run) -> float | None:
    """US dollars that reflection cost, ``None`` where none was paid for."""
    reflection = run.cycles[-1].get("proposals", {}).get("reflection") if run.cycles else None
    return float(reflection["cost"]) if reflection else None
