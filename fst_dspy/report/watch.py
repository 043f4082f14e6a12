"""A run folder as a live view in the terminal, read again and again while the run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from fst_dspy.display import changed_components, diff_text, named_lines, panel, table
from fst_dspy.report import data
from fst_dspy.report.charts.agents import Acted, acted
from fst_dspy.report.data import Run
from fst_dspy.report.faults import skipped_steps
from fst_dspy.report.sections import duration, percent
from fst_dspy.results.cycles import cycle_table
from fst_dspy.run.records import cycle_record

BARS = "▁▂▃▄▅▆▇█"
SHOWN_CYCLES = 8
SHOWN_STEPS = 60


def watch(
    folder: Path,
    console: Console,
    every: float = 2.0,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Show the run until it has finished; where there is no terminal, once.

    Args:
        folder: The run folder.
        console: Where to draw.
        every: Seconds between two looks at the folder.
        sleep: Waits.

    Raises:
        StoreError: Not a run folder, or a damaged one.
    """
    run = data.read_run(folder)
    if not console.is_terminal:
        console.print(run_view(run))
        return
    with Live(run_view(run), console=console, auto_refresh=False) as live:
        while not run.finished:
            sleep(every)
            run = data.read_run(folder)
            live.update(run_view(run), refresh=True)


def run_view(run: Run) -> RenderableType:
    """The run as it stands: headline, cycles, steps, population and the best instructions."""
    state = "finished" if run.finished else f"last written {duration(run.age)} ago"
    about = f"{run.config.get('arm')}, seed {run.config.get('seed')}, {run.config.get('model')}"
    parts: list[RenderableType] = [panel(run.label, f"{about} · {state}")]
    if run.cycles:
        parts.append(_cycles(run))
    if run.steps:
        parts.append(_steps(run.steps))
    if found := acted(run):
        parts.append(_agent(found))
    parts += _population(run)
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """Values as bars of one line, from the lowest to the highest; a gap where one is not finite."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BARS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values
    )


def _cycles(run: Run) -> Table:
    shown = cycle_table(cycle_record(row) for row in run.cycles[-SHOWN_CYCLES:])
    shown.caption = None if len(run.cycles) <= SHOWN_CYCLES else f"of {len(run.cycles)}"
    return shown


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    newest = steps[-SHOWN_STEPS:]
    reward = [step["reward"] for step in newest]
    entropy = [step["stats"]["entropy"] for step in newest]
    failed = [sum(step["failures"].values()) / max(1, step["rollouts"]) for step in newest]
    return named_lines(
        [
            ("steps", f"{steps[-1]['step']} taken or skipped ({_skipped(steps)})"),
            ("reward", f"{sparkline(reward)} {reward[-1]:.3f}"),
            ("entropy", f"{sparkline(entropy)} {entropy[-1]:.3f} nats a token"),
            ("failures", f"{sparkline(failed)} {percent(failed[-1])} of the rollouts"),
        ]
    )


def _agent(found: Sequence[Acted]) -> Table:
    last = found[-1]
    turns = [one.turns or 0.0 for one in found]
    invalid = [one.invalid_share or 0.0 for one in found]
    took = f"{last.errors:,} failed, {duration(last.seconds)}"
    return named_lines(
        [
            ("environment", f"{last.steps:,} steps ({took})"),
            ("turns", f"{sparkline(turns)} {turns[-1]:.1f} an episode"),
            ("invalid", f"{sparkline(invalid)} {percent(invalid[-1])} of the actions"),
        ]
    )


def _skipped(steps: Sequence[Mapping[str, Any]]) -> str:
    skipped = skipped_steps(steps)
    return ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none skipped"


def _population(run: Run) -> list[RenderableType]:
    found = data.pareto(run)
    if found is None:
        return []
    known = data.candidates(run)
    rows = []
    for name, mean, wins in zip(found.candidate_ids, found.mean_K, found.wins_K, strict=True):
        candidate = known[name]
        words = f"{name} · {candidate.source}, cycle {candidate.cycle}"
        rows.append((words, f"{mean:.3f}", wins))
    head = ("candidate", "mean", "best on")
    ranking = table(head, rows, f"population after cycle {found.cycle}", left=1)
    seed = next(iter(known.values()))
    changes = changed_components(seed.components, known[found.candidate_ids[0]].components)
    panels = [panel(f"best: {name}", diff_text(before, after)) for name, before, after in changes]
    return [ranking, *panels]
