"""The protocol of ``fst compare``: arms by seeds on one program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from fst_dspy.errors import ConfigError
from fst_dspy.experiments.arms import USUAL_ARMS, find_arm
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.runner import ExperimentStore, run_jobs
from fst_dspy.experiments.tuned_rl import tune_rl
from fst_dspy.study.runner import OnTrial

RL = "rl_only"


def compare(
    store: ExperimentStore,
    plan: Plan,
    arms: Sequence[str] = USUAL_ARMS,
    *,
    workers: int = 1,
    rl_trials: int = 0,
    rl_budget_factor: int = 1,
    console: Console | None = None,
    on_trial: OnTrial | None = None,
) -> list[str]:
    """Run every arm with every seed, as far as they have not run yet.

    Args:
        store: Where all of it goes.
        plan: The common footing.
        arms: Names in ``arms.ARMS``.
        workers: Processes at once.
        rl_trials: Trials of a study that tunes ``rl_only`` first (``tuned_rl.tune_rl``), at each of
            its budgets; 0 leaves it with the plan's settings. The other arms keep those.
        rl_budget_factor: Above 1, ``rl_only`` also runs with so many times the budget, as an entry
            of its own, so that its ceiling is seen.
        console: Where to tell of it.
        on_trial: Hears of the study's trials.

    Returns:
        Names of the jobs that failed.

    Raises:
        FSTError: Input that cannot work, before anything has run; or the study failed.
    """
    for arm in arms:
        find_arm(arm)
    if not arms or len(set(arms)) < len(arms):
        raise ConfigError("give at least one arm, and each once")
    if RL not in arms and (rl_trials or rl_budget_factor > 1):
        raise ConfigError(f"{RL} is not among the arms, so there is nothing to tune or prolong")
    if rl_budget_factor < 1 or rl_trials < 0:
        raise ConfigError("the budget factor is at least 1, and trials are not negative")
    plan.check()
    plain = [job for arm in arms for job in plan.jobs(arm, arm)]  # what cannot work fails here
    with store.locked():
        store.begin("compare")
        jobs = [job for job in plain if job.arm != RL]
        for factor in sorted({1, rl_budget_factor}) if RL in arms else ():
            label = RL if factor == 1 else f"{RL}-{factor}x"
            own, tuned = replace(plan, rollouts=factor * plan.rollouts), {}
            if rl_trials:
                tuned = tune_rl(store, own, rl_trials, label, workers=workers, on_trial=on_trial)
            jobs += own.jobs(label, RL, tuned)
        # Seed by seed, the longest first: a store that is looked at early compares whole seeds.
        jobs.sort(key=lambda job: (job.seed, -job.rollouts))
        return run_jobs(store, jobs, workers=workers, console=console)
