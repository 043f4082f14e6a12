"""A stream of tasks in a process of its own: ``python -m`` this module, and the job's folder.

One ``ContinualFST`` learns the job's program and then those in ``then``, with the same share of the
budget for each stage. Stages that have ended are not run again; one that was killed goes on from
its last checkpoint. Then every task is tested at every stage, which is not part of the budget.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import dspy

from fst_dspy.continual.learner import ContinualFST
from fst_dspy.continual.stages import TaskStage
from fst_dspy.errors import StoreError
from fst_dspy.experiments.arms import usual_settings
from fst_dspy.experiments.jobs import Job, adapter_setting, read_job
from fst_dspy.experiments.process import locked, work
from fst_dspy.experiments.stages import LogProgress, load_job_task
from fst_dspy.experiments.streams import StreamOutcome, StreamStage, write_stream
from fst_dspy.lm.local_lm import LocalLM


def run_stream(folder: Path) -> StreamOutcome:
    """Do a folder's job, from where it stands, and write its outcome.

    Raises:
        FSTError: As ``ContinualFST.learn``, or another process is at it.
    """
    job = read_job(folder)
    programs = (job.program, *job.then)
    tasks = {program: load_job_task(job, program) for program in programs}
    with locked(folder), dspy.context(lm=LocalLM(job.model), **adapter_setting(job.adapter)):
        learner = _learner(folder, job, job.rollouts // len(programs))
        for number, program in enumerate(programs, start=1):
            print(f"stage {number} of {len(programs)}: {tasks[program].name}", flush=True)
            learner.learn(tasks[program])
        outcome = _tested(folder, learner, job.samples)
        write_stream(folder, outcome)
    return outcome


def _learner(folder: Path, job: Job, budget: int) -> ContinualFST:
    return ContinualFST(
        arm=job.arm,  # type: ignore[arg-type]  # the protocol takes no other
        seed=job.seed,
        log_dir=folder,
        progress=LogProgress(),
        reflection_lm=dspy.LM(job.reflection_lm) if job.reflection_lm else None,
        **{**usual_settings(job.arm), **job.settings, "max_rollouts": budget},
    )


def _tested(folder: Path, learner: ContinualFST, samples: int) -> StreamOutcome:
    started = time.monotonic()
    scores = learner.evaluate(samples=samples)
    return StreamOutcome(
        tasks=scores.tasks,
        stages=tuple(_plain(folder, stage) for stage in learner.stages),
        score_S_N=tuple(tuple(_known(score) for score in row) for row in scores.score_S_N),
        base_version=learner.stages[0].result.base_version,
        test_seconds=time.monotonic() - started,
    )


def _known(score: float | None) -> float:
    if score is None:
        raise StoreError("a stage's weights are missing from its run folder, so it is not tested")
    return float(score)


def _plain(folder: Path, stage: TaskStage) -> StreamStage:
    result = stage.result
    last = result.records[-1]
    return StreamStage(
        task=stage.task,
        started_from=stage.started_from,
        val_score=result.best.score,
        kl_to_base=result.records[result.best.cycle].kl_to_base,
        rollouts=result.rollouts,
        steps=last.step,
        seconds=sum(last.seconds.values()),
        folder=Path(str(result.log_dir)).relative_to(folder.absolute()).as_posix(),
        version=stage.version,
    )


if __name__ == "__main__":
    sys.exit(work(run_stream, sys.argv[1]))
