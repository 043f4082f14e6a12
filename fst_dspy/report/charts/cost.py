"""What a run cost: rollouts, time, tokens, memory, money."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from fst_dspy.report import data
from fst_dspy.report.charts.figure import Line, figure
from fst_dspy.report.data import Run
from fst_dspy.report.sections import Html, duration, percent, table

NAMES = {"fast": "fast", "slow": "slow", "eval": "validation"}
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
    tokens = {"prompt": "c2", "completion": "c3"}
    figures = [
        figure("Rollouts", "cycle", _bars(run, lambda c: c["total_rollouts"]), whole=True,
               kind="stack", caption="of each cycle"),
        figure("Seconds", "cycle", _bars(run, lambda c: c["seconds"]), whole=True, kind="stack",
               caption="of each cycle"),
        figure("Tokens", "cycle",
               _bars(run, lambda c: c["tokens"], {t: (t, colour) for t, colour in tokens.items()}),
               whole=True, kind="stack", caption="of each cycle: prompts below, completions above"),
    ]  # fmt: skip
    return (
        f"<dl>{facts}</dl><ul class=legend>{key}</ul><div class=charts>{''.join(figures)}</div>"
        f"{_channels(run)}<p><small>Where the fast channel is on, the rollouts that validate the "
        "population count as fast, since the fast channel learns from their scores; their time is "
        "under validation.</small></p>"
    )


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


def _bars(
    run: Run,
    sums: Callable[[Mapping[str, Any]], Mapping[str, float]],
    parts: Mapping[str, tuple[str, str]] | None = None,
) -> list[Line]:
    """For each part what a cycle added to it, from sums since the start of the run."""
    named = parts or {channel: (name, channel) for channel, name in NAMES.items()}
    lines = []
    for key, (name, colour) in named.items():
        before, points = 0.0, []
        for cycle in run.cycles:
            now = float(sums(cycle).get(key, before))
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
