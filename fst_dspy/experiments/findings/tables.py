"""The tables of a store that stand for themselves: means, quadrants, forgetting, every run.

Every figure is one of ``fst_dspy.measures``. Curves are validation scores against all rollouts,
validation included; test scores are mean@k at one temperature for all arms. Intervals are
Student's, at 95 %, over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from fst_dspy.display import as_text
from fst_dspy.experiments.runs import PAIR, QUADRANTS, Run, areas, by_label, shared_budget
from fst_dspy.measures import Interval, mean_at_k, mean_interval

NONE = "—"
LONGEST_NUMBER = len("-0.000 ± 0.000")
CHANNELS = ("fast", "slow", "eval")
COUNTED = "fast, slow, eval: rollouts by channel; testing is in neither these nor the seconds."


@dataclass(frozen=True)
class Table:
    """Rows of text under a title.

    Attributes:
        note: What to know when reading it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """As Markdown, with a heading."""
        lines = [f"## {self.title}", ""]
        lines += [self.note, ""] if self.note else []
        cells = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells), ""])

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(
            title=as_text(self.title),
            caption=as_text(self.note) if self.note else None,
            caption_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for number, column in enumerate(self.columns):
            justify: Literal["left", "right"] = "left" if number == 0 else "right"
            widest = max(len(cell) for cell in (column, *(row[number] for row in self.rows)))
            # Numbers are not broken up, whatever the width of the terminal.
            table.add_column(
                as_text(column), justify=justify, min_width=min(widest, LONGEST_NUMBER)
            )
        for row in self.rows:
            table.add_row(*map(as_text, row))
        return table


def summary(runs: Sequence[Run]) -> Table:
    """Means over seeds."""
    area = areas(runs)
    rows = []
    for label, group in by_label(runs).items():
        test = mean_at_k([run.outcome.test[PAIR] for run in group])
        rows.append(
            (
                label,
                str(len(group)),
                interval_text(mean_interval(run.test for run in group)),
                number_text(test.se_examples),
                f"{fmean(area[label].values()):.3f}",
                f"{fmean(run.outcome.kl_to_base for run in group):.4f}",
                f"{fmean(run.outcome.entropy for run in group):.3f}",
                *counts_text(group),
                f"{fmean(run.outcome.steps for run in group):.0f}",
                f"{fmean(run.train_seconds for run in group):.0f}",
            )
        )
    return Table(
        "Means over seeds",
        (
            "arm",
            "seeds",
            "test",
            "SE",
            "area",
            "KL",
            "entropy",
            *CHANNELS,
            "steps",
            "s",
        ),
        tuple(rows),
        f"Test: mean@{runs[0].job.samples} of the best pair, 95 % interval over seeds; SE from the "
        "draw of examples. Area: under the best validation score so far, to "
        f"{shared_budget(runs)} rollouts. KL to the base and entropy: nats a token, on test "
        f"prompts. {COUNTED}",
    )


def quadrant_table(runs: Sequence[Run]) -> Table:
    """Base or trained weights under the original or the evolved context."""
    rows = [
        (label, *(mean_text([run.quadrant(name) for run in group], ".3f") for name in QUADRANTS))
        for label, group in by_label(runs).items()
    ]
    columns = tuple(name.replace("_", ", ") for name in QUADRANTS)
    return Table(
        "Quadrants of the test score",
        ("arm", *columns),
        tuple(rows),
        "Base or trained weights, under the original or the evolved prompts.",
    )


def forgetting_table(runs: Sequence[Run]) -> Table | None:
    """Change on other programs under their ideal prompts; ``None`` where it was not measured."""
    rows = []
    for label, group in by_label(runs).items():
        for task in dict.fromkeys(lost.task for run in group for lost in run.outcome.forgetting):
            found = [f for run in group for f in run.outcome.forgetting if f.task == task]
            change = mean_interval(lost.change.mean for lost in found)
            before, after = (fmean(getattr(f, w).mean for f in found) for w in ("before", "after"))
            cells = (str(len(found)), f"{before:.3f}", f"{after:.3f}", interval_text(change))
            rows.append((label, task, *cells))
    if not rows:
        return None
    return Table(
        "Forgetting",
        ("arm", "program", "seeds", "before", "after", "change"),
        tuple(rows),
        "Other programs under their ideal prompts, with the base weights and the best ones.",
    )


def tuning(about: Mapping[str, Any]) -> list[Table]:
    """The trials that ``rl_only`` was tuned by, a table a budget; none where it was not."""
    return [_tuning(label, found) for label, found in about.get("tuned_rl", {}).items()]


def _tuning(label: str, found: Mapping[str, Any]) -> Table:
    rows = [
        (
            str(trial["number"]),
            trial["state"],
            number_text(trial["score"]),
            str(trial["spent"] or NONE),
            ", ".join(f"{name}={_short(value)}" for name, value in trial["settings"].items()),
        )
        for trial in found["trials"]
    ]
    chosen = ", ".join(f"{name}={_short(value)}" for name, value in found["settings"].items())
    return Table(
        f"How {label} was tuned",
        ("trial", "state", "validation", "rollouts", "settings"),
        tuple(rows),
        f"On seed {found['seed']}, {found['rollouts']} rollouts a trial. Chosen: {chosen}.",
    )


def every_seed(runs: Sequence[Run]) -> Table:
    """One row a run."""
    rows = [
        (
            run.job.label,
            str(run.job.seed),
            f"{run.quadrant('base_original'):.3f}",
            f"{run.test:.3f}",
            number_text(mean_at_k([run.outcome.test[PAIR]]).se_examples),
            f"{run.outcome.val_score:.3f}",
            f"{run.outcome.kl_to_base:.4f}",
            f"{run.outcome.entropy:.3f}",
            str(run.outcome.rollouts.total),
            *counts_text([run]),
            str(run.outcome.steps),
            f"{run.train_seconds:.0f}",
            run.outcome.revision or NONE,
        )
        for run in runs
    ]
    return Table(
        "Every run",
        (
            "arm",
            "seed",
            "before",
            "test",
            "SE",
            "val",
            "KL",
            "entropy",
            "rollouts",
            *CHANNELS,
            "steps",
            "s",
            "revision",
        ),
        tuple(rows),
        "Before: base weights under the student's own prompt, on test examples. Revision: of the "
        f"package that tested it. {COUNTED}",
    )


def interval_text(interval: Interval) -> str:
    """``0.900 ± 0.050``, or the mean alone."""
    if interval.high is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {interval.high - interval.mean:.3f}"


def counts_text(runs: Sequence[Run]) -> tuple[str, ...]:
    """Mean rollouts of each of ``CHANNELS``."""
    return tuple(
        f"{fmean(getattr(run.outcome.rollouts, channel) for run in runs):.0f}"
        for channel in CHANNELS
    )


def mean_text(values: Sequence[float | None], form: str) -> str:
    """The mean of the values that there are."""
    known = [value for value in values if value is not None]
    return format(fmean(known), form) if known else NONE


def number_text(value: float | None) -> str:
    """Three decimals, or a dash."""
    return NONE if value is None else f"{value:.3f}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
