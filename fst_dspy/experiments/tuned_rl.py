"""The baseline ``rl_only`` with settings of its own, found by a study at the same budget."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dspy
import optuna
from optuna.trial import TrialState

from fst_dspy.experiments.arms import BY_SCORE
from fst_dspy.experiments.jobs import adapter_setting
from fst_dspy.experiments.plan import Plan
from fst_dspy.experiments.runner import ExperimentStore, threads_each
from fst_dspy.run.store import delete_checkpoints
from fst_dspy.study import Categorical, Float, Int, Objective, Space, best_settings, tune
from fst_dspy.study.runner import OnTrial, hash_of_examples
from fst_dspy.tasks import load_task

SEED = 0


def rl_space() -> Space:
    """What a reinforcement learner is tuned in; FST's defaults are in it and are tried first.

    Learning rate, clip, batch (problems times group), temperature, KL penalty, entropy bonus, and
    how often settled problems come back.
    """
    return Space(
        (
            Float("learning_rate", 1e-5, 1e-3, log=True, by_size=True),
            Float("epsilon_high", 1.0, 8.0, log=True),
            Int("problems_per_step", 4, 16, step=4),
            Categorical("group_size", (4, 8, 16)),
            Float("temperature", 0.7, 1.3),
            Categorical("beta", (0.0, 1e-3, 1e-2, 1e-1)),
            Categorical("entropy_coef", (0.0, 1e-3, 1e-2)),
            Categorical("revisit_constant", (1.0, 0.5)),
        )
    )


def tune_rl(
    store: ExperimentStore,
    plan: Plan,
    trials: int,
    label: str,
    *,
    workers: int = 1,
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """Tune ``rl_only`` on seed 0 of the plan's task; started again, the study goes on.

    Every trial has the plan's budget and is measured by its best validation score within it. What
    the plan's settings fix is not tuned. The outcome of every trial is noted down in the store, and
    a study of which it has so many trials is not opened again, on the same plan.

    Args:
        store: Gets the study's folder, and ``about["tuned_rl"][label]``.
        plan: The common footing.
        trials: Trials in all; the first has FST's defaults.
        label: What the runs with the settings are called in the store.
        workers: Processes at once.
        on_trial: As for ``study.tune``.

    Returns:
        The best trial's settings, the plan's own included.

    Raises:
        ConfigError: No trial has completed, or all that could be tuned is fixed.
        FSTError: As ``study.tune``.
    """
    space, of = rl_space().beside(plan.settings), _of(plan)
    noted = store.about.get("tuned_rl", {}).get(label)
    if noted and _ended(noted["trials"]) >= trials and _is_of(noted, plan, of, space):
        return dict(noted["settings"])

    folder = store.folder / f"tune-{label}"

    def ended(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.state is not TrialState.FAIL:  # which may be tried again, in the same folder
            delete_checkpoints(folder / Path(trial.user_attrs["folder"]).name)
        if on_trial is not None:
            on_trial(study, trial)

    with _threads(threads_each(workers)), dspy.context(**adapter_setting(plan.adapter)):
        study = tune(
            plan.program,
            lm=plan.model,
            space=space,
            objective=Objective(("score",), plan.rollouts),
            fixed={**BY_SCORE, **plan.settings},
            trials=trials,
            workers=workers,
            folder=folder,
            seed=SEED,
            arm="rl_only",
            on_trial=ended,
        )
    best = best_settings(study)
    for name in {"max_rollouts", *BY_SCORE} - plan.settings.keys():
        del best[name]
    store.about.setdefault("tuned_rl", {})[label] = {
        "seed": SEED,
        "rollouts": plan.rollouts,
        "of": of,
        "settings": best,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "score": trial.values[0] if trial.state is TrialState.COMPLETE else None,
                "spent": trial.user_attrs.get("spent"),
                "settings": trial.params,
                "error": trial.user_attrs.get("error"),
            }
            for trial in study.trials
        ],
    }
    store.save()
    return best


def _of(plan: Plan) -> dict[str, Any]:
    """What a study of the plan is of, beside its budget and settings; the same on any machine."""
    task = load_task(plan.program, SEED)
    return {
        "task": task.name,
        "model": Path(plan.model).name,
        "adapter": plan.adapter,
        "examples": hash_of_examples(task),
    }


def _is_of(noted: Mapping[str, Any], plan: Plan, of: Mapping[str, Any], space: Space) -> bool:
    """Whether what was noted down is of this plan; earlier versions did not note all of it."""
    tuned = {parameter.name for parameter in space.parameters}
    fixed = {name: value for name, value in noted["settings"].items() if name not in tuned}
    return (
        noted["rollouts"] == plan.rollouts
        and noted.get("of", of) == of
        and fixed == json.loads(json.dumps(dict(plan.settings)))
    )


def _ended(trials: Sequence[Mapping[str, Any]]) -> int:
    """How many a study counts; one that failed is tried again."""
    ended = {state.name.lower() for state in (TrialState.COMPLETE, TrialState.PRUNED)}
    return sum(trial["state"] in ended for trial in trials)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The study's worker processes take their number of threads from the environment."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
