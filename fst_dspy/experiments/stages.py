"""The compiles of an arm, one after another, within one budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt import Teleprompter

from fst_dspy.config import ENV_LIMITS
from fst_dspy.experiments.arms import Stage, find_arm
from fst_dspy.experiments.jobs import Job
from fst_dspy.loop.progress import SilentProgress, cycle_line
from fst_dspy.results.result import FSTResult
from fst_dspy.student.candidate import (
    INSTRUCTIONS,
    bind,
    component_name,
    make_candidate,
    predictor_names,
)
from fst_dspy.tasks import load_task
from fst_dspy.types import CycleRecord, Task


class LogProgress(SilentProgress):
    """Prints a line a cycle, for a job's log."""

    def cycle_done(self, record: CycleRecord) -> None:
        """Say how the cycle went."""
        print(cycle_line(record), flush=True)


def load_job_task(job: Job, program: str) -> Task:
    """A program's task with the job's seed and first instructions, and its share of the test set.

    Raises:
        ProgramError: The program cannot be loaded.
    """
    task = load_task(program, job.seed)
    student = task.program
    if job.instructions is not None:
        names = predictor_names(student)
        texts = {component_name(name, INSTRUCTIONS): job.instructions for name in names}
        student = bind(student, make_candidate(texts))
    return replace(task, program=student, testset=task.testset[: job.test_size])


def compile_stages(folder: Path, job: Job, task: Task) -> list[FSTResult]:
    """The result of each of the arm's stages; a stage's program is the next one's student.

    Several stages are steps of ``dspy.BetterTogether``. It is given no validation set, so that it
    runs no rollouts of its own and hands on each stage's own best pair; the stages have the task's.

    Args:
        folder: The job's, which has a run folder for each stage. Stages that have ended are not run
            again; one that was killed goes on from its last checkpoint.
        job: Whose arm and budget it is; its model is the one set with ``dspy.configure``.
        task: What is compiled.
    """
    turns: dict[str, _Turn] = {}
    for number, stage in enumerate(find_arm(job.arm).stages):
        name = f"{number}-{stage.name}"
        turns[name] = _Turn(stage, task.metric, folder / name, job, tuple(turns.values()))
    if len(turns) == 1:
        (turn,) = turns.values()
        turn.compile(task.program, trainset=task.trainset, valset=task.valset)
    else:
        _together(turns, task)
    return [turn.result for turn in turns.values()]


class _Turn(Teleprompter):
    """A stage as BetterTogether takes it; what is left of the budget is known when it is its turn.

    Attributes:
        result: What it came to, once it has compiled.
        error: What it failed of. BetterTogether logs that and returns the program so far.
    """

    result: FSTResult
    error: Exception | None = None

    def __init__(
        self,
        stage: Stage,
        metric: Callable[..., Any],
        folder: Path,
        job: Job,
        before: Sequence[_Turn],
    ) -> None:
        self.stage, self.metric, self.folder = stage, metric, folder
        self.job, self.before = job, before

    def compile(
        self, student: dspy.Module, *, trainset: list[dspy.Example], valset: list[dspy.Example]
    ) -> dspy.Module:
        job, spent = self.job, sum(turn.result.rollouts.total for turn in self.before)
        budget = max(1, round(job.rollouts * self.stage.until) - spent)
        settings: dict[str, Any] = {**job.settings, "max_rollouts": budget}
        for name, counted in ENV_LIMITS.items():
            if (asked := settings.get(name)) is not None:  # the job's, as its rollouts are
                done = [getattr(turn.result.records[-1].turns, counted) for turn in self.before]
                left = max(1, round(asked * self.stage.until) - round(sum(done)))
                settings[name] = left
        try:
            optimizer = self.stage.make(
                self.metric,
                seed=job.seed,
                log_dir=self.folder,
                track_stats=True,
                progress=LogProgress(),
                reflection_lm=dspy.LM(job.reflection_lm) if job.reflection_lm else None,
                **settings,
            )
            compiled = optimizer.compile(student, trainset=trainset, valset=valset)
        except Exception as error:
            self.error = error
            raise
        self.result = compiled.detailed_results
        return compiled


def _together(turns: Mapping[str, _Turn], task: Task) -> None:
    student = task.program.deepcopy()
    for predictor in student.predictors():
        predictor.lm = predictor.lm or dspy.settings.lm  # which it asks for
    dspy.BetterTogether(metric=task.metric, **turns).compile(
        student,
        trainset=task.trainset,
        valset_ratio=0.0,
        shuffle_trainset_between_steps=False,
        strategy=dspy.BetterTogether.STRAT_SEP.join(turns),
        optimizer_compile_args={name: {"valset": task.valset} for name in turns},
    )
    for turn in turns.values():
        if turn.error is not None:
            raise turn.error
