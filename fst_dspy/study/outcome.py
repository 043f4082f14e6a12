"""What a study found: its best settings, its Pareto front, and which settings matter."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fst_dspy.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def front(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial, or with several objectives the Pareto front, best in the first one first.

    Trials beyond a limit (``Objective.at_most``, ``at_least``) are left out; the list may be empty.
    """
    if len(study.directions) > 1:
        sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
        return sorted(study.best_trials, key=lambda trial: sign * trial.values[0])
    try:
        return [study.best_trial]
    except ValueError:
        return []


def best_settings(study: optuna.Study) -> dict[str, Any]:
    """The settings of the best trial, as ``FST(metric, **best_settings(study))`` takes them.

    They include what the study held fixed and its rollout budget. With several objectives they are
    those of the front's trial that is best in the first one; ``front(study)`` has the others, each
    with its ``user_attrs["settings"]``.

    Raises:
        ConfigError: No trial has completed, or none within the limits.
    """
    best = front(study)
    if not best:
        raise ConfigError(f"no trial of {study.study_name!r} has completed within the limits yet")
    return dict(best[0].user_attrs["settings"])


def hypervolume(
    values: Sequence[Sequence[float]], directions: Sequence[str], reference: Sequence[float]
) -> float:
    """The area between a set of points of two objectives and a reference point.

    Args:
        values: One pair a point.
        directions: ``"maximize"`` or ``"minimize"``, of each objective.
        reference: The worst values that count; what is worse adds nothing.
    """
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in directions]
    x0, y0 = (sign * value for sign, value in zip(signs, reference, strict=True))
    points = sorted(tuple(s * v for s, v in zip(signs, pair, strict=True)) for pair in values)
    area, lowest = 0.0, y0
    for x, y in points:
        if x < x0 and y < lowest:
            area += (x0 - x) * (lowest - y)
            lowest = y
    return area


def importances(study: optuna.Study) -> dict[str, dict[str, float]]:
    """How much each setting mattered, 0 to 1, by objective (PED-ANOVA, Watanabe et al. 2023).

    Empty with fewer than four completed trials, which say nothing.
    """
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 4:
        return {}
    names = study.user_attrs.get("objective", {}).get("measures", ["score"])
    found = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PedAnova.*low `target`")  # _loss is low
        for index, name in enumerate(names):
            sign = -1.0 if study.directions[index] == StudyDirection.MAXIMIZE else 1.0
            found[name] = optuna.importance.get_param_importances(
                study, target=partial(_loss, index=index, sign=sign)
            )
    return found


def _loss(trial: FrozenTrial, index: int, sign: float) -> float:
    """One objective as PED-ANOVA wants it: it asks what makes the target low."""
    return sign * trial.values[index]


def draw_importances(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of what ``importances`` returned, a panel an objective."""
    from fst_dspy.results.notebook_figure import NotebookFigure

    figure = NotebookFigure(figsize=(4.6 * max(1, len(importances)), 3.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(importances)), squeeze=False)[0]
    for axes, (name, shares) in zip(panels, importances.items(), strict=False):
        order = sorted(shares, key=lambda setting: shares[setting])
        bars = axes.barh(order, [shares[setting] for setting in order])
        axes.bar_label(bars, fmt=" {:.2f}", fontsize=7)
        axes.set(title=f"what matters for {name}", xlabel="importance", xlim=(0, 1))
        axes.tick_params(labelsize=8)
    return figure


def draw_front(study: optuna.Study) -> Figure:
    """The completed trials of a study with two objectives; its front and defaults marked."""
    from fst_dspy.results.notebook_figure import NotebookFigure

    first, second = study.user_attrs["objective"]["measures"]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = sorted(front(study), key=lambda trial: trial.values[1])
    figure = NotebookFigure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    default = [t for t in complete if t.user_attrs.get("source") == "defaults"]
    for trials, style, colour, label in (
        (complete, "o", "tab:gray", "trials"),
        (best, "o-", "tab:blue", "Pareto front"),
        (default, "*", "tab:orange", "defaults"),
    ):
        x, y = [t.values[1] for t in trials], [t.values[0] for t in trials]
        axes.plot(x, y, style, color=colour, label=label, markersize=10 if style == "*" else 5)
    axes.set(xlabel=second, ylabel=first)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure
