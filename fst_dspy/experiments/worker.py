"""One job in a process of its own: ``python -m fst_dspy.experiments.worker FOLDER``.

The arm's stages are compiled one after another, each with its own run folder, so that a job that
was killed goes on where it stood; then the best pair is tested. Testing is not part of the budget.

A worker whose parent has died stops as after Ctrl-C: it finishes the step under way and saves it.
The parent holds the other end of its standard input.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import dspy

from fst_dspy.bundle_weights import read_run
from fst_dspy.candidate import seed_candidate
from fst_dspy.drift import kl_to_base, token_entropy
from fst_dspy.errors import FSTError
from fst_dspy.evaluate import evaluate
from fst_dspy.experiments.arms import find_arm
from fst_dspy.experiments.jobs import Job, Outcome, read_job, write_outcome
from fst_dspy.local_lm import LocalLM
from fst_dspy.measures import forgetting, ideal_candidate, scores_by_example
from fst_dspy.progress import SilentProgress, StopRun, cycle_line
from fst_dspy.result import FSTResult
from fst_dspy.rollout import RolloutRunner, calls_of
from fst_dspy.tasks import load_task
from fst_dspy.types import Candidate, CycleRecord, Rollout, RolloutCounts, Task

MEASURED_CALLS = 256
"""Calls of the test rollouts that KL and entropy are measured on."""
LOCK_SECONDS = 60.0


class Within(SilentProgress):
    """Ends a run where another cycle like the last one would go beyond the budget.

    Args:
        rollouts: The budget, over all channels.
    """

    def __init__(self, rollouts: int) -> None:
        self.rollouts = rollouts

    def cycle_done(self, record: CycleRecord) -> None:
        """Say how the cycle went, for the log, and stop if it was the last one that fits."""
        print(cycle_line(record), flush=True)
        if record.cycle and record.total_rollouts.total + record.rollouts.total > self.rollouts:
            raise StopRun


def run_job(folder: Path) -> Outcome:
    """Do a folder's job, from where it stands, and write its outcome.

    Raises:
        FSTError: As ``FST.compile``, or another process is at it.
    """
    job = read_job(folder)
    task, *others = (load_task(name, job.seed) for name in (job.program, *job.forget_on))
    for other in others:
        ideal_candidate(other)  # a program without one is refused before the work
    with _locked(folder), dspy.context(lm=load_lm(job)):
        results = compile_stages(folder, job, task)
        outcome = measure(job, task, others, results)
        write_outcome(folder, outcome)
    return outcome


def load_lm(job: Job) -> LocalLM:
    """The job's model, at the weights it starts from.

    Raises:
        ModelError, StoreError: It cannot be loaded.
    """
    if job.start is None:
        return LocalLM(job.model)
    policy = read_run(Path(job.start), None if job.model == "embedded" else job.model)
    policy.keep()
    return LocalLM(policy)


def compile_stages(folder: Path, job: Job, task: Task) -> list[FSTResult]:
    """The result of each of the arm's stages; a stage's program is the next one's student."""
    program, results = task.program, list[FSTResult]()
    spent = 0
    for number, stage in enumerate(find_arm(job.arm).stages):
        budget = max(1, round(job.rollouts * stage.until) - spent)
        optimizer = stage.make(
            task.metric,
            seed=job.seed,
            log_dir=folder / f"{number}-{stage.name}",
            track_stats=True,
            progress=Within(budget),
            reflection_lm=dspy.LM(job.reflection_lm) if job.reflection_lm else None,
            **{**job.settings, "max_rollouts": budget},
        )
        program = optimizer.compile(program, trainset=task.trainset, valset=task.valset)
        results.append(program.detailed_results)
        spent += results[-1].rollouts.total
    return results


def measure(job: Job, task: Task, others: Sequence[Task], results: Sequence[FSTResult]) -> Outcome:
    """Test what the stages led to. The live weights are the best ones, as a compile leaves them.

    Args:
        job, task: What was compiled.
        others: Tasks that may have been forgotten.
        results: One a stage.
    """
    started = time.monotonic()
    lm, best, base = dspy.settings.lm, results[-1].best, results[0].base_version
    runner = RolloutRunner(task.program, task.metric, lm, results[-1].config.sampling, job.seed)
    original, testset = seed_candidate(task.program), task.testset[: job.test_size]

    def test(candidate: Candidate, version: str, samples: int = 1) -> tuple[Rollout, ...]:
        found = evaluate(runner, [candidate], testset, samples=samples, version=version)
        return found.rollouts_K[0]

    rollouts = test(best.candidate, best.version, job.samples)
    scores = {"trained_evolved": scores_by_example(rollouts)}
    known = {(best.candidate.id, best.version): scores["trained_evolved"]}
    for quadrant, candidate, version in (
        ("base_original", original, base),
        ("base_evolved", best.candidate, base),
        ("trained_original", original, best.version),
    ):
        pair = (candidate.id, version)
        if pair not in known:  # arms with one channel off have fewer quadrants
            known[pair] = scores_by_example(test(candidate, version))
        scores[quadrant] = known[pair]
    calls = calls_of(rollouts)[:MEASURED_CALLS]
    kl, entropy = kl_to_base(lm.policy, calls), token_entropy(lm.policy, calls)
    if best.version == base:  # weights that were not changed have forgotten nothing
        others = []
    lost = forgetting(
        [replace(other, testset=other.testset[: job.test_size]) for other in others],
        before=lm.at(base),
        after=lm.at(best.version),
        samples=job.samples,
        sampling=results[-1].config.sampling,
        seed=job.seed,
    )
    seconds = _added([result.records[-1].seconds for result in results])
    return Outcome(
        test=scores,
        forgetting=lost,
        val_score=best.score,
        kl_to_base=kl,
        entropy=entropy,
        rollouts=reduce(RolloutCounts.plus, [result.rollouts for result in results]),
        steps=sum(result.records[-1].step for result in results),
        seconds={**seconds, "test": time.monotonic() - started},
        stages=tuple(Path(str(result.log_dir)).name for result in results),
        base_version=base,
        trained_version=best.version,
    )


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    channels = sorted({channel for part in parts for channel in part})
    return {channel: sum(part.get(channel, 0.0) for part in parts) for channel in channels}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait for the worker of an earlier attempt, which may still be saving its last step."""
    deadline = time.monotonic() + LOCK_SECONDS
    with open(folder / ".lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise FSTError(f"another process is at work in {folder}") from None
                time.sleep(0.2)
        yield


def _stop_with_parent() -> None:
    """When standard input ends, a pipe that the parent holds open, interrupt the main thread."""

    def wait() -> Any:
        while os.read(0, 1):  # not sys.stdin, whose lock would be held at exit
            pass
        os.kill(os.getpid(), signal.SIGINT)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=wait, daemon=True).start()


def main(folder: str) -> int:
    """Do the job of a folder; its exit code."""
    _stop_with_parent()
    try:
        run_job(Path(folder))
    except FSTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
