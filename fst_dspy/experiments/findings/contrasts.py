"""The tables that set entries against one another: ``rl_only``, asymptotes, ablations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from fst_dspy.errors import DataError
from fst_dspy.experiments.findings.tables import (
    CHANNELS,
    COUNTED,
    NONE,
    Table,
    counts_text,
    interval_text,
    mean_text,
)
from fst_dspy.experiments.protocols.ablate import REFERENCE
from fst_dspy.experiments.runs import Run, by_label, scores_by_seed
from fst_dspy.measures import (
    area_under_curve,
    asymptote,
    kl_at_matched_score,
    mean_curve,
    mean_interval,
    paired_difference,
    x_to_score,
)
from fst_dspy.results.plots import Curve

RL = "rl_only"


def against_rl(runs: Sequence[Run]) -> Table | None:
    """Every entry against ``rl_only``, its longest runs, seed by seed; ``None`` without them."""
    groups = by_label(runs)
    label = _longest_rl(groups)
    if label is None:
        return None
    reference = {run.job.seed: run for run in groups[label]}
    rows = []
    for name, group in groups.items():
        pairs = [(run, reference[run.job.seed]) for run in group if run.job.seed in reference]
        if name == label or not pairs:
            continue
        risen = [(run, rl) for run, rl in pairs if rl.best > rl.records[0].val_score]
        to_best = [(run.rollouts_to_best_of(rl), rl.rollouts_to_best_of(rl)) for run, rl in risen]
        reached = [(own, rls) for own, rls in to_best if own is not None and rls is not None]
        matched = [kl_at_matched_score(run.records, rl.records) for run, rl in pairs]
        lower = [100 * match.reduction for match in matched if match.reduction is not None]
        tests = paired_difference(scores_by_seed(group), scores_by_seed(groups[label]))
        rows.append(
            (
                name,
                f"{len(reached)} of {len(risen)}",
                mean_text([own for own, _ in reached], ".0f"),
                mean_text([rls for _, rls in reached], ".0f"),
                *times_cells([rls / own for own, rls in reached]),
                mean_text([run.steps_to_best_of(rl) for run, rl in risen], ".0f"),
                mean_text([match.score for match in matched], ".3f"),
                mean_text(lower, ".0f"),
                interval_text(tests.difference),
            )
        )
    return Table(
        f"Against {label}",
        (
            "arm",
            "reached",
            "rollouts",
            "its own",
            "times",
            "range",
            "steps",
            "matched",
            "KL less",
            "test",
        ),
        tuple(rows),
        f"Reached: seeds that reach {label}'s best validation score on the same seed, of those on "
        "which it rose at all; then, over the seeds that do, the rollouts of all channels that it "
        "takes, its own, how many times fewer (geometric mean, least to greatest; below 1 is more) "
        "and the optimizer steps. Matched: the best score that both reach; KL less: by how many "
        "percent the KL to the base is lower there. Test: difference, paired by seed.",
    )


def times_cells(ratios: Sequence[float]) -> tuple[str, str]:
    """The geometric mean of ratios, of which 3 and 1/3 cancel, and their range, as text."""
    if not ratios:
        return NONE, NONE
    return f"{geometric_mean(ratios):.1f}", f"{min(ratios):.1f} to {max(ratios):.1f}"


def mean_curves(runs: Sequence[Run]) -> Table | None:
    """Every entry's mean curve against that of ``rl_only``; ``None`` without two seeds of it."""
    groups = by_label(runs)
    label = _longest_rl(groups)
    if label is None or len(groups[label]) < 2:
        return None
    rows = []
    for name, group in groups.items():
        seeds = scores_by_seed(group).keys() & scores_by_seed(groups[label]).keys()
        if name == label or len(seeds) < 2:
            continue
        own, rls = (mean_curve_on(runs, seeds) for runs in (group, groups[label]))
        cells = to_best_cells(own, rls)
        rows.append((name, str(len(seeds)), f"{max(rls.y):.3f}", *cells, f"{max(own.y):.3f}"))
    return Table(
        f"Mean curves against that of {label}",
        ("arm", "seeds", "its best", "rollouts", "its own", "times", "best"),
        tuple(rows),
        f"Validation scores averaged over the seeds that both have; a run that has ended of itself "
        f"holds its last. Its best: the highest of "
        f"{label}'s mean curve; then the rollouts of all channels until each mean curve is there, "
        "how many times fewer, and the highest of the arm's own.",
    )


