"""What ``fst continual`` has found: every stage against the single compile of its task."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fst_dspy.experiments.findings.plasticity_tables import ENOUGH, share_text
from fst_dspy.experiments.findings.tables import NONE, Table, interval_text, mean_text, number_text
from fst_dspy.experiments.runs import Run
from fst_dspy.experiments.streams import Stream
from fst_dspy.measures import mean_interval


def by_arm(streams: Sequence[Stream]) -> dict[str, list[Stream]]:
    """Streams that differ in their seed alone, together."""
    found: dict[str, list[Stream]] = {}
    for stream in streams:
        found.setdefault(stream.job.label, []).append(stream)
    return found


def share(stream: Stream, stage: int, task: str, runs: Sequence[Run]) -> float | None:
    """A task's score after so many stages over its single-task peak, where that is above 0."""
    alone = stream.alone(task, runs) or 0.0
    return stream.score(stage, task) / alone if alone > 0 else None


def stage_label(stream: Stream, number: int) -> str:
    """``"2 multihop"``, or ``"4 triage again"`` where the task was learned before."""
    if number == 0:
        return "0 base"
    names = [stage.task for stage in stream.outcome.stages]
    task = names[number - 1]
    return f"{number} {task}{' again' if task in names[: number - 1] else ''}"


def stage_table(streams: Sequence[Stream], runs: Sequence[Run]) -> Table:
    """Each stage's own task, against its single-task peak: means over seeds."""
    rows = []
    for arm, group in by_arm(streams).items():
        for number, stage in enumerate(group[0].outcome.stages, start=1):
            peaks = [stream.alone(stage.task, runs) for stream in group]
            shares = [share(stream, number, stage.task, runs) for stream in group]
            known = [one for one in shares if one is not None]
            stages = [stream.outcome.stages[number - 1] for stream in group]
            rows.append(
                (
                    arm,
                    stage_label(group[0], number),
                    str(len(group)),
                    interval_text(
                        mean_interval(stream.score(number, stage.task) for stream in group)
                    ),
                    mean_text(peaks, ".3f"),
                    share_text(known),
                    f"{sum(one >= ENOUGH for one in known)} of {len(known)}",
                    f"{fmean(stage.kl_to_base for stage in stages):.4f}",
                    f"{fmean(stage.rollouts.total for stage in stages):.0f}",
                )
            )
    return Table(
        "Stages",
        ("arm", "stage", "seeds", "test", "alone", "share", "at 95 %", "KL", "rollouts"),
        tuple(rows),
        f"Test: mean@{streams[0].job.samples} of the stage's task after it. Alone: its single-task "
        "peak, the test score of the same arm's compile of that task alone, from the model as it "
        "came, with the same seed and budget; the first stage is such a compile, so its share is "
        "1. Share: test over alone, seed by seed, with its 95 % interval; at 95 %: the seeds on "
        "which it is 0.95 or more. KL to the model as it came, nats a token.",
    )


def task_table(streams: Sequence[Stream], runs: Sequence[Run]) -> Table:
    """Every task at every stage: mean test score, and the share of the peak once it is learned."""
    tasks = streams[0].outcome.tasks
    rows = []
    for arm, group in by_arm(streams).items():
        learned: set[str] = set()
        for number in range(len(group[0].outcome.score_S_N)):
            if number:
                learned.add(group[0].outcome.stages[number - 1].task)
            cells = []
            for task in tasks:
                score = f"{fmean(stream.score(number, task) for stream in group):.3f}"
                shares = [share(stream, number, task, runs) for stream in group]
                part = f" ({mean_text(shares, '.2f')})" if task in learned else ""
                cells.append(score + part)
            rows.append((arm, stage_label(group[0], number), *cells))
    return Table(
        "Every task at every stage",
        ("arm", "after", *tasks),
        tuple(rows),
        "Test scores, means over seeds; in brackets the share of the single-task peak, from the "
        "stage on that learned the task. Before that a task has its program's first prompt.",
    )


def every_stage(streams: Sequence[Stream], runs: Sequence[Run]) -> Table:
    """One row a stage of every stream."""
    rows = []
    for stream in streams:
        for number, stage in enumerate(stream.outcome.stages, start=1):
            rows.append(
                (
                    stream.job.label,
                    str(stream.job.seed),
                    stage_label(stream, number),
                    stage.started_from or NONE,
                    f"{stage.val_score:.3f}",
                    f"{stream.score(number, stage.task):.3f}",
                    number_text(stream.alone(stage.task, runs)),
                    number_text(share(stream, number, stage.task, runs)),
                    f"{stage.kl_to_base:.4f}",
                    str(stage.rollouts.total),
                    str(stage.steps),
                    f"{stage.seconds:.0f}",
                )
            )
    return Table(
        "Every stage of every stream",
        (
            "arm",
            "seed",
            "stage",
            "from",
            "val",
            "test",
            "alone",
            "share",
            "KL",
            "rollouts",
            "steps",
            "s",
        ),
        tuple(rows),
        "From: the task whose prompts the stage began with.",
    )
