"""The figures of a store, each as a function that returns the data and one that draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fst_dspy.errors import DataError
from fst_dspy.experiments.findings.plasticity_tables import ENOUGH, Probe
from fst_dspy.experiments.findings.stream_tables import by_arm, stage_label
from fst_dspy.experiments.runs import Run
from fst_dspy.experiments.streams import Stream
from fst_dspy.measures import mean_curve
from fst_dspy.results.plots import Curve, score_limits

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Band:
    """A line of a figure over several seeds.

    Attributes:
        label: What it is.
        seeds: A curve a seed.
        mean: Their mean, from where all have begun to where the first ends.
    """

    label: str
    seeds: tuple[Curve, ...]
    mean: Curve


def band(label: str, curves: Sequence[Curve]) -> Band:
    """Curves and their mean; between two measurements, a curve keeps the last one.

    Raises:
        DataError: There are no curves.
    """
    if not curves:
        raise DataError(f"there is no curve of {label}")
    return Band(label, tuple(curves), mean_curve(curves, label))


def probe_bands(found: Mapping[str, Sequence[Probe]]) -> list[Band]:
    """Validation score on the second task against its rollouts, a band a starting point."""
    return [
        band(label, [probe.run.held_curve for probe in group]) for label, group in found.items()
    ]


def share_bands(found: Mapping[str, Sequence[Probe]]) -> list[Band]:
    """Best score so far over what the base reaches in the end, where the base learned anything."""
    bands = []
    for label, group in found.items():
        curves = []
        for probe in group:
            if probe.counts:
                held = probe.run.held_curve
                best = accumulate(held.y, max)
                curves.append(Curve(label, held.x, tuple(s / probe.base.best for s in best)))
        if curves:
            bands.append(band(label, curves))
    return bands


def draw_plasticity(found: Mapping[str, Sequence[Probe]], title: str) -> Figure:
    """The second task from each starting point: scores, and shares of what the base reaches."""
    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = list(found)
    for axes, bands in ((left, probe_bands(found)), (right, share_bands(found))):
        for one in bands:
            colour = f"C{labels.index(one.label)}"
            _draw_band(axes, one, colour)
        axes.set(xlabel="rollouts on the second task, all channels")
        axes.set_ylim(bottom=min(0, axes.dataLim.y0))
        axes.grid(alpha=0.25)
    right.axhline(ENOUGH, color="black", linestyle=":", linewidth=1, label=f"{ENOUGH:.0%} of it")
    left.set(ylabel="validation score")
    right.set(ylabel="best so far, over the base's best")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class StageLine:
    """A task's test scores over the stages of one arm.

    Attributes:
        scores: Over the stages' numbers, from 0 for before the first.
        alone: Mean single-task peak; ``None`` where no such compile has ended.
    """

    scores: Band
    alone: float | None


def stage_lines(streams: Sequence[Stream], runs: Sequence[Run], task: str) -> list[StageLine]:
    """The lines of one task, an arm each."""
    lines = []
    for arm, group in by_arm(streams).items():
        peaks = [p for p in (stream.alone(task, runs) for stream in group) if p is not None]
        numbers = range(len(group[0].outcome.score_S_N))
        curves = [
            Curve(arm, tuple(map(float, numbers)), tuple(stream.score(n, task) for n in numbers))
            for stream in group
        ]
        lines.append(StageLine(band(arm, curves), fmean(peaks) if peaks else None))
    return lines


def draw_stages(streams: Sequence[Stream], runs: Sequence[Run], title: str) -> Figure:
    """A panel a task: its test score at every stage; the stages that learn it are shaded."""
    from fst_dspy.results.notebook_figure import NotebookFigure

    tasks, stages = streams[0].outcome.tasks, streams[0].outcome.stages
    figure = NotebookFigure(figsize=(max(4.5, 3.4 * len(tasks)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    ticks = [stage_label(streams[0], number) for number in range(len(stages) + 1)]
    for axes, task in zip(panels, tasks, strict=True):
        for number, stage in enumerate(stages, start=1):
            if stage.task == task:
                axes.axvspan(number - 0.5, number + 0.5, color="black", alpha=0.07, linewidth=0)
        for index, line in enumerate(stage_lines(streams, runs, task)):
            colour, arm = f"C{index}", line.scores.label
            _draw_band(axes, line.scores, colour)
            if line.alone is not None:
                label = f"{arm}, this task alone"
                axes.axhline(line.alone, color=colour, linestyle="--", linewidth=1, label=label)
        axes.set_title(task, fontsize=10)
        axes.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right", fontsize=8)
        axes.grid(alpha=0.25)
    limits = [score_limits(axes) for axes in panels]
    panels[0].set(
        ylabel="test score", ylim=(min(low for low, _ in limits), max(high for _, high in limits))
    )
    handles = {
        label: h
        for axes in panels
        for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False,
        fontsize=8,
    )  # fmt: skip
    figure.suptitle(title)
    return figure


def _draw_band(axes: Any, one: Band, colour: str) -> None:
    for curve in one.seeds:
        axes.plot(curve.x, curve.y, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(one.mean.x, one.mean.y, ".-", color=colour, label=one.label, markersize=4)
