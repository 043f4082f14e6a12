"""How the outcome of a compile shows itself in a notebook and in a terminal."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from fst_dspy.display import (
    CYCLE_COLUMNS,
    cycle_cells,
    cycle_table,
    diff_text,
    notebook_html,
    origin,
)
from fst_dspy.word_diff import changed_components, diff_html

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fst_dspy.result import FSTResult


def result_html(result: FSTResult) -> str:
    """Headline figures, the cycles, and what the best candidate changed in the student's texts."""
    figures = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in headline(result)
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in CYCLE_COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(f"<td class=n>{escape(cell)}</td>" for cell in cycle_cells(record))
        + "</tr>"
        for record in result.records
    )
    changes = "".join(
        f"<div><code>{escape(name)}</code><pre>{diff_html(before, after)}</pre></div>"
        for name, before, after in _changes(result)
    )
    return notebook_html(
        f"<p><b>Fast-Slow Training</b></p><table><tbody>{figures}</tbody></table>"
        f"<details><summary>{len(result.records)} cycles</summary><table><thead><tr>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table></details>"
        f"<p><b>What the best candidate changed</b></p>{changes or '<p>Nothing.</p>'}"
    )


def result_rich(result: FSTResult) -> RenderableType:
    """The same for a terminal."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    figures = Table.grid(padding=(0, 2))
    for name, value in headline(result):
        figures.add_row(Text(name, style="dim"), Text(value))
    changes: list[RenderableType] = [
        Panel(diff_text(before, after), title=Text(name), title_align="left")
        for name, before, after in _changes(result)
    ]
    return Group(
        Panel(figures, title="Fast-Slow Training", title_align="left"),
        cycle_table(result.records),
        *(changes or [Text("The best candidate is the student's own.")]),
    )


def headline(result: FSTResult) -> list[tuple[str, str]]:
    """The figures one asks for first, as names and formatted values."""
    first, last = result.records[0], result.records[-1]
    best = result.records[result.best.cycle]
    counts = result.rollouts
    return [
        ("arm, seed", f"{result.arm}, {result.seed}"),
        (
            "validation score",
            f"{first.val_score:.3f} → {result.best.score:.3f} (best, cycle {result.best.cycle} "
            f"of {last.cycle})",
        ),
        ("KL to the base model", f"{best.kl_to_base:.4f} nats a token, at the best"),
        (
            "rollouts",
            f"{counts.total:,} (fast {counts.fast:,}, slow {counts.slow:,}, validation "
            f"{counts.eval:,}); {counts.reused:,} reused",
        ),
        ("optimizer steps", str(last.step)),
        ("best weights", result.best.version),
        ("best candidate", origin(result.best.candidate)),
        ("run folder", result.log_dir or "none"),
    ]


def _changes(result: FSTResult) -> list[tuple[str, str, str]]:
    return changed_components(result.seed_candidate.components, result.best.candidate.components)
