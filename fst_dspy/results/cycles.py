"""The cycles of a compile as tables: formatted for people, and as a data frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from fst_dspy.display import score_text, table
from fst_dspy.types import CycleRecord

CYCLE_COLUMNS = ("cycle", "step", "train reward", "validation", "KL", "entropy", "rollouts")


def cycle_cells(record: CycleRecord) -> tuple[str, ...]:
    """A cycle's figures, formatted, in the order of ``CYCLE_COLUMNS``."""
    return (
        str(record.cycle),
        str(record.step),
        score_text(record.train_reward),
        score_text(record.val_score),
        f"{record.kl_to_base:.4f}",
        score_text(record.entropy),
        f"{record.total_rollouts.total:,}",
    )


def cycle_table(records: Iterable[CycleRecord]) -> Table:
    """The cycles as a table for a terminal."""
    return table(CYCLE_COLUMNS, map(cycle_cells, records))


def cycle_html(records: Iterable[CycleRecord]) -> str:
    """The cycles as an HTML table."""
    head = "".join(f"<th>{escape(name)}</th>" for name in CYCLE_COLUMNS)
    body = "".join(
        "<tr>"
        + "".join(f"<td class=n>{escape(cell)}</td>" for cell in cycle_cells(record))
        + "</tr>"
        for record in records
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def records_frame(records: Sequence[CycleRecord]) -> Any:
    """The cycles as a ``pandas.DataFrame``: a row a cycle, mappings spread over columns.

    Rollouts of the cycle are ``rollouts_fast`` and so on, all up to its end
    ``total_rollouts_fast`` and so on; failures and seconds likewise. A kind of failure that a
    cycle does not name had a share of 0.
    """
    import pandas as pd

    rows = []
    for record in records:
        row: dict[str, Any] = {}
        for name, value in dataclasses.asdict(record).items():
            if isinstance(value, Mapping):
                row |= {f"{name.removesuffix('_shares')}_{key}": v for key, v in value.items()}
            else:
                row[name] = value
        row["total_rollouts"] = record.total_rollouts.total
        rows.append(row)
    frame = pd.DataFrame(rows)
    kinds = {kind for record in records for kind in record.failure_shares}
    shares = [f"failure_{kind}" for kind in sorted(kinds)]  # not messages, which are texts
    return frame.fillna(dict.fromkeys(shares, 0.0)).set_index("cycle")
