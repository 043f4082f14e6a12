"""What failed in a run, by kind, with the first message of each: as its cycles recorded it."""

from __future__ import annotations

from fst_dspy.report.data import Run
from fst_dspy.report.sections import percent, table

LONGEST = 400
"""Characters of a message that are shown."""


def failures(run: Run) -> str:
    """A table of the kinds of failure in all rollouts, those of validation too; most first."""
    shares: dict[str, list[tuple[float, int]]] = {}
    messages: dict[str, str] = {}
    for cycle in run.cycles:
        for kind, share in cycle["failure_shares"].items():
            shares.setdefault(kind, []).append((share, cycle["cycle"]))
        for kind, message in cycle.get("failure_messages", {}).items():
            messages.setdefault(kind, message)
    if not run.cycles:
        return "<p class=none>No cycle has ended yet.</p>"
    if not shares:
        return "<p class=none>No rollout has failed.</p>"
    last = run.cycles[-1]["failure_shares"]
    rows = []
    for kind, found in sorted(shares.items(), key=lambda item: -max(item[1])[0]):
        worst, when = max(found)
        text = " ".join(messages.get(kind, "—").split())
        text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
        rows.append([kind, percent(last.get(kind, 0.0)), f"{percent(worst)} in {when}", text])
    head = ["kind of failure", "share in the last cycle", "highest, in cycle", "first message"]
    return table(head, rows, "Of the rollouts of all channels")
