"""One job in a process of its own: ``python -m fst_dspy.experiments.worker FOLDER``.

The arm's stages are compiled one after another, each with its own run folder, so that a job that
was killed goes on where it stood; then the best pair is tested. Testing is not part of the budget.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import dspy

from fst_dspy.bundle.weights import read_run
from fst_dspy.experiments.jobs import Job, Outcome, adapter_setting, read_job, write_outcome
from fst_dspy.experiments.process import locked, work
from fst_dspy.experiments.runner import revision
from fst_dspy.experiments.stages import compile_stages, load_job_task
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.measures import forgetting, ideal_candidate, scores_by_example
from fst_dspy.model.divergence import kl_to_base, spread_calls, token_entropy
from fst_dspy.results.result import FSTResult
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.tasks import load_task
from fst_dspy.types import Candidate, Rollout, RolloutCounts, Task

MEASURED_TOKENS = 131_072
"""Prompt and completion tokens of the test rollouts' calls that KL and entropy are measured on."""


def run_job(folder: Path) -> Outcome:
    """Do a folder's job, from where it stands, and write its outcome.

    Raises:
        FSTError: As ``FST.compile``, or another process is at it.
    """
    job = read_job(folder)
    task = load_job_task(job, job.program)
    others = [load_task(name, job.seed) for name in job.forget_on]
    for other in others:
        ideal_candidate(other)  # a program without one is refused before the work
    with locked(folder), dspy.context(lm=load_lm(folder, job), **adapter_setting(job.adapter)):
        results = compile_stages(folder, job, task)
        outcome = measure(job, task, others, results)
        write_outcome(folder, outcome)
    return outcome


def load_lm(folder: Path, job: Job) -> LocalLM:
    """The job's model, at the weights it starts from.

    Raises:
        ModelError, StoreError: It cannot be loaded.
    """
    if job.start is None:
        return LocalLM(job.model)
    policy = read_run(folder / job.start, None if job.model == "embedded" else job.model)
    policy.keep()
    return LocalLM(policy)


def measure(job: Job, task: Task, others: Sequence[Task], results: Sequence[FSTResult]) -> Outcome:
    """Test what the stages led to. The live weights are the best ones, as a compile leaves them.

    Where the compiled program's answers are held to their format, those of all quadrants are.

    Args:
        job, task: What was compiled.
        others: Tasks that may have been forgotten.
        results: One a stage.
    """
    started = time.monotonic()
    lm, best, base = dspy.settings.lm, results[-1].best, results[0].base_version
    held = any(result.structured for result in results)  # of one stage, of all after it
    sampling = replace(results[-1].sampling, temperature=job.test_temperature, structured=held)
    runner = RolloutRunner(task.program, task.metric, lm, sampling, job.seed)
    original = seed_candidate(task.program)

    def test(candidate: Candidate, version: str, samples: int = 1) -> tuple[Rollout, ...]:
        found = evaluate(runner, [candidate], task.testset, samples=samples, version=version)
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
    calls = spread_calls(rollouts, MEASURED_TOKENS, job.seed)
    kl, entropy = kl_to_base(lm.policy, calls), token_entropy(lm.policy, calls)
    lost = forgetting(
        [replace(other, testset=other.testset[: job.test_size]) for other in others],
        before=lm.at(base),
        after=lm.at(best.version),
        samples=job.samples,
        sampling=sampling,
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
        revision=revision(),
    )


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    channels = sorted({channel for part in parts for channel in part})
    return {channel: sum(part.get(channel, 0.0) for part in parts) for channel in channels}


if __name__ == "__main__":
    sys.exit(work(run_job, sys.argv[1]))
