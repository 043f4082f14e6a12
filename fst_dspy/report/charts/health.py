"""Whether the optimizer is well: what its steps did, and what stood in their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from fst_dspy.report.charts.curves import ROLLOUTS_AXIS, by_steps, line, parsed_share
from fst_dspy.report.charts.figure import SHARE, ZERO, Ends, figure
from fst_dspy.report.data import Run
from fst_dspy.report.faults import skipped_steps
from fst_dspy.report.sections import percent

STEP = "optimizer step"


def health(runs: Sequence[Run]) -> str:
    """Charts over steps and cycles, and the steps that were skipped."""
    if not any(run.steps for run in runs):
        return "<p class=none>No optimizer step was taken yet, or none is part of this arm.</p>"

    def steps(
        title: str,
        y: Callable[[Mapping[str, Any]], float | None],
        caption: str,
        ends: Ends = (None, None),
    ) -> str:
        return figure(title, STEP, by_steps(runs, y), whole=True, caption=caption, ends=ends)

    def stat(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        """Of the steps that were taken: a skipped one has no figures of its own."""
        return lambda step: None if step["stats"]["skipped"] else step["stats"].get(name)

    def lesson(step: Mapping[str, Any]) -> float | None:
        stats = step["stats"]
        return stats["lesson"] if stats.get("taught") and not stats["skipped"] else None

    figures = [
        steps("Loss", stat("loss"), "before each step; its sign says little"),
        steps("Gradient norm", stat("grad_norm"), "before clipping", ends=ZERO),
        steps("Entropy", stat("entropy"), "nats a token; near 0 the policy tries nothing new",
              ends=ZERO),
        steps("Clipped share", stat("clip_share"), "of the tokens: importance weights cut off",
              ends=SHARE),
        steps("Learning rate", stat("learning_rate"), "as the step was taken", ends=ZERO),
        steps("Groups without a gradient", lambda step: step["constant_group_share"],
              "share whose rollouts scored alike", ends=SHARE),
        steps("Parsed share", parsed_share, "of the rollouts, in the adapter's format", ends=SHARE),
        figure(
            "KL to the base model",
            ROLLOUTS_AXIS,
            [line(run, colour, "kl_to_base") for colour, run in enumerate(runs)],
            ends=ZERO,
            caption="nats a token",
        ),
        figure(
            "Probability of the format",
            ROLLOUTS_AXIS,
            [line(run, colour, "format_share") for colour, run in enumerate(runs)],
            ends=SHARE,
            caption="what the model by itself gives to what it is held to; near 1 it need not be",
        ),
    ]  # fmt: skip
    lessons = [_lessons(run) for run in runs]
    if any(own["taught"] for own in lessons):
        words = "of the answers that are read again; nats a token, before each step"
        figures.append(steps("Distance from the teacher", lesson, words, ends=ZERO))
    return f"{_facts(runs, lessons)}<div class=charts>{''.join(figures)}</div>"


def _facts(runs: Sequence[Run], lessons: Sequence[Counter[str]]) -> str:
    items = []
    for run, own in zip(runs, lessons, strict=True):
        reasons = skipped_steps(run.steps)
        skipped = ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "none"
        constant = [step["constant_group_share"] for step in run.steps]
        who = f"{run.label}: " if len(runs) > 1 else ""
        items.append(
            f"{who}{len(run.steps):,} optimizer steps, of which skipped: {skipped}. Groups with "
            "equal rewards, which give no gradient: "
            f"{percent(sum(constant) / max(1, len(constant)))} on average."
        )
        if own:
            left_out = ", ".join(f"{n:,} {why}" for why, n in own.items() if why != "taught")
            items.append(
                f"{who}{own['taught']:,} of {own.total():,} answers were read again by a "
                f"teacher under a prompt that knows more; left out: {left_out or 'none'}."
            )
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _lessons(run: Run) -> Counter[str]:
    """A run's answers by what they taught, or why nothing: ``StepStats.untaught``."""
    total: Counter[str] = Counter()
    for step in run.steps:
        stats = step["stats"]
        total.update(stats.get("untaught", {}))
        total["taught"] += stats.get("taught", 0)
    return +total
