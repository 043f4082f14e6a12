"""Running a study: ``tune``, and the workers it starts.

Every trial is one ``FST`` compile from the base weights, with its own run folder under the study's
folder. A worker that is killed leaves its trial's run folder; the trial is queued again and goes on
from its last checkpoint. Starting the same ``tune`` again goes on with the study.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import multiprocessing
import pickle
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import dspy
import optuna
from dspy.dsp.utils.settings import DEFAULT_CONFIG
from optuna.distributions import check_distribution_compatibility
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from fst_dspy.config import ALIASES
from fst_dspy.errors import (
    ConfigError,
    DataError,
    FSTError,
    MetricError,
    ModelError,
    ProgramError,
    StoreError,
)
from fst_dspy.files import as_plain, path_given, writing_to
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.model.sizes import parameter_count
from fst_dspy.optimizer import FST
from fst_dspy.plan.files import described_by_name
from fst_dspy.student.candidate import content_hash, example_id
from fst_dspy.study.objective import BudgetSpentError, Objective, TrialListener
from fst_dspy.study.outcome import front
from fst_dspy.study.space import Space, draw_settings, usual_space
from fst_dspy.study.storage import (
    open_storage,
    retried_numbers,
    retry,
    retry_lost_trials,
    sqlite_url,
    unwatched,
    worker_alive,
)
from fst_dspy.tasks import load_task
from fst_dspy.types import Arm, Task

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
OF_A_CALL = frozenset(
    [
        "lm",
        "callbacks",
        "trace",
        "branch_idx",
        "send_stream",
        "stream_listeners",
        "usage_tracker",
        "caller_predict",
        "caller_modules",
    ]
)
"""DSPy's settings that a trial has of its own, or that belong to the process or the call."""
DRAWS = 16
"""Settings drawn to see whether any trial can run at all."""
OF_THE_STUDY = {
    "max_rollouts": "a trial's budget is the objective's: Objective(rollouts=), or --rollouts",
    "metric": "the task has it",
    "seed": "give it to the study itself",
    "arm": "give it to the study itself",
    "reflection_lm": "give it to the study itself",
    "log_dir": "a trial's run folder is in the study's",
    "progress": "hear of trials by on_trial",
}
"""What of FST's arguments a study gives itself, and how that is said."""
NOT_OF_THE_SETTINGS = (DataError, MetricError, ModelError, ProgramError, StoreError)
"""Raised for the task, the model or the disk, whatever the settings: they end the study, and the
trial goes on with it once that is mended."""

OnTrial = Callable[[optuna.Study, FrozenTrial], None]


class TrialFailedError(Exception):
    """A trial ended with an error, which is its cause."""


@dataclass(frozen=True)
class StudyPlan:
    """All that a worker needs; several workers get it through a pickle.

    Attributes:
        task: A program's name or file, a function that makes the task, or the task itself.
        lm: A model's name for ``LocalLM``, or a function that makes the ``LocalLM``.
        space: What is tuned.
        objective: What for.
        fixed: FST's settings that all trials share.
        folder: Where the run folders go.
        storage: URL of the study's storage.
        study_name: Its name there.
        trials: Trials to finish, failed and pruned ones included.
        seed: Of the task and every compile. Worker ``i`` draws settings with ``seed + i``.
        arm: As for ``FST``.
        reflection_lm: As for ``FST``.
        carried: What DSPy was set to where the study was started, such as ``adapter`` and ``rm``.
    """

    task: str | Path | Task | Callable[[], Task]
    lm: str | Callable[[], LocalLM]
    space: Space
    objective: Objective
    folder: Path
    storage: str
    study_name: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 20
    seed: int = 0
    arm: Arm = "fst"
    reflection_lm: dspy.LM | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)

    def load_task(self) -> Task:
        """The task, from whatever stands for it."""
        if isinstance(self.task, Task):
            return self.task
        if isinstance(self.task, str | Path):
            return load_task(str(self.task), self.seed)
        return self.task()

    def load_lm(self) -> LocalLM:
        """A model with base weights."""
        return LocalLM(self.lm) if isinstance(self.lm, str) else self.lm()

    def settings(self) -> dict[str, Any]:
        """DSPy's settings for a trial, in whatever process it runs."""
        return {**self.carried, "lm": self.load_lm()}