def mean_curve_on(runs: Sequence[Run], seeds: Collection[int]) -> Curve:
    """The mean curve of the validation scores of the runs of some seeds.

    It ends where the first of them does, but for those that ended of themselves: else what the
    others reach later would be left out, as one was done early.
    """
    return mean_curve([run.held_curve for run in runs if run.job.seed in seeds])


def to_best_cells(own: Curve, other: Curve) -> tuple[str, str, str]:
    """The rollouts until each curve is at the other's best, and how many times fewer, as text."""
    x, other_x = (x_to_score(curve.x, curve.y, max(other.y)) for curve in (own, other))
    assert other_x is not None
    if x is None:
        return NONE, f"{other_x:.0f}", NONE
    return f"{x:.0f}", f"{other_x:.0f}", f"{other_x / x:.1f}"


def asymptotes(runs: Sequence[Run]) -> Table:
    """The sigmoid's asymptote over all seeds of each entry of one stage.

    Several stages rise one after another, which one sigmoid cannot follow.
    """
    rows = []
    for label, group in by_label(runs).items():
        if len(group[0].outcome.stages) > 1:
            continue
        try:
            found = asymptote([run.curve for run in group])
        except DataError as error:  # scores outside of 0 to 1
            rows.append((label, NONE, NONE, NONE, NONE, str(error)))
            continue
        rows.append(
            (
                label,
                NONE if found.fit is None else f"{found.fit.asymptote:.3f}",
                NONE if found.low is None else f"{found.low:.3f} to {found.high:.3f}",
                NONE if found.fit is None else f"{100 * found.fit.rise_seen:.0f}",
                NONE if found.fit is None else f"{found.fit.rmse:.3f}",
                found.problem or "",
            )
        )
    return Table(
        "Asymptote of the validation score",
        ("arm", "asymptote", "interval", "% seen", "misfit", ""),
        tuple(rows),
        "Four-parameter sigmoid through the points of all seeds, bootstrap interval over seeds, "
        "made for 95 %; of few seeds it is too narrow (three: some 70 %). Where little of the rise "
        "has been seen, it is an extrapolation. Misfit: root mean square of the residuals.",
    )


def _longest_rl(groups: Mapping[str, Sequence[Run]]) -> str | None:
    labels = [label for label, group in groups.items() if group[0].job.arm == RL]
    return max(labels, key=lambda name: groups[name][0].job.rollouts, default=None)


def ablations(runs: Sequence[Run], axes: Mapping[str, Mapping[str, Any]]) -> Table:
    """Each variant beside the reference, axis by axis."""
    groups, budget = by_label(runs), min(run.job.rollouts for run in runs)
    rows = []
    for axis, variants in axes.items():
        for label, change in variants.items():
            group = groups.get(label, [])
            if not group:
                continue
            difference, own = NONE, scores_by_seed(group)
            reference = scores_by_seed(groups.get(REFERENCE, ()))
            if label != REFERENCE and own.keys() & reference.keys():
                difference = interval_text(paired_difference(own, reference).difference)
            areas = [area_under_curve(*run.curve, budget, running_best=True) for run in group]
            rows.append(
                (
                    axis,
                    ", ".join(f"{name}={value}" for name, value in change.items()),
                    str(len(group)),
                    interval_text(mean_interval(run.test for run in group)),
                    difference,
                    f"{fmean(areas):.3f}",
                    f"{fmean(run.outcome.kl_to_base for run in group):.4f}",
                    *counts_text(group),
                )
            )
    return Table(
        "Ablations",
        (
            "axis",
            "setting",
            "seeds",
            "test",
            "difference",
            "area",
            "KL",
            *CHANNELS,
        ),
        tuple(rows),
        "Difference to the reference, paired by seed; the row without one is the reference itself. "
        f"Area: under the best validation score so far, to {budget} rollouts, of which a run that "
        f"ends before holds its last. {COUNTED}",
    )
