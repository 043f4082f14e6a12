"""Score, reward and drift of all runs, laid over one another, and the same figures as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from fst_dspy.report import data
from fst_dspy.report.charts.figure import Line, figure, score_range
from fst_dspy.report.charts.shares import shares
from fst_dspy.report.data import Run
from fst_dspy.report.faults import FORMAT
from fst_dspy.report.intervals import Bounds, interval, wilson
from fst_dspy.report.rollouts import Outcome
from fst_dspy.report.sections import percent, table

ROLLOUTS_AXIS = "rollouts, all channels"
MOST_STEPS = 300
"""Rows of the table of steps; of more steps it has every second, third, ..."""


def curves(runs: Sequence[Run], outcomes: Sequence[Sequence[Outcome]]) -> str:
    """Charts of what was learned, with 95 % intervals; none of weights that never moved.

    Args:
        runs: The runs.
        outcomes: The logged rollouts of each.
    """
    validated = [(run, [score_bounds(run, cycle) for cycle in run.cycles]) for run in runs]
    trained = [mean_bounds(own, lambda outcome: outcome.reward) for own in outcomes]
    scores = [cycle["val_score"] for run in runs for cycle in run.cycles]
    rewards = [cycle["train_reward"] for run in runs for cycle in run.cycles]
    by_step = [step["reward"] for run in runs for step in run.steps]
    moved = any(cycle["kl_to_base"] for run in runs for cycle in run.cycles)
    figures = [
        figure(
            "Validation score",
            ROLLOUTS_AXIS,
            [
                line(run, colour, "val_score", bounds)
                for colour, (run, bounds) in enumerate(validated)
            ],
            ends=score_range(scores),
            caption="of the best candidate, with 95 % intervals",
        ),
        figure(
            "Validation score",
            "KL to the base model, nats a token",
            [line(run, colour, "val_score", x="kl_to_base") for colour, run in enumerate(runs)]
            if moved
            else [],
            kind="path",
            ends=score_range(scores),
            caption="against KL, cycle by cycle: what the score cost in drift",
        ),
        figure(
            "Train reward",
            ROLLOUTS_AXIS,
            [
                line(run, colour, "train_reward", [found.get(row["cycle"]) for row in run.cycles])
                for colour, (run, found) in enumerate(zip(runs, trained, strict=True))
            ],
            ends=score_range(rewards),
            caption="mean of a cycle, with 95 % intervals over its problems",
        ),
        figure(
            "Train reward",
            "optimizer step",
            by_steps(runs, lambda step: step["reward"]),
            whole=True,
            ends=score_range(by_step),
            caption="by step",
        ),
    ]
    if not any(figures):
        return "<p class=none>Nothing measured yet.</p>"
    return f"<div class=charts>{''.join(figures)}</div>" + "".join(map(_tables, runs))


def line(
    run: Run,
    colour: int,
    y: str,
    bounds: Sequence[Bounds | None] = (),
    x: str | None = None,
) -> Line:
    """A figure of each cycle of a run over its rollouts, or over another of its figures, ``x``."""
    points = [
        (
            float(data.total(cycle["total_rollouts"]) if x is None else cycle[x]),
            cycle.get(y),
        )
        for cycle in run.cycles
    ]
    names = [f"cycle {cycle['cycle']}" for cycle in run.cycles]
    return Line(run.label, points, colour, bounds, names)


def by_steps(runs: Sequence[Run], y: Callable[[Mapping[str, Any]], float | None]) -> list[Line]:
    """A figure of each optimizer step of the runs."""
    return [
        Line(run.label, [(float(step["step"]), y(step)) for step in run.steps], colour)
        for colour, run in enumerate(runs)
    ]


def score_bounds(run: Run, cycle: Mapping[str, Any]) -> Bounds | None:
    """The interval of a cycle's validation score.

    Of the scores themselves where they are kept; Wilson's, which is then rather too wide, where
    only their mean is and all scores of the run lie between 0 and 1.
    """
    for row in run.populations:
        if row["cycle"] == cycle["cycle"] and data.is_validated(run, row) and row["score_K_V"]:
            ids = [candidate["id"] for candidate in row["candidates"]]
            if cycle["best_candidate_id"] in ids:
                return interval(row["score_K_V"][ids.index(cycle["best_candidate_id"])])
    count = len(run.config["val_ids"])
    if count and all(0 <= one["val_score"] <= 1 for one in run.cycles) and _in_unit(run):
        return wilson(cycle["val_score"], count)
    return None


def _in_unit(run: Run) -> bool:
    ranges = [cycle.get("reward_range") for cycle in run.cycles]
    known = [one for one in ranges if one is not None]
    return bool(known) and all(low >= 0 and high <= 1 for low, high in known)


def mean_bounds(
    outcomes: Sequence[Outcome], value: Callable[[Outcome], float]
) -> dict[int, Bounds | None]:
    """By cycle, the interval of the mean of a value, over groups: a group's are not independent."""
    groups: dict[int, dict[tuple[int, str], list[float]]] = {}
    for outcome in outcomes:
        own = groups.setdefault(outcome.cycle, {})
        own.setdefault((outcome.step, outcome.example_id), []).append(value(outcome))
    return {
        cycle: interval([sum(values) / len(values) for values in own.values()])
        for cycle, own in groups.items()
    }


