"""Figures, each as a pair: a function that returns the data, and one that draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fst_dspy.types import Candidate, CycleRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """A line of a figure: x and y of equal length."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def score_curves(runs: Mapping[str, Sequence[CycleRecord]]) -> list[Curve]:
    """Validation score against rollouts of all channels, a curve a run.

    Where the fast channel validates candidates itself, a cycle has points before its end.
    """
    return [
        Curve(
            label, tuple(float(spent) for spent, _ in points), tuple(score for _, score in points)
        )
        for label, points in zip(runs, map(_points, runs.values()), strict=True)
    ]


def _points(records: Sequence[CycleRecord]) -> list[tuple[int, float]]:
    return [
        point
        for record in records
        for point in (*record.early_scores, (record.total_rollouts.total, record.val_score))
    ]


def drift_curves(runs: Mapping[str, Sequence[CycleRecord]]) -> list[Curve]:
    """Validation score against KL to the base model, a curve a run."""
    return [
        Curve(
            label,
            tuple(record.kl_to_base for record in records),
            tuple(record.val_score for record in records),
        )
        for label, records in runs.items()
    ]


def draw_comparison(runs: Mapping[str, Sequence[CycleRecord]], title: str) -> Figure:
    """Score against rollouts beside score against KL; runs of one arm share a colour.

    Args:
        runs: Records by label; the part of a label before the first comma is its arm.
        title: Above both panels.
    """
    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    arms = list(dict.fromkeys(label.split(",")[0] for label in runs))
    for axes, curves in ((left, score_curves(runs)), (right, drift_curves(runs))):
        named: set[str] = set()
        for curve in curves:
            arm = curve.label.split(",")[0]
            label = None if arm in named else arm
            named.add(arm)
            colour = f"C{arms.index(arm)}"
            axes.plot(curve.x, curve.y, ".-", color=colour, label=label, alpha=0.7, markersize=4)
    left.set(xlabel="rollouts, all channels", ylabel="validation score", ylim=score_limits(left))
    right.set(xlabel="KL to the base model, nats a token")
    right.set_xscale("symlog", linthresh=0.001)
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    return figure


def score_limits(axes: Axes) -> tuple[float, float]:
    """Limits of y that show the scores drawn so far: all from 0 to 1, and beyond where some are."""
    low, high = axes.dataLim.intervaly
    return min(-0.02, 1.02 * low), max(1.02, 1.02 * high)


@dataclass(frozen=True)
class LineageNode:
    """A candidate in the lineage figure.

    Attributes:
        id: The candidate's id.
        parent_ids: Those of its parents that are in the figure too.
        cycle: Cycle in which it was proposed.
        score: Its last mean score, as in ``CycleRecord.val_scores``; ``None`` where it has none.
        best: Whether it is the best of the last cycle.
    """

    id: str
    parent_ids: tuple[str, ...]
    cycle: int
    score: float | None
    best: bool


def lineage(candidates: Sequence[Candidate], records: Sequence[CycleRecord]) -> list[LineageNode]:
    """The candidates with their parents and last scores, oldest first.

    Args:
        candidates: Those to show; of equal ids the first counts.
        records: The cycles whose scores are taken.
    """
    by_id: dict[str, Candidate] = {}
    for candidate in candidates:
        by_id.setdefault(candidate.id, candidate)
    scores: dict[str, float] = {}
    for record in records:
        scores |= dict(zip(record.candidate_ids, record.val_scores, strict=True))
    best = records[-1].best_candidate_id if records else None
    return [
        LineageNode(
            id=candidate.id,
            parent_ids=tuple(parent for parent in candidate.parent_ids if parent in by_id),
            cycle=candidate.cycle,
            score=scores.get(candidate.id),
            best=candidate.id == best,
        )
        for candidate in sorted(by_id.values(), key=lambda c: (c.cycle, c.id))
    ]


