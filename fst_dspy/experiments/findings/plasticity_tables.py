"""What ``fst plasticity`` has found: the second task from each starting point, against the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fst_dspy.experiments.findings.tables import NONE, Table, interval_text, mean_text, number_text
from fst_dspy.experiments.protocols.plasticity import BASE
from fst_dspy.experiments.runs import Run, by_label, shared_budget
from fst_dspy.measures import area_under_curve, mean_interval, rollouts_to_score

ENOUGH = 0.95
"""Share of what the base reaches that counts as having learned the task (paper, section 4)."""


@dataclass(frozen=True)
class Probe:
    """A run of the second task, beside the base's run with the same seed.

    Attributes:
        run, base: The two; the same where the run starts from the base.
    """

    run: Run
    base: Run

    @property
    def counts(self) -> bool:
        """Whether the base learned anything, without which there is nothing to compare with."""
        return self.base.best > max(0, self.base.records[0].val_score) and self.base.test > 0

    @property
    def share(self) -> float:
        """Test score over the base's."""
        return self.run.test / self.base.test

    @property
    def val_share(self) -> float:
        """Best validation score over the base's."""
        return self.run.best / self.base.best

    @property
    def rollouts_to_enough(self) -> float | None:
        """Rollouts on the task until ``ENOUGH`` of the base's best validation score is reached."""
        return rollouts_to_score(self.run.records, ENOUGH * self.base.best)


def probes(runs: Sequence[Run], starts: Mapping[str, str]) -> dict[str, list[Probe]]:
    """By starting point, the base first, the runs whose seed the base has run too."""
    groups = by_label(runs)
    base = {run.job.seed: run for run in groups.get(BASE, ())}
    found = {}
    for label in (BASE, *starts):
        paired = [run for run in groups.get(label, ()) if run.job.seed in base]
        if paired:
            found[label] = [Probe(run, base[run.job.seed]) for run in paired]
    return found


def plasticity_table(found: Mapping[str, Sequence[Probe]]) -> Table | None:
    """Means over seeds; ``None`` where nothing has ended."""
    if not found:
        return None
    budget = shared_budget([probe.run for group in found.values() for probe in group])
    rows = []
    for label, group in found.items():
        counted = [probe for probe in group if probe.counts]
        areas = [area_under_curve(*p.run.curve, budget, running_best=True) for p in group]
        rows.append(
            (
                label,
                str(len(group)),
                f"{fmean(probe.run.records[0].val_score for probe in group):.3f}",
                interval_text(mean_interval(probe.run.test for probe in group)),
                share_text(probe.share for probe in counted),
                f"{sum(p.share >= ENOUGH for p in counted)} of {len(counted)}",
                share_text(probe.val_share for probe in counted),
                mean_text([probe.rollouts_to_enough for probe in counted], ".0f"),
                f"{fmean(areas):.3f}",
                f"{fmean(probe.run.records[0].kl_to_base for probe in group):.4f}",
                f"{fmean(probe.run.outcome.kl_to_base for probe in group):.4f}",
                f"{fmean(probe.run.outcome.rollouts.total for probe in group):.0f}",
            )
        )
    return Table(
        "The second task",
        (
            "start",
            "seeds",
            "before",
            "test",
            "share",
            "at 95 %",
            "val share",
            "to 95 %",
            "area",
            "KL before",
            "KL",
            "rollouts",
        ),
        tuple(rows),
        "Fresh rl_only under the program's own prompt, from each arm's best weights of the first "
        "task. Before: validation score before any of it. Share: test score over that of the run "
        "from the base with the same seed, over the seeds on which that run learned anything; at "
        "95 %: how many of these come to 0.95 or more. Val share: the same of the best validation "
        "scores; to 95 %: mean rollouts until 0.95 of the base's best, of the seeds that get "
        f"there. Area: under the best validation score so far, to {budget} rollouts. KL to the "
        "model as it came, nats a token.",
    )


def every_probe(found: Mapping[str, Sequence[Probe]]) -> Table:
    """One row a run of the second task."""
    rows = [
        (
            label,
            str(probe.run.job.seed),
            f"{probe.run.records[0].val_score:.3f}",
            f"{probe.run.best:.3f}",
            f"{probe.run.test:.3f}",
            number_text(probe.share if probe.counts else None),
            number_text(probe.val_share if probe.counts else None),
            mean_text([probe.rollouts_to_enough if probe.counts else None], ".0f"),
            f"{probe.run.records[0].kl_to_base:.4f}",
            f"{probe.run.outcome.kl_to_base:.4f}",
        )
        for label, group in found.items()
        for probe in group
    ]
    return Table(
        "The second task, seed by seed",
        (
            "start",
            "seed",
            "before",
            "best val",
            "test",
            "share",
            "val share",
            "to 95 %",
            "KL before",
            "KL",
        ),
        tuple(rows),
    )


def share_text(shares: Iterable[float]) -> str:
    """The mean share with its interval, or a dash where there is none."""
    known = list(shares)
    return interval_text(mean_interval(known)) if known else NONE
