"""``ContinualFST``: Fast-Slow Training on a stream of tasks (paper, continual learning).

Every task has a population of its own; the weights are shared and go on from task to task, while
the KL is measured to those that the model was loaded with. One switches between tasks by name:
what is learned of one does not touch another's prompts. Only the weights move under them, and
``evaluate`` says what that does.

A stage is one compile. It ends with the best weights on the task's validation examples, which are
shared from then on; its optimizer is its own. A new task begins with the population of the nearest
known one: the task whose best candidate, on a few training examples, does clearly better than the
program's own prompt. A task that is learned again goes on with its own population.

Example::

    learner = fst_dspy.ContinualFST(log_dir="runs/stream", max_rollouts=3000)
    for task in (mail, calls, mail):
        program = learner.learn(task)
    learner.program("calls")  # its best prompt, under the weights of now
    learner.evaluate().to_pandas()
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import dspy

from fst_dspy.bundle.saving import make_savable
from fst_dspy.config import ALIASES, STANDS_FOR, BudgetConfig
from fst_dspy.continual import folder as continual_bundle
from fst_dspy.continual.origin import Origin, alike, find_origin, fits, kept_origin
from fst_dspy.continual.scores import ScoreCache, StreamScores, test_examples
from fst_dspy.continual.stages import TaskStage, read_version
from fst_dspy.errors import ConfigError, ProgramError
from fst_dspy.fast.proposers.protocol import own_copy
from fst_dspy.files import folder_given, path_given
from fst_dspy.lm.in_use import versions_in_use
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import bound_to, find_local_lm
from fst_dspy.loop.progress import ProgressListener, default_progress
from fst_dspy.loop.state import Start
from fst_dspy.optimizer import FST
from fst_dspy.results.result import flat_settings
from fst_dspy.rollouts.checks import check_input
from fst_dspy.run.store import begun_budget
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.types import Arm, RolloutCounts, Task

STAGE_SEEDS = 1_000_003
"""How far the seeds of two stages lie apart; the first stage has the stream's own."""
IN_PLACE_OF = {
    **STANDS_FOR,
    "max_full_evals": "max_rollouts",
    "max_rollouts": "max_full_evals",
}
"""Saved settings that are not taken where another is given."""