def tune(
    task: str | Path | Task | Callable[[], Task],
    *,
    lm: str | Callable[[], LocalLM] = "embedded",
    space: Space | None = None,
    objective: Objective | None = None,
    fixed: Mapping[str, Any] | None = None,
    trials: int = 20,
    workers: int = 1,
    folder: str | Path = "runs/study",
    storage: str | None = None,
    study_name: str = "fst",
    warm_start: Sequence[optuna.Study] = (),
    seed: int = 0,
    arm: Arm = "fst",
    reflection_lm: dspy.LM | None = None,
    on_trial: OnTrial | None = None,
) -> optuna.Study:
    """Tune FST's settings on a task.

    The first trial has FST's defaults, the next ones the best settings of ``warm_start``, the
    others are drawn by Optuna's TPE. All have DSPy's settings as they are here, the adapter among
    them, but for its callbacks in processes of their own. Each trial runs until the objective's
    rollout budget is spent, or it is pruned or fails; a failed trial keeps its run folder and its
    error.

    Args:
        task: A program's name or file (as for ``fst compile``), a function without arguments that
            returns a ``Task``, or a ``Task``. Workers in processes of their own cannot take a
            ``Task``, whose metric seldom pickles.
        lm: A model's name, or a function that returns a ``LocalLM`` with base weights. It is
            loaded anew for every trial.
        space: What is tuned; ``default_space()`` less what is fixed, if not given. The learning
            rate is around the default of a model that is named; of a function's, around that of
            small ones.
        objective: What for; the validation score after 3,000 rollouts if not given.
        fixed: Settings of FST that all trials share, such as ``{"val_size": 32}``.
        trials: Trials to finish, counting those of earlier calls, pruned and failed ones. With
            several workers there may be up to ``workers - 1`` more.
        workers: Processes that run trials; 1 runs them in this process. More of them, here or on
            other machines, may join the same study through its storage.
        folder: The study's folder: one run folder a trial.
        storage: ``sqlite:///...``, ``journal:///...`` or ``postgresql://...``, see
            ``open_storage``; if not given, SQLite in ``folder``.
        study_name: The study's name in the storage.
        warm_start: Earlier studies, on this or other tasks, whose best settings are tried early.
        seed: Seed of the task, of every compile and of the draws.
        arm: As for ``FST``.
        reflection_lm: As for ``FST``.
        on_trial: Called in this process with every trial that has finished.

    Returns:
        The study. ``best_settings(study)`` gives what ``FST`` takes.

    Raises:
        ConfigError: Settings that cannot work, or a study of that name with another objective,
            model or the like.
        DataError, MetricError, ModelError, ProgramError: The task or the model cannot be used.
        FSTError: All workers died before the study was done.
    """
    if workers > 1 and isinstance(task, Task):
        raise ConfigError(
            "several workers each load the task themselves: pass the program's name or file, or a "
            "function of a module that returns the Task"
        )
    folder = path_given(folder)
    fixed = {name: as_plain(value) for name, value in (fixed or {}).items()}
    if space is None:
        space = usual_space(arm, fixed)
    plan = StudyPlan(
        task=task,
        lm=lm,
        space=space,
        objective=objective or Objective(),
        folder=folder,
        storage=storage or sqlite_url(folder / "study.db"),
        study_name=study_name,
        fixed=fixed,
        trials=trials,
        seed=seed,
        arm=arm,
        reflection_lm=reflection_lm,
        carried=_set_in_dspy(),
    )
    if workers > 1:
        _check_carried(plan)
    own_task = plan.load_task()
    _check_settings(plan, own_task)
    study = open_study(plan, own_task)
    plan = replace(plan, space=plan.space.for_size(_size_of(plan)))
    _enqueue_first(study, plan, warm_start)
    told = _Told(study, on_trial)
    if workers == 1:
        run_worker(plan, 0, lambda _study, _trial: told.update())
    else:
        _run_processes(plan, workers, told)
    told.update()
    return study


