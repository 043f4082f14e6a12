"""A run folder as a live view in the terminal, read again and again while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fst_dspy.display import changed_components, diff_text
from fst_dspy.report import data
from fst_dspy.report.data import Run
from fst_dspy.report.faults import skipped_steps
from fst_dspy.report.sections import duration, percent
from fst_dspy.results.cycles import CYCLE_COLUMNS, cycle_cells
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
        StoreError: Not a run folder.
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
    parts: list[RenderableType] = [Panel(Text(f"{about} · {state}"), title=Text(run.label))]
    if run.cycles:
        parts.append(_cycles(run))
    if run.steps:
        parts.append(_steps(run.steps))
    parts += _population(run)
    return Group(*parts)


def sparkline(values: Sequence[float]) -> str:
    """Values as bars of one line, from the lowest to the highest."""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def _cycles(run: Run) -> Table:
    table = Table(caption=None if len(run.cycles) <= SHOWN_CYCLES else f"of {len(run.cycles)}")
    for name in CYCLE_COLUMNS:
        table.add_column(name, justify="right")
    for row in run.cycles[-SHOWN_CYCLES:]:
        table.add_row(*cycle_cells(cycle_record(row)))
    return table


def _steps(steps: Sequence[Mapping[str, Any]]) -> Table:
    newest = steps[-SHOWN_STEPS:]
    reward = [step["reward"] for step in newest]
    entropy = [step["stats"]["entropy"] for step in newest]
    failed = [sum(step["failures"].values()) / max(1, step["rollouts"]) for step in newest]
    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{steps[-1]['step']} taken or skipped ({_skipped(steps)})")
    table.add_row("reward", f"{sparkline(reward)} {reward[-1]:.3f}")
    table.add_row("entropy", f"{sparkline(entropy)} {entropy[-1]:.3f} nats a token")
    table.add_row("failures", f"{sparkline(failed)} {percent(failed[-1])} of the rollouts")
    return table


def _skipped(steps: Sequence[Mapping[str, Any]]) -> str:
    skipped = skipped_steps(steps)
    return ", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "none skipped"


def _population(run: Run) -> list[RenderableType]:
    found = data.pareto(run)
    if found is None:
        return []
    known = data.candidates(run)
    table = Table(title=f"population after cycle {found.cycle}", title_justify="left")
    for name in ("mean", "best on"):
        table.add_column(name, justify="right")
    table.add_column("candidate")
    for name, mean, wins in zip(found.candidate_ids, found.mean_K, found.wins_K, strict=True):
        candidate = known[name]
        words = f"{name} · {candidate.source}, cycle {candidate.cycle}"
        table.add_row(f"{mean:.3f}", str(wins), Text(words))
    seed = next(iter(known.values()))
    changes = changed_components(seed.components, known[found.candidate_ids[0]].components)
    panels = [
        Panel(diff_text(before, after), title=Text(f"best: {name}"), title_align="left")
        for name, before, after in changes
    ]
    return [table, *panels]