# --- the same figures as tables -------------------------------------------------------------------


def _tables(run: Run) -> str:
    return shares(run) + _cycle_table(run) + _step_table(run)


def _cycle_table(run: Run) -> str:
    rows = []
    for row in run.cycles:
        bounds = score_bounds(run, row)
        score = cell(row["val_score"])
        rows.append(
            [
                str(row["cycle"]),
                str(row["step"]),
                cell(row["train_reward"]),
                f"{score} ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else score,
                cell(row["kl_to_base"], 4),
                cell(row["entropy"]),
                percent(row["constant_group_share"]),
                cell(row.get("format_share")),
                f"{data.total(row['total_rollouts']):,}",
                row["best_candidate_id"],
            ]
        )
    head = (
        "cycle", "step", "train reward", "validation (95 %)", "KL", "entropy", "constant groups",
        "format share", "rollouts", "best candidate",
    )  # fmt: skip
    return folded(f"The cycles of {run.label} as a table", head, rows, f"Cycles of {run.label}")


def _step_table(run: Run) -> str:
    if not run.steps:
        return ""
    every = -(-len(run.steps) // MOST_STEPS)
    names = {
        "loss": "loss", "grad_norm": "gradient norm", "learning_rate": "learning rate",
        "entropy": "entropy", "clip_share": "clipped",
    }  # fmt: skip
    rows = [
        [
            str(step["step"]),
            str(step["cycle"]),
            cell(step["reward"]),
            cell(parsed_share(step)),
            percent(step["constant_group_share"]),
            *(f"{s:.3g}" if (s := step["stats"].get(key)) is not None else "—" for key in names),
            step["stats"]["skipped"] or "",
        ]
        for step in run.steps[::every]
    ]
    head = ("step", "cycle", "reward", "parsed", "constant groups", *names.values(), "skipped")
    more = f", one of every {every}" if every > 1 else ""
    return folded(f"The steps of {run.label} as a table{more}", head, rows, f"Steps of {run.label}")


def folded(summary: str, head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table that is shown when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{table(head, rows, caption)}</details>"


def parsed_share(step: Mapping[str, Any]) -> float:
    """The share of a step's rollouts whose answers had the adapter's format."""
    failed = sum(step["failures"].get(kind, 0) for kind in FORMAT)
    return max(0.0, 1 - failed / max(1, step["rollouts"]))


def cell(value: float | None, digits: int = 3) -> str:
    """A number as a cell of a table shows it."""
    return "—" if value is None else f"{value:.{digits}f}"
