"""Who had the rollouts of a run, what these brought, and what was decided on that."""

from __future__ import annotations

from html import escape

from fst_dspy.report import data
from fst_dspy.report.data import Run
from fst_dspy.report.sections import table

SHARES = {"prompts": "prompts alone", "both": "weights, candidates tried", "weights": "weights"}
"""Who may have had the rollouts of a cycle, as ``CycleRecord.share`` names it, in words."""


def shares(run: Run) -> str:
    """A table of gains and KL by who had the rollouts, and the decisions; empty for old runs."""
    pairs = list(zip(run.cycles, run.cycles[1:], strict=False))
    rows = []
    for share, words in SHARES.items():
        own = [(before, row) for before, row in pairs if row.get("share") == share]
        if own:
            spent = sum(data.total(row["rollouts"]) for _, row in own)
            gain = sum(row["val_score"] - before["val_score"] for before, row in own)
            moved = sum(row["kl_to_base"] - before["kl_to_base"] for before, row in own)
            rows.append([words, str(len(own)), f"{spent:,}", f"{gain:+.3f}", f"{moved:+.4f}"])
    if not rows:
        return ""
    head = ("who had the rollouts", "cycles", "rollouts", "validation", "KL")
    said = "".join(
        f"<li>cycle {int(row['cycle'])}: {escape(text)}</li>"
        for row in run.cycles
        if (text := row.get("decided"))
    )
    brought = table(head, rows, f"What the rollouts of {run.label} brought")
    return brought + (f"<ul>{said}</ul>" if said else "")
