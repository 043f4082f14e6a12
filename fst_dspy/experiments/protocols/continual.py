"""The protocol of ``fst continual``: tasks learned one after another in one uninterrupted run.

Every arm learns the stages with ``ContinualFST``; every task is tested before the first stage and
after each one. What a task is measured by is its single-task peak: the test score of the same arm's
compile of that task alone, from the model as it came, with the same seed and the budget of a stage.
A stage's own score would not do, for it is what the stages before it may have spoiled. The first
stage is such a compile; the other tasks have jobs of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from fst_dspy.errors import ConfigError
from fst_dspy.experiments.jobs import Job
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.runner import ExperimentStore, run_jobs
from fst_dspy.experiments.streams import MODULE
from fst_dspy.tasks import load_task

RL = "rl_only"
ARMS = ("fst", RL)
KNOWN = ("fst", RL, "gepa_only")
SEED_PROMPT = "Fill in the output fields."
"""What every task begins with: it says nothing of any of them (paper, section 4)."""


def continual(
    store: ExperimentStore,
    plan: Plan,
    then: Sequence[str],
    arms: Sequence[str] = ARMS,
    *,
    rl_settings: Mapping[str, Any] | None = None,
    workers: int = 1,
    console: Console | None = None,
) -> list[str]:
    """Run the stream and the single compiles with every arm and seed, as far as they are missing.

    Args:
        store: Where all of it goes.
        plan: The common footing: its program is the first stage, its rollouts are a stage's budget.
        then: The programs of the stages after it; one that came before is learned again.
        arms: ``"fst"``, ``"rl_only"`` or ``"gepa_only"``.
        rl_settings: Settings of ``rl_only``, such as a study has found, beside the plan's, which
            they win over.
        workers: Processes at once.
        console: Where to tell of it.

    Returns:
        Names of the jobs that failed.

    Raises:
        FSTError: Input that cannot work, before anything has run.
    """
    if not arms or len(set(arms)) < len(arms) or set(arms) - set(KNOWN):
        raise ConfigError(f"arms of a stream are one or more of {', '.join(KNOWN)}, each once")
    if not then:
        raise ConfigError("a stream has at least two stages")
    names = stage_names(plan, then)
    others = [program for program in names if program != plan.program]
    jobs: list[Job] = []
    for arm in arms:
        settings = rl_settings if arm == RL else None
        rollouts = plan.rollouts * (1 + len(then))
        for job in plan.jobs(arm, arm, settings, rollouts=rollouts):
            jobs.append(replace(job, then=tuple(then), module=MODULE))
        for program in others:
            alone = replace(plan, program=program)
            jobs += alone.jobs(f"{arm}-alone-{names[program]}", arm, settings)
    # Seed by seed, the longest first: a store that is looked at early compares whole seeds.
    jobs.sort(key=lambda job: (job.seed, -job.rollouts))
    with store.locked():
        store.begin("continual")
        return run_jobs(store, jobs, workers=workers, console=console)


def stage_names(plan: Plan, then: Sequence[str]) -> dict[str, str]:
    """The task's name of each different program of the stages, which are checked on the way.

    Raises:
        ConfigError: Two programs have one name, which would make them one task.
        FSTError: As ``Plan.check``.
    """
    names = {}
    for program in dict.fromkeys((plan.program, *then)):
        replace(plan, program=program).check()
        names[program] = load_task(program, 0).name
    if len(set(names.values())) < len(names):
        told = ", ".join(names.values())
        raise ConfigError(f"tasks of a stream are told apart by name; got {told}")
    return names