class ContinualFST:
    """Learns one task after another on shared weights, with a population a task.

    With a ``log_dir`` the weights of earlier stages are kept on disk, without one in memory.

    Args:
        arm: ``"fst"``; ``"rl_only"`` has the programs' own prompts throughout, ``"gepa_only"`` the
            weights as they came.
        seed: Seed of everything random.
        log_dir: Folder of the stream, with a run folder a stage. A stream that was killed goes on
            when the same tasks are learned again with the same folder: finished stages are
            returned at once, the one under way is resumed. A larger budget is for the last stage
            that was begun, and those after it.
        progress: As for ``FST``.
        **options: Anything else that ``FST`` takes; budgets hold for each stage. Every stage has
            its own copy of an ``instruction_proposer`` that can be copied.

    Attributes:
        stages: What was learned so far, in order.

    Raises:
        ConfigError: A setting that is unknown or cannot work.
    """

    def __init__(
        self,
        *,
        arm: Arm = "fst",
        seed: int = 0,
        log_dir: str | PathLike[str] | None = None,
        progress: ProgressListener | None = None,
        **options: Any,
    ) -> None:
        self.arm, self.seed, self.progress = arm, seed, progress
        self.log_dir = folder_given(log_dir)
        self.options = {**options, "track_stats": True}
        self.stages: tuple[TaskStage, ...] = ()
        # Refuses settings that cannot work.
        self.config = FST(_no_metric, arm=arm, seed=seed, log_dir=log_dir, **self.options).config
        self._tasks: dict[str, Task] = {}
        self._lms: dict[str, LocalLM] = {}
        self._start_version = ""
        self._scores = ScoreCache(self.log_dir / "scores.json" if self.log_dir else None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the known tasks, in the order in which they were first learned."""
        return tuple(dict.fromkeys(stage.task for stage in self.stages))

    @property
    def rollouts(self) -> RolloutCounts:
        """Every rollout of the stream: stages, searches for the nearest task, evaluations."""
        total = RolloutCounts(eval=self._scores.rollouts)
        for stage in self.stages:
            total = total.plus(stage.result.rollouts)
        return total

    def learn(self, task: Task) -> dspy.Module:
        """Learn a task, or go on with one that is known by name.

        Args:
            task: Its program calls the stream's ``LocalLM``, its own or the one set with
                ``dspy.configure``.

        Returns:
            Its program, as ``program`` gives it, with an ``FSTResult`` as ``detailed_results``.

        Raises:
            ConfigError: A name that cannot name a folder.
            ProgramError: The program calls another local model than the tasks before, or has other
                predictors or fields than when it was last learned.
            StoreError: ``log_dir`` holds another stream.
            FSTError: Else as ``FST.compile``.
        """
        lm, number = self._check(task), len(self.stages) + 1
        version = self.stages[-1].version if self.stages else lm.version
        student = bound_to(task.program, seed_candidate(task.program), lm.at(version))
        valset = task.valset or None
        check_input(student, task.metric, task.trainset, valset)
        started_from, start = self._begin(task, number, student)
        folder = self._folder(number)
        options = {**self.options, "progress": self.progress}
        if "instruction_proposer" in options:
            options["instruction_proposer"] = own_copy(options["instruction_proposer"])
        fst = FST(task.metric, arm=self.arm, seed=self._seed(number), log_dir=folder, **options)
        fst.config = replace(fst.config, budget=self._budget(number))
        try:
            compiled = fst.compile_from(start, student, trainset=task.trainset, valset=valset)
        except KeyboardInterrupt as error:
            if folder is None:
                raise
            raise KeyboardInterrupt(
                f"stage {number}, {task.name}, was interrupted; learn the same tasks again with "
                f"log_dir={str(self.log_dir)!r} to go on where it stopped"
            ) from error
        self._start_version = self._start_version or version
        self._tasks[task.name], self._lms[task.name] = task, lm
        stage = TaskStage(task.name, started_from, lm.policy.lora, compiled.detailed_results)
        self.stages = (*self.stages, stage)
        self._forget_early_weights()
        return compiled

    def program(self, name: str) -> dspy.Module:
        """A known task's program: its best candidate, under the shared weights of now.

        Raises:
            ConfigError: There is no such task.
        """
        stage = self._stage_of(name)
        if stage is None:
            known = ", ".join(self.tasks) or "none yet"
            raise ConfigError(f"no task {name!r} has been learned; known: {known}")
        lm = self._lms[name].at(self.stages[-1].version)
        program = bound_to(self._tasks[name].program, stage.candidate, lm)
        program.detailed_results = stage.result
        make_savable(program, stage.result)
        return program

    def evaluate(self, *, samples: int = 1) -> StreamScores:
        """Scores of every task at every stage, on its test set (without one, its validation set).

        What was measured before is not measured again, by the same metric and program as it is.
        Rollouts are counted as ``eval``.

        Args:
            samples: Rollouts an example, whose mean is the score, at least 1.

        Raises:
            ConfigError: ``samples`` is less than 1.
            DataError: A task has neither test nor validation examples.
        """
        if samples < 1:
            raise ConfigError(f"samples must be at least 1, got {samples}")
        for name in self.tasks:
            test_examples(self._tasks[name])
        progress = self.progress or default_progress()
        progress.begin(BudgetConfig(max_cycles=len(self.stages) + 1))
        try:
            score_S_N = tuple(
                tuple(self._score(number, name, samples, progress) for name in self.tasks)
                for number in range(len(self.stages) + 1)
            )
        finally:
            progress.end()
            self._forget_early_weights()
        stages = ("base", *(stage.task for stage in self.stages))
        return StreamScores(self.tasks, stages, score_S_N)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write a folder with a bundle for each task (see ``fst_dspy.load``) and the history.

        Args:
            folder: A new or empty folder, or one that ``save`` wrote and nothing else is in, which
                is replaced.

        Raises:
            ConfigError: Nothing has been learned.
            StoreError: The folder holds something else, or cannot be written.
        """
        if not self.stages:
            raise ConfigError("nothing has been learned yet, so there is nothing to save")
        history = {
            "arm": self.arm,
            "seed": self.seed,
            "config": self.config.to_dict(),
            "start_version": self._start_version,
            "scores": self._scores.cells,
        }
        programs = {name: self.program(name) for name in self.tasks}
        return continual_bundle.write(Path(folder), history, self.stages, programs)

    @classmethod
    def load(
        cls, folder: str | PathLike[str], tasks: Sequence[Task], **options: Any
    ) -> ContinualFST:
        """The stream that ``save`` wrote to a folder, ready to go on.

        The weights of earlier stages are not in it: ``evaluate`` knows their scores where they
        were measured, and has ``None`` elsewhere.

        Args:
            folder: The folder; nothing in it is run.
            tasks: The known tasks, whose programs call the model that the stream began with.
            **options: As for the class, over the saved settings. ``log_dir``, ``progress``,
                ``reflection_lm`` and ``instruction_proposer`` are not saved.

        Raises:
            ConfigError: A known task is missing.
            ModelError, ProgramError: The programs call another model, or several.
            StoreError: The folder is damaged or holds something else.
        """
        path, given = path_given(folder), {task.name: task for task in tasks}
        history, stages = continual_bundle.read(path)
        saved = {"arm": history["arm"], "seed": history["seed"], **flat_settings(history["config"])}
        said = {ALIASES.get(name, name) for name in options}
        said |= {IN_PLACE_OF[name] for name in said if name in IN_PLACE_OF}
        kept = {name: value for name, value in saved.items() if name not in said}
        learner = cls(**kept, **options)
        learner._start_version = history["start_version"]
        learner._scores.cells = {**history["scores"], **learner._scores.cells}
        for name in dict.fromkeys(stage.task for stage in stages):
            if name not in given:
                raise ConfigError(f"the stream in {path} knows the task {name!r}; pass it as well")
            lm = learner._check(given[name])
            learner._tasks[name], learner._lms[name] = given[name], lm
            continual_bundle.read_shared_weights(path, stages[-1], lm.policy)
        learner.stages = stages
        return learner

    # --- inside -----------------------------------------------------------------------------------

    def _seed(self, number: int) -> int:
        return self.seed + STAGE_SEEDS * (number - 1)

    def _folder(self, number: int) -> Path | None:
        return self.log_dir / "stages" / f"{number:03d}" if self.log_dir is not None else None

    def _budget(self, number: int) -> BudgetConfig:
        """A stage's budget; of one that others have gone on from, what it was: they need it so."""
        folder, after = self._folder(number), self._folder(number + 1)
        if folder is None or after is None or not after.exists():
            return self.config.budget
        return begun_budget(folder)

    def _stage_of(self, name: str, until: int | None = None) -> TaskStage | None:
        """The last stage, of the first ``until``, that learned a task."""
        stages = [stage for stage in self.stages[:until] if stage.task == name]
        return stages[-1] if stages else None

    def _check(self, task: Task) -> LocalLM:
        if not re.fullmatch(r"\w[\w.-]*", task.name):
            raise ConfigError(
                f"the task name {task.name!r} must be made of letters, digits, '_', '-' and '.'"
            )
        lm = find_local_lm(task.program)
        if any(lm.policy is not other.policy for other in self._lms.values()):
            raise ProgramError(
                f"the program of the task {task.name} calls another local model, {lm.model}, than "
                "the tasks before; all tasks of a stream share one"
            )
        if task.name in self._tasks and not alike(task, self._tasks[task.name]):
            raise ProgramError(
                f"the program of the task {task.name} has other predictors or fields than when it "
                "was last learned; give it another name"
            )
        return lm

    def _begin(self, task: Task, number: int, student: dspy.Module) -> tuple[str | None, Start]:
        """The task whose population it begins with, and that population with what it has cost."""
        origin = kept_origin(
            self._folder(number), task.name, lambda: self._origin(task, number, student)
        )
        stage = self._stage_of(origin.name) if origin.name is not None else None
        size = self.config.fast.population_size
        candidates = stage.candidates(size) if stage is not None else ()
        spent = origin.counts, origin.tokens, origin.seconds, origin.turns
        return origin.name, Start(candidates, *spent)

    def _origin(self, task: Task, number: int, student: dspy.Module) -> Origin:
        if self.arm == "rl_only":
            return Origin(None)
        if task.name in self.tasks:
            return Origin(task.name)
        known = {
            stage.task: stage.candidate
            for stage in self.stages
            if alike(self._tasks[stage.task], task)
            and all(
                fits(candidate, student)
                for candidate in stage.candidates(self.config.fast.population_size)
            )
        }
        progress = self.progress or default_progress()
        progress.begin(self.config.budget)
        try:
            progress.phase(0, "nearest known task", RolloutCounts())
            return find_origin(task, student, known, self.config.sampling, self._seed(number))
        finally:
            progress.end()

    def _score(
        self, number: int, name: str, samples: int, progress: ProgressListener
    ) -> float | None:
        """A task's score after so many stages; ``None`` where the weights are not at hand."""
        task, lm, stage = self._tasks[name], self._lms[name], self._stage_of(name, number)
        candidate = stage.candidate if stage is not None else seed_candidate(task.program)
        version = self.stages[number - 1].version if number else self._start_version
        sampling = stage.result.sampling if stage is not None else self.config.sampling
        score = self._scores.find(task, candidate, version, samples, sampling)
        if score is not None:
            return score
        if not lm.policy.has(version) and not (
            number and read_version(lm.policy, self.stages[number - 1])
        ):
            return None
        progress.phase(number, f"evaluating {name}", self.rollouts)
        return self._scores.measure(task, candidate, version, samples, lm, sampling, self.seed)

    def _forget_early_weights(self) -> None:
        """Free the memory of weights that a stage's folder has, unless a program names them."""
        gc.collect()  # a program that can be saved refers to itself
        for lm in self._lms.values():
            used = versions_in_use(lm.policy) | {self.stages[-1].version}
            for stage in self.stages:
                if stage.result.log_dir is not None and stage.version not in used:
                    lm.policy.forget(stage.version)


def _no_metric(*_: Any) -> float:
    """Stands in where only the settings are looked at."""
    return 0.0
