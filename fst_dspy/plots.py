"""Figures, each as a pair: a function that returns the data, and one that draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fst_dspy.types import CycleRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """A line of a figure: x and y of equal length."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def score_curves(runs: Mapping[str, Sequence[CycleRecord]]) -> list[Curve]:
    """Validation score against rollouts of all channels, a curve a run."""
    return [
        Curve(
            label,
            tuple(float(record.total_rollouts.total) for record in records),
            tuple(record.val_score for record in records),
        )
        for label, records in runs.items()
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
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
    left.set(xlabel="rollouts, all channels", ylabel="validation score", ylim=(-0.02, 1.02))
    right.set(xlabel="KL to the base model, nats a token")
    right.set_xscale("symlog", linthresh=0.01)
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.suptitle(title)
    return figure
