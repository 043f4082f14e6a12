"""The protocol of ``fst plasticity``: can weights that have learned one task still learn another?

Every arm learns the first task. Then the second one is learned by ``rl_only``, afresh: under the
program's own prompt, with the same settings and budget, from the best weights of each arm and from
the model as it came. What the last reaches is what the others are measured by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from fst_dspy.errors import ConfigError
from fst_dspy.experiments.arms import find_arm
from fst_dspy.experiments.jobs import Job, read_outcome
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.runner import ExperimentStore, run_jobs

RL = "rl_only"
BASE = "from-base"
ARMS = ("fst", RL)


def plasticity(
    store: ExperimentStore,
    plan: Plan,
    second: str,
    arms: Sequence[str] = ARMS,
    *,
    second_rollouts: int | None = None,
    rl_settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    console: Console | None = None,
) -> list[str]:
    """Run both tasks with every arm and seed, as far as they have not run yet.

    Args:
        store: Where all of it goes; ``about["starts"]`` names the arm of each starting point.
        plan: The common footing; its program is the first task.
        second: The second task's program.
        arms: Names in ``arms.ARMS`` that train weights.
        second_rollouts: Budget of each run on the second task; the plan's if not given.
        rl_settings: Settings of ``rl_only`` on both tasks, such as a study has found, beside the
            plan's, which they win over.
        workers: Processes at once.
        console: Where to tell of it.

    Returns:
        Names of the jobs that failed. Where an arm failed on the first task, the second is not
        begun from it.

    Raises:
        FSTError: Input that cannot work, before anything has run.
    """
    if not arms or len(set(arms)) < len(arms):
        raise ConfigError("give at least one arm, and each once")
    for arm in arms:
        if all(stage.name == "gepa_only" for stage in find_arm(arm).stages):
            raise ConfigError(f"{arm} leaves the weights as they are; give arms that train them")
    plan.check()
    then = replace(plan, program=second, rollouts=second_rollouts or plan.rollouts, forget_on=())
    then.check()
    first = {arm: plan.jobs(arm, arm, rl_settings if arm == RL else None) for arm in arms}
    fresh = then.jobs(BASE, RL, rl_settings)
    starts = {f"from-{arm}": arm for arm in arms}
    with store.locked():
        store.about.setdefault("starts", {}).update(starts)
        store.begin("plasticity")
        jobs = [job for group in (*first.values(), fresh) for job in group]
        failed = run_jobs(store, by_seed(jobs), workers=workers, console=console)
        jobs = [
            replace(job, label=label, start=f"../{begun.name}/{last_stage(store, begun)}")
            for label, arm in starts.items()
            for job, begun in zip(fresh, first[arm], strict=True)
            if store.is_done(begun.name)
        ]
        return failed + run_jobs(store, by_seed(jobs), workers=workers, console=console)


def by_seed(jobs: Sequence[Job]) -> list[Job]:
    """Seed by seed: a store that is looked at early compares whole seeds."""
    return sorted(jobs, key=lambda job: job.seed)


def last_stage(store: ExperimentStore, job: Job) -> str:
    """The run folder, within its own, of the stage that a finished job ended with."""
    return read_outcome(store.folder / job.name).stages[-1]
