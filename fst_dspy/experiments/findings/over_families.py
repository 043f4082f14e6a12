"""Arms compared over several families of tasks at once: a table, and one figure.

A dead or a lucky seed moves a mean of five; so what is compared are interquartile means and
probabilities of improvement, with intervals stratified by family (``fst_dspy.measures.aggregate``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from fst_dspy.errors import DataError
from fst_dspy.experiments.findings.tables import NONE, Table, interval_text
from fst_dspy.experiments.runs import Run, areas, by_label, scores_by_seed, shared_budget
from fst_dspy.measures import (
    Interval,
    interquartile_mean,
    mean_difference,
    probability_of_improvement,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "fst"
RIVALS = ("gepa_only", "rl_only", "sequential")
"""Beginnings of the labels of the arms that ``fst`` is not to fall behind of, whichever is best."""
BEST_SPLIT = "sequential-best"
POINTS = 200
"""Points of a figure's curve."""
Found = Mapping[str, Sequence[Run]]
"""Runs by family."""


def over_families(found: Found) -> Table:
    """A line an arm that every family has runs of; one more for the best split of each family.

    Raises:
        DataError: No arm is in every family, or none of them is ``fst``.
    """
    found = {family: _with_best_split(runs) for family, runs in found.items()}
    area = {family: areas(runs) for family, runs in found.items()}
    test = {
        family: {label: scores_by_seed(group) for label, group in by_label(runs).items()}
        for family, runs in found.items()
    }
    rows = []
    for label in _shared(found):
        against = [cell for values in (area, test) for cell in _against(values, label)]
        runs = sum(len(by_seed[label]) for by_seed in area.values())
        means = [f"{fmean(by_seed[label].values()):.3f}" for by_seed in area.values()]
        rows.append((label, str(runs), *against, *means))
    return Table(
        "All families together",
        (
            "arm",
            "runs",
            "area",
            "fst minus it: area",
            "fst better: area",
            "test",
            "fst minus it: test",
            "fst better: test",
            *(f"area, {family}" for family in found),
        ),
        tuple(rows),
        "Area: mean over the rollouts of the best validation score so far. Area and test: "
        "interquartile means over families and seeds, 95 % bootstrap intervals, stratified by "
        "family. fst minus it: mean over families of the differences paired by seed, 95 % t "
        "interval over seeds. fst better: probability that fst is above the arm on a family, "
        f"bootstrapped. {BEST_SPLIT}: on each family the split with the largest mean area.",
    )


def _against(values: Mapping[str, Mapping[str, Mapping[int, float]]], label: str) -> list[str]:
    """An arm's mean, what ``fst`` is above it by, and how probably; ``values`` by family, label."""
    own, ours = ({f: by_label[name] for f, by_label in values.items()} for name in (label, OURS))
    plain, ours_plain = (
        {f: [*seeds.values()] for f, seeds in each.items()} for each in (own, ours)
    )
    mean = _span(interquartile_mean(plain))
    if label == OURS:
        return [mean, NONE, NONE]
    differences = {
        f: [ours[f][seed] - by_seed[seed] for seed in ours[f].keys() & by_seed.keys()]
        for f, by_seed in own.items()
    }
    paired = interval_text(mean_difference(differences)) if all(differences.values()) else NONE
    return [mean, paired, _span(probability_of_improvement(ours_plain, plain))]


def against_best(found: Found) -> Table:
    """``fst`` beside the best of its rivals on each family, whichever that is."""
    rows = []
    for family, runs in found.items():
        means = {label: fmean(by_seed.values()) for label, by_seed in areas(runs).items()}
        rivals = {label: mean for label, mean in means.items() if label.startswith(RIVALS)}
        if OURS in means and rivals:
            best = max(rivals, key=rivals.__getitem__)
            share = f"{means[OURS] / rivals[best]:.3f}" if rivals[best] else NONE
            rows.append((family, best, f"{rivals[best]:.3f}", f"{means[OURS]:.3f}", share))
    return Table(
        "fst beside the best rival of each family",
        ("family", "best rival", "its area", "fst's", "share"),
        tuple(rows),
        "Mean areas over seeds; the best of prompts alone, tuned RL and the splits of sequential.",
    )