def draw_lineage(nodes: Sequence[LineageNode], title: str = "") -> Figure:
    """Score against the cycle of birth, a line from each parent to its child."""
    from matplotlib.ticker import MaxNLocator

    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    at = {node.id: (node.cycle, node.score) for node in nodes if node.score is not None}
    for node in nodes:
        if node.id not in at:
            continue
        x, y = at[node.id]
        for parent in node.parent_ids:
            if parent in at:
                px, py = at[parent]
                axes.plot((px, x), (py, y), color="C7", alpha=0.6, zorder=1)
        axes.plot(x, y, "*" if node.best else "o", color="C3" if node.best else "C0")
        axes.annotate(node.id[:6], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
    axes.set(xlabel="cycle in which it was proposed", ylabel="last mean score", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    return figure


def draw_curves(curves: Sequence[Curve], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Curves in one panel, with a legend where there is more than one."""
    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        axes.plot(curve.x, curve.y, ".-", label=curve.label)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def reward_curve(records: Sequence[CycleRecord]) -> Curve:
    """Train reward against rollouts, over the cycles that had a slow phase."""
    trained = [record for record in records if record.train_reward is not None]
    return Curve(
        "train reward",
        tuple(float(record.total_rollouts.total) for record in trained),
        tuple(record.train_reward or 0.0 for record in trained),
    )


CHANNELS = ("fast", "slow", "eval")


def channel_counts(records: Sequence[CycleRecord]) -> dict[str, tuple[int, ...]]:
    """Rollouts run in each cycle, by channel."""
    return {
        channel: tuple(getattr(record.rollouts, channel) for record in records)
        for channel in CHANNELS
    }


def draw_channels(cycles: Sequence[int], counts: Mapping[str, Sequence[int]]) -> Figure:
    """Stacked bars of the rollouts in each cycle.

    Args:
        cycles: The cycles' numbers.
        counts: For each channel as many counts as there are cycles.
    """
    from matplotlib.ticker import MaxNLocator

    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    floor = [0] * len(cycles)
    for channel, heights in counts.items():
        axes.bar(cycles, heights, bottom=floor, label=f"{channel}, {sum(heights):,} in all")
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.set(xlabel="cycle", ylabel="rollouts")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


class FourScores(Protocol):
    """What ``fst_dspy.rollouts.evaluate.quadrants`` returns."""

    @property
    def base_original(self) -> float: ...
    @property
    def base_evolved(self) -> float: ...
    @property
    def trained_original(self) -> float: ...
    @property
    def trained_evolved(self) -> float: ...
    @property
    def examples(self) -> int: ...


def draw_quadrants(scores: FourScores) -> Figure:
    """Mean scores of base and trained weights (rows) under both contexts (columns)."""
    from fst_dspy.results.notebook_figure import NotebookFigure

    rows = (
        (scores.base_original, scores.base_evolved),
        (scores.trained_original, scores.trained_evolved),
    )
    figure = NotebookFigure(figsize=(4.2, 3.2), layout="constrained")
    axes = figure.subplots()
    _shade(axes, rows)
    axes.set_xticks((0, 1), ("original context", "evolved context"))
    axes.set_yticks((0, 1), ("base\nweights", "trained\nweights"))
    axes.set_title(f"mean score on {scores.examples:,} examples", fontsize=10)
    return figure


def draw_stream(
    stages: Sequence[str], tasks: Sequence[str], score_S_N: Sequence[Sequence[float | None]]
) -> Figure:
    """Mean scores of a stream of tasks: a row for each of S stages, a column for each of N tasks.

    A score that is ``None`` leaves its cell empty.
    """
    from fst_dspy.results.notebook_figure import NotebookFigure

    size = (1.4 + 1.1 * len(tasks), 0.9 + 0.6 * len(stages))
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _shade(axes, score_S_N)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(stages)), stages)
    axes.set(xlabel="tested on", ylabel="after")
    return figure


def _shade(axes: Axes, rows: Sequence[Sequence[float | None]]) -> None:
    """Cells shaded by their scores, with the scores in them."""
    cells = [[math.nan if score is None else score for score in row] for row in rows]
    top = max(1.0, *(score for row in rows for score in row if score is not None))
    axes.imshow(cells, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for y, row in enumerate(rows):
        for x, score in enumerate(row):
            if score is not None:
                colour = "white" if score > 0.6 * top else "black"
                axes.text(x, y, f"{score:.2f}", ha="center", va="center", color=colour, fontsize=14)
