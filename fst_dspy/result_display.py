"""How the outcome of a compile shows itself in a notebook and in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fst_dspy.display import (
    CYCLE_COLUMNS,
    cycle_cells,
    cycle_table,
    diff_text,
    notebook_html,
    origin,
    score_text,
)
from fst_dspy.results import plots
from fst_dspy.types import Candidate
from fst_dspy.word_diff import changed_components, diff_html

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fst_dspy.results.result import FSTResult


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
    changes = _diffs_html(_changes(result))
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


# --- lineage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lineage:
    """Candidates, oldest first, each with what it changed in the texts it came from.

    Attributes:
        nodes: Their parents and last scores.
        candidates: The same ones, with their texts, by id.
        seed: The student's own texts; those of a candidate whose parents are not known are
            compared with them.
    """

    nodes: tuple[plots.LineageNode, ...]
    candidates: dict[str, Candidate]
    seed: Candidate

    @classmethod
    def of(cls, result: FSTResult) -> Lineage:
        """The lineage of a result's known candidates."""
        known = result.candidates()
        nodes = plots.lineage(known, result.records)
        return cls(tuple(nodes), {one.id: one for one in known}, result.seed_candidate)

    def changes(self) -> Iterator[tuple[plots.LineageNode, Candidate, list[tuple[str, str, str]]]]:
        """Each node with the candidate it is compared with, and what it changed there.

        The student's own candidate is compared with an empty one.
        """
        for node in self.nodes:
            after = self.candidates[node.id]
            before = self.candidates[node.parent_ids[0]] if node.parent_ids else self.seed
            if before.id == after.id:
                before = Candidate("nothing", {})
            yield node, before, changed_components(before.components, after.components)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td class=n>{score_text(node.score)}</td><td><details{' open' * node.best}>"
            f"<summary>{escape(origin(self.candidates[node.id]))}{' <b>best</b>' * node.best}"
            f"</summary><p>Against {escape(before.id)}:</p>{_diffs_html(changes)}</details></td>"
            "</tr>"
            for node, before, changes in self.changes()
        )
        return notebook_html(
            "<table><thead><tr><th>last score</th><th>candidate</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        panels = []
        for node, before, changes in self.changes():
            title = f"{score_text(node.score)} · {origin(self.candidates[node.id])}"
            texts = [Text(f"Against {before.id}:", style="dim")]
            texts += [diff_text(old, new) for _, old, new in changes]
            title += " · best" * node.best
            panels.append(Panel(Group(*texts), title=Text(title), title_align="left"))
        return Group(*panels)


def _diffs_html(changes: list[tuple[str, str, str]]) -> str:
    return "".join(
        f"<div><code>{escape(name)}</code><pre>{diff_html(old, new)}</pre></div>"
        for name, old, new in changes
    )