@dataclass(frozen=True)
class ArmCurve:
    """The course of an arm over all families.

    Attributes:
        label: The arm's.
        x: Shares of a family's rollouts, 0 to 1.
        mean: Validation score, the mean of all families and seeds.
        low, high: Its 95 % bootstrap interval, stratified by family.
    """

    label: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def arm_curves(found: Found, labels: Sequence[str]) -> list[ArmCurve]:
    """Score against the share of the rollouts that are spent, over all families.

    Raises:
        DataError: A family has no runs of an arm.
    """
    missing = [label for label in labels if label not in _shared(found)]
    if missing:
        raise DataError(f"not every family has runs of {', '.join(missing)}")
    x = np.linspace(0, 1, POINTS)
    rng = np.random.default_rng(0)
    curves = []
    for label in labels:
        drawn, means = [], []
        for runs in found.values():
            budget = shared_budget(runs)
            score_SX = np.array([_score_at(run, x * budget) for run in by_label(runs)[label]])
            picked = rng.integers(0, len(score_SX), (1000, len(score_SX)))
            drawn.append(score_SX[picked].mean(1))
            means.append(score_SX.mean(0))
        low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975], axis=0)
        shown = (x, np.mean(means, axis=0), low, high)
        curves.append(ArmCurve(label, *(tuple(values.tolist()) for values in shown)))
    return curves


def draw_over_families(
    found: Found, names: Mapping[str, str], colours: Mapping[str, str]
) -> Figure:
    """The arms' courses, labels on the lines.

    Args:
        found: Runs by family.
        names: What the arms are called in the figure, by label.
        colours: By label.
    """
    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    curves = arm_curves(found, list(names))
    # Labels stand at the lines' ends, at least a line's height apart.
    place = -1.0
    for curve in sorted(curves, key=lambda curve: curve.mean[-1]):
        colour = colours[curve.label]
        axes.plot(curve.x, curve.mean, color=colour, linewidth=2, drawstyle="steps-post")
        axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, step="post")
        place = max(curve.mean[-1], place + 0.07)
        axes.text(1.02, place, names[curve.label], color=colour, va="center", fontsize=9)
    families = f"{len(found)} families" if len(found) > 1 else next(iter(found))
    axes.set(
        xlim=(0, 1.4),
        ylim=(0, 1),
        xlabel="share of the rollouts, all channels",
        ylabel=f"validation score, mean of {families}",
    )
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure


def _with_best_split(runs: Sequence[Run]) -> list[Run]:
    """The runs, and once more those of the split of ``sequential`` with the largest mean area."""
    means = {label: fmean(by_seed.values()) for label, by_seed in areas(runs).items()}
    splits = [label for label in means if re.fullmatch(r"sequential(_\d+)?", label)]
    if len(splits) < 2:
        return list(runs)
    best = max(splits, key=means.__getitem__)
    again = [replace(run, job=replace(run.job, label=BEST_SPLIT)) for run in by_label(runs)[best]]
    return [*runs, *again]


def _shared(found: Found) -> list[str]:
    groups = [by_label(runs) for runs in found.values()]
    labels = [label for label in (groups[0] if groups else ()) if all(label in g for g in groups)]
    if OURS not in labels:
        raise DataError(f"not every family has runs of {OURS}")
    return labels


def _score_at(run: Run, x: np.ndarray) -> np.ndarray:
    """The latest score at each number of rollouts; before the first one, the first."""
    at, score = run.curve
    return np.array(score)[np.maximum(np.searchsorted(at, x, side="right") - 1, 0)]


def _span(interval: Interval) -> str:
    if interval.low is None:
        return interval_text(interval)
    return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"