def _size_of(plan: StudyPlan) -> int:
    """Parameters of a model that is named, which is not loaded; of others it is not known here."""
    return parameter_count(described_by_name(plan.lm)[1]) if isinstance(plan.lm, str) else 0


def _set_in_dspy() -> dict[str, Any]:
    """What DSPy was set to; the rest is as it comes, or as a task's file sets it when loaded."""
    return {
        name: value
        for name, value in dspy.settings.config.items()
        if name not in OF_A_CALL and not (name in DEFAULT_CONFIG and value == DEFAULT_CONFIG[name])
    }


def _check_carried(plan: StudyPlan) -> None:
    """That DSPy's settings can be sent to processes.

    Raises:
        ConfigError: One cannot.
    """
    for name, value in plan.carried.items():
        try:
            pickle.dumps(value)
        except Exception as error:
            raise ConfigError(
                f"several workers need dspy.settings.{name}, which cannot be sent to them "
                f"({error}): make it in the task's own file, or take workers=1"
            ) from error


def _check_settings(plan: StudyPlan, task: Task) -> None:
    """Refuse settings with which no trial could run, before the first of them.

    Raises:
        ConfigError: What is fixed is also tuned, or the study's own to say, or cannot work.
    """
    both = plan.space.fixed_by(plan.fixed)
    if both:
        raise ConfigError(
            f"both fixed and in the search space: {', '.join(both)}; leave it out of one of them"
        )
    own = sorted(OF_THE_STUDY.keys() & {ALIASES.get(name, name) for name in plan.fixed})
    if own:
        raise ConfigError(
            f"{', '.join(own)} cannot be fixed; {'; '.join(OF_THE_STUDY[name] for name in own)}"
        )
    # Some draws may not work, and their trials fail; where none of many does, none will.
    errors = list[ConfigError]()
    for drawn in draw_settings(plan.space, DRAWS, plan.seed):
        try:
            whole = {**plan.fixed, **drawn, "max_rollouts": plan.objective.rollouts}
            _optimizer(plan, task, whole, log_dir=plan.folder)
            return
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _optimizer(plan: StudyPlan, task: Task, settings: Mapping[str, Any], **options: Any) -> FST:
    return FST(
        task.metric,
        seed=plan.seed,
        arm=plan.arm,
        reflection_lm=plan.reflection_lm,
        **options,
        **settings,
    )


