"""Several runs as a table of differences: figures beside the settings in which the runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fst_dspy.config import without_removed
from fst_dspy.report import data
from fst_dspy.report.charts.agents import env_steps
from fst_dspy.report.charts.cost import money
from fst_dspy.report.charts.curves import folded, score_bounds
from fst_dspy.report.data import Run
from fst_dspy.report.intervals import gain_of
from fst_dspy.report.sections import duration, percent, table

Cell = tuple[str, float | None]
"""What a cell says, and what it is sorted by: ``None`` where that is the text."""

NOTHING: Cell = ("—", None)


def compare(runs: Sequence[Run]) -> str:
    """A row a run, the best validation score first; a click on a heading sorts by it."""
    ranked = sorted(runs, key=_best_score, reverse=True)
    flat = {id(run): flat_settings(run) for run in ranked}
    differ = differing(list(flat.values()))
    figures = [_figures(run, ranked[0]) for run in ranked]
    # A figure that no run has is no column.
    names = [name for name in figures[0] if any(row[name] != NOTHING for row in figures)]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("run", *names, *differ))
    body = []
    for run, row in zip(ranked, figures, strict=True):
        cells = [row[name] for name in names]
        settings: list[Cell] = [_setting(flat[id(run)].get(name)) for name in differ]
        body.append(
            f'<tr><th scope="row">{escape(run.label)}</th>'
            + "".join(map(_td, (*cells, *settings)))
            + "</tr>"
        )
    return (
        "<p>Best first; a heading sorts. Differences are to the first run, of the same validation "
        "examples one by one, with 95 % intervals: where 0 lies in one, it may be chance. Of the "
        "settings, those are shown in which the runs differ.</p>"
        '<div class=scroll tabindex=0 role=group aria-label="The runs side by side">'
        f"<table class=sortable><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
        "</table></div>"
    )


def _td(cell: Cell) -> str:
    text, value = cell
    key = "" if value is None else f' data-value="{value:.12g}"'
    return f"<td{key}>{escape(text)}</td>"


def _setting(value: Any) -> Cell:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    return ("—" if value is None else str(value)), number


def _figures(run: Run, top: Run) -> dict[str, Cell]:
    best, last = data.best_cycle(run), (run.cycles[-1] if run.cycles else None)
    if best is None or last is None:
        return dict.fromkeys(FIGURES, NOTHING)
    bounds = score_bounds(run, best)
    score = f"{best['val_score']:.3f}"
    if bounds:
        score += f" ({bounds[0]:.3f} to {bounds[1]:.3f})"
    counts, seconds = last["total_rollouts"], sum(data.spent(run).values())
    failed = sum(last["failure_shares"].values())
    cells: list[Cell] = [
        (score, best["val_score"]),
        _difference(run, top),
        (f"{data.first_score(run):.3f}", data.first_score(run)),
        NOTHING,
        (f"{best['kl_to_base']:.4f}", best["kl_to_base"]),
        (f"{data.total(counts):,}", data.total(counts)),
        (f"{last['step']:,}", last["step"]),
        (duration(seconds), seconds),
        (f"{sum(last['tokens'].values()):,}", sum(last["tokens"].values())),
        (percent(failed), failed),
        NOTHING,
        NOTHING,
    ]
    found = dict(zip(FIGURES, cells, strict=True))
    if run.quadrants:
        test = run.quadrants["trained_evolved"]
        found["test score"] = (f"{test:.3f}", test)
    if steps := env_steps(run):
        found["environment steps"] = (f"{steps:,}", steps)
    if (paid := money(run)) is not None:
        found["reflection LM"] = (f"${paid:,.4f}", paid)
    return found


FIGURES = (
    "best validation (95 %)", "difference", "before learning", "test score", "KL", "rollouts",
    "steps", "time", "tokens", "failures in the last cycle", "environment steps", "reflection LM",
)  # fmt: skip


def _best_score(run: Run) -> float:
    best = data.best_cycle(run)
    return float("-inf") if best is None else best["val_score"]


def _difference(run: Run, top: Run) -> Cell:
    if run is top:
        return NOTHING
    ours, theirs = _best_score(run), _best_score(top)
    if theirs == float("-inf"):
        return NOTHING
    text = f"{ours - theirs:+.3f}"
    same = run.config["val_ids"] == top.config["val_ids"]
    own, others = data.best_scores(run), data.best_scores(top)
    if same and own and len(own) == len(others):
        gain = gain_of(others, own)
        if gain.bounds is not None:
            low, high = gain.bounds
            text += f" ({low:+.3f} to {high:+.3f})"
    return text, ours - theirs


# --- settings -------------------------------------------------------------------------------------


def flat_settings(run: Run) -> dict[str, Any]:
    """Everything that was set, by dotted name, with the sizes of the data.

    What an earlier version did not have stands with the value that says what it did.
    """
    shown = {
        **{key: run.config.get(key) for key in ("arm", "seed", "model")},
        **without_removed(run.config.get("settings", {})),
        "environment": run.config.get("environment", {}),
    }
    flat = data.dotted_settings(shown)
    flat["train examples"] = len(run.config.get("train_ids", ()))
    flat["validation examples"] = len(run.config.get("val_ids", ()))
    return flat


def differing(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all columns."""
    names = dict.fromkeys(name for flat in columns for name in flat)
    return [name for name in names if len({repr(flat.get(name)) for flat in columns}) > 1]


def settings(runs: Sequence[Run]) -> str:
    """Settings of all runs side by side; those that differ first."""
    columns = [flat_settings(run) for run in runs]
    differ = differing(columns)
    same = [name for name in columns[0] if name not in differ]
    head = ["setting", *(run.label for run in runs)]

    def rows(wanted: Sequence[str]) -> list[list[str]]:
        return [[name, *(str(flat.get(name, "—")) for flat in columns)] for name in wanted]

    if len(runs) == 1:
        return table(head, rows(same))
    changed = table(head, rows(differ), "Settings that differ") if differ else ""
    alike = [row[:2] for row in rows(same)]
    return changed + folded("Settings that are the same", head[:2], alike, "The same in all runs")