def open_study(plan: StudyPlan, task: Task, worker: int = 0) -> optuna.Study:
    """Create the study, or take up the one of that name.

    Raises:
        ConfigError: It has another objective, task, model, reflection LM, seed, arm, adapter or
            fixed settings: its scores and new ones could not be compared. Or it has drawn a
            setting from other choices, which Optuna cannot change.
    """
    study = optuna.create_study(
        storage=open_storage(plan.storage),
        pruner=plan.objective.make_pruner(),
        study_name=plan.study_name,
        directions=plan.objective.directions,
        load_if_exists=True,
    )
    # Another seed when a study goes on: it must not draw the same settings again.
    draws = f"{plan.seed}/{worker}/{len(study.get_trials(deepcopy=False))}"
    study.sampler = optuna.samplers.TPESampler(
        seed=random.Random(draws).getrandbits(32),
        n_startup_trials=8,
    )
    adapter = plan.carried.get("adapter")
    wanted = {
        "objective": asdict(plan.objective),
        "fixed": dict(plan.fixed),
        "task": task.name,
        "seed": plan.seed,
        "arm": plan.arm,
        "adapter": type(adapter).__name__ if adapter else None,
        "lm": _name_of_model(plan.lm),
        "reflection_lm": getattr(plan.reflection_lm, "model", None),
    }
    found = study.user_attrs
    for name, value in json.loads(json.dumps(wanted)).items():
        if name not in found:
            study.set_user_attr(name, value)
        elif found[name] != value:
            raise ConfigError(
                f"the study {plan.study_name!r} has another {name}: {found[name]}, not {value}; "
                "choose another folder, or another study name"
            )
    _check_drawn(study, plan.space)
    examples = hash_of_examples(task)
    if found.get("examples", examples) != examples:
        logger.warning(
            f"the examples of the task {task.name} have changed since the study "
            f"{plan.study_name!r} began; the scores of before are those on the old ones"
        )
    study.set_user_attr("examples", examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(list(plan.objective.measures))  # axes of plots and dashboards
    return study


def hash_of_examples(task: Task) -> str:
    """What tells the examples that a task learns and is validated on from others."""
    found = (e for e in (*task.trainset, *(task.valset or ())) if isinstance(e, dspy.Example))
    return content_hash([example_id(example) for example in found])


def _check_drawn(study: optuna.Study, space: Space) -> None:
    """That Optuna can go on to draw what the study has drawn so far.

    Raises:
        ConfigError: A setting's choices, or its kind of range, were others.
    """
    wanted = {parameter.name: parameter.distribution() for parameter in space.parameters}
    for trial in study.get_trials(deepcopy=False):
        for name in trial.distributions.keys() & wanted.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], wanted[name])
            except ValueError as error:
                raise ConfigError(
                    f"the study {study.study_name!r} has drawn {name} from "
                    f"{trial.distributions[name]}, not {wanted[name]}, and a study keeps its "
                    "choices; choose another folder, or another study name"
                ) from error


def _name_of_model(lm: str | Callable[[], LocalLM]) -> str:
    """A model's name, or that of the function that makes it; on another machine the same."""
    if isinstance(lm, str):
        return Path(lm).name
    while isinstance(lm, functools.partial):
        lm = lm.func
    return str(getattr(lm, "__qualname__", type(lm).__qualname__))


def run_worker(plan: StudyPlan, worker: int = 0, on_trial: OnTrial | None = None) -> None:
    """Run trials until the study has as many as planned. Any number of workers may do so at once.

    A worker stays until the trials of the others have ended too, to take over those of a worker
    that dies.
    """
    task = plan.load_task()
    study = open_study(plan, task, worker)
    told = False
    with worker_alive(plan.folder) as name:
        while True:
            retry_lost_trials(study, plan.folder)
            finished, running = count_trials(study)
            if finished >= plan.trials:
                return
            if finished + running >= plan.trials:
                if not told and (elsewhere := unwatched(study, plan.storage, plan.folder)):
                    told = True
                    logger.warning(
                        f"the study waits for trials {elsewhere}, whose workers are not known in "
                        f"{plan.folder}; if one has died, no other will notice: on several "
                        "machines share the study's folder, or take postgresql://..."
                    )
                time.sleep(POLL_SECONDS)
                continue
            study.optimize(
                lambda trial: run_trial(trial, plan, task, name),
                n_trials=1,
                catch=(TrialFailedError,),
                callbacks=[on_trial] if on_trial is not None else None,
                gc_after_trial=True,  # the trial's model
            )


def count_trials(study: optuna.Study) -> tuple[int, int]:
    """Trials that have ended for good, and trials under way."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    running = states.count(TrialState.RUNNING)
    finished = sum(state.is_finished() for state in states) - len(retried_numbers(study))
    return finished, running


def run_trial(trial: optuna.Trial, plan: StudyPlan, task: Task, worker: str) -> Sequence[float]:
    """Compile with the trial's settings and measure the outcome.

    Kept in the trial's user attributes: ``settings`` (for ``FST(**settings)``), ``folder``,
    ``measured``, ``spent`` (rollouts, all channels), ``reports`` and, where it failed, ``error``.
    """
    trial.set_user_attr("worker", worker)
    settings = {
        **plan.fixed,
        **plan.space.suggest(trial),
        "max_rollouts": plan.objective.rollouts,
    }
    try:
        folder = _folder_of(trial, plan)
        trial.set_user_attr("folder", str(folder))
        trial.set_user_attr("settings", settings)
        listener = TrialListener(trial, plan.objective, folder)
        fst = _optimizer(plan, task, settings, log_dir=folder, progress=listener)
        with dspy.context(**plan.settings()):
            fst.compile(task.program, trainset=task.trainset, valset=task.valset)
    except BudgetSpentError:
        pass
    except KeyboardInterrupt:
        retry(trial.study, trial.number, at_most=None)  # Optuna marks this one failed
        raise
    except optuna.TrialPruned:
        _keep_measures(trial, plan, listener)
        raise
    except Exception as error:
        if isinstance(error, NOT_OF_THE_SETTINGS):
            retry(trial.study, trial.number)
        trial.set_user_attr("error", f"{type(error).__name__}: {error}")
        if isinstance(error, NOT_OF_THE_SETTINGS):
            raise
        raise TrialFailedError(str(error)) from error
    listener.finish()
    _keep_measures(trial, plan, listener)
    return listener.measured().values(plan.objective.measures)


def _folder_of(trial: optuna.Trial, plan: StudyPlan) -> Path:
    """The trial's run folder: the one it was begun in, or one that holds no other study's trial.

    Raises:
        StoreError: It cannot be made.
    """
    if known := trial.user_attrs.get("folder"):
        # By its name: the study's folder may be another one by now, or on another machine.
        return plan.folder / Path(known).name
    name = f"trial-{trial.number:04d}"
    with writing_to(plan.folder):
        for number in itertools.count(1):
            folder = plan.folder / (name if number == 1 else f"{name}_{number}")
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
    return folder


def _keep_measures(trial: optuna.Trial, plan: StudyPlan, listener: TrialListener) -> None:
    measured = listener.measured()
    trial.set_user_attr("measured", asdict(measured))
    trial.set_user_attr("spent", listener.spent)
    for limit, excess in plan.objective.excesses(measured).items():
        trial.set_constraint(limit, excess)


def _enqueue_first(
    study: optuna.Study, plan: StudyPlan, warm_start: Sequence[optuna.Study]
) -> None:
    """Queue the defaults and the earlier studies' best settings, once."""
    if study.get_trials(deepcopy=False):
        return
    study.enqueue_trial(plan.space.defaults(), {"source": "defaults"}, skip_if_exists=True)
    for earlier in warm_start:
        for trial in front(earlier):
            settings = plan.space.restrict(trial.params)
            source = {"source": f"{earlier.study_name}, trial {trial.number}"}
            if settings:
                study.enqueue_trial(settings, source, skip_if_exists=True)


class _Told:
    """Tells of every finished trial once, whichever process ran it."""

    def __init__(self, study: optuna.Study, on_trial: OnTrial | None) -> None:
        self.study, self.on_trial = study, on_trial
        self.seen = {t.number for t in study.get_trials(deepcopy=False) if t.state.is_finished()}

    def update(self) -> None:
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in self.seen:
                self.seen.add(trial.number)
                if self.on_trial is not None:
                    self.on_trial(self.study, trial)


def _run_processes(plan: StudyPlan, workers: int, told: _Told) -> None:
    # Not "fork": torch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_process, args=(plan, index), name=f"fst-worker-{index}")
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        while any(process.is_alive() for process in processes):
            told.update()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        # The workers got it too: they finish and save their step, and queue their trial again.
        for process in processes:
            process.join()
        raise
    dead = [f"{p.name} ({p.exitcode})" for p in processes if p.exitcode != 0]
    finished, _ = count_trials(told.study)
    if finished < plan.trials:
        raise FSTError(
            f"{finished} of {plan.trials} trials are done, but the workers ended: "
            f"{', '.join(dead) or 'with exit code 0'}; what they said is above. Start the same "
            "study again to go on"
        )
    if dead:
        logger.warning("workers that died on the way: %s", ", ".join(dead))


def _process(plan: StudyPlan, worker: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run_worker(plan, worker)
