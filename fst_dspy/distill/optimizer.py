"""``FSTDistill``: an evolved context distilled into the weights (the paper's arm ``fst_distill``).

The prompted policy teaches the bare one: the weights under the evolved context are held fixed, and
the same weights under the student's own prompt are trained to answer alike, by reverse KL on what
the bare policy samples (``fst_dspy.slow.taught_trainer``). The outcome is the bare prompt with the
distilled weights.

It is the joint loop, ``fst_dspy.loop.joint``, with the fast channel off and another loss, so run
folders, resuming, budgets and records are the same. Every step runs ``problems_per_step`` times
``group_size`` rollouts; their rewards are recorded, and nothing is learned from them.

Example::

    evolved = fst_dspy.FST(metric, arm="gepa_only").compile(program, trainset=train, valset=val)
    bare = fst_dspy.FSTDistill(metric).compile(
        program, teacher=evolved, trainset=train, valset=val
    )
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy

from fst_dspy.config import LIMITS, BudgetConfig, FSTConfig, check_share, used_by, wished
from fst_dspy.distill.reader import ContextReader
from fst_dspy.errors import ConfigError, ProgramError
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.lm.predictors import bound_to, find_local_lm
from fst_dspy.loop.learner import schedule_steps
from fst_dspy.loop.parts import make_parts
from fst_dspy.loop.progress import ProgressListener, StopRun
from fst_dspy.loop.records import rollouts_of
from fst_dspy.loop.state import Start
from fst_dspy.optimizer import FST
from fst_dspy.results.result import FSTResult
from fst_dspy.run.store import begun_budget
from fst_dspy.slow.taught_trainer import TaughtTrainer, reverse_kl
from fst_dspy.slow.training_state import TrainingState
from fst_dspy.student.candidate import bind, seed_candidate
from fst_dspy.types import Candidate, CycleRecord, Group, StepStats

SEARCH_SHARE = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillResult(FSTResult):
    """What a distillation did and found; the records are those of the bare prompt.

    The first record is the bare prompt under the teacher's weights. What the search for the
    context has cost is in the records' running totals.

    Attributes:
        context: The texts that were distilled.
        teacher_version: Version id of the weights that read under them.
        search: The result of the search for the context; ``None`` where it was given.
    """

    context: Candidate
    teacher_version: str
    search: FSTResult | None


class FSTDistill(FST):
    """Distills an evolved context into the weights, so that the bare prompt does as well.

    Without a teacher the context is found first, by the arm ``gepa_only`` within the same budget.
    Where that keeps the student's own prompt there is nothing to distill: a warning says so, and
    the run ends with its first validation.

    Args:
        metric: As for ``FST``.
        search_share: Share of every limit but one that the search for the context may take, in
            (0, 1). ``max_cycles`` holds for the search and the distillation each.
        **options: As for ``FST``, but for ``arm``: settings, ``seed``, ``log_dir``, ... The search
            has the run folder ``log_dir/search``; a larger budget is for the distillation, once
            that has begun.

    Raises:
        ConfigError: A setting that is unknown or cannot work.
    """

    def __init__(
        self, metric: Callable[..., Any], *, search_share: float = SEARCH_SHARE, **options: Any
    ) -> None:
        if "arm" in options:
            raise ConfigError("FSTDistill is an arm of its own; leave arm out")
        check_share("search_share", search_share)
        super().__init__(metric, arm="rl_only", **options)
        self.arm = "fst_distill"
        given, self._given = self._given, used_by("rl_only", self._given)
        self._of_search = sorted(wished(given).keys() - self._given.keys())  # which tells of them
        if search_share != SEARCH_SHARE:
            self._of_search.append("search_share")
        # Groups of equal rewards have a gradient here, so there is no need to draw others.
        slow = replace(self.config.slow, revisit_constant=1.0)
        self.config = replace(self.config, slow=slow)
        search = FST(metric, arm="gepa_only", **self._search_options(options))
        # By the settings as they were read: a limit may have been given under another name.
        budget = _share_of(search.config.budget, search_share)
        search.config = replace(search.config, budget=budget)
        self._search = search

    def _search_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        # Its groups need not suit a population, and the search has none.
        own = {**used_by("gepa_only", options), "track_stats": True}
        if self.log_dir is not None:
            own["log_dir"] = self.log_dir / "search"
        return own

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
        seed_candidates: Sequence[Mapping[str, str] | dspy.Module] | None = None,
    ) -> dspy.Module:
        """Train a copy of the student's weights to do without the teacher's context.

        Args:
            student: The program with the bare prompt.
            trainset: Examples to sample on.
            teacher: The same program with an evolved context, such as a compiled one. Its weights
                are the teacher's, and what the student's start from. What it has cost is not
                counted here. By default it is searched for.
            valset: As for ``FST.compile``.
            seed_candidates: As for ``FST.compile``; what the search for a teacher begins with.

        Returns:
            A copy of the student with its own prompt, bound to the best distilled weights.

        Raises:
            ConfigError: The teacher has the student's own prompt, or is another program; or there
                is one, and seed candidates to search from.
            ProgramError: The teacher calls another local model than the student.
            FSTError: Else as ``FST.compile``.
        """
        if teacher is not None and seed_candidates is not None:
            raise ConfigError("seed_candidates are for the search for a teacher: give one of both")
        self.tell_without_effect()
        for name in self._of_search if teacher is not None else ():
            logger.warning("%s has no effect with a teacher: nothing is searched for", name)
        given = self.check(student, trainset, valset)
        lm, trainset, valset = given.lm, given.trainset, given.valset
        tools = self.config.fast.tool_descriptions
        bare, start, search = seed_candidate(student, tools), Start(), None
        if teacher is None:
            self._search.config = replace(self._search.config, budget=self._search_budget())
            teacher = self._search.compile(
                student, trainset=trainset, valset=valset, seed_candidates=seed_candidates
            )
            search = teacher.detailed_results
            last = search.records[-1]
            start = Start((), last.total_rollouts, last.tokens, last.seconds, last.turns)
        context = seed_candidate(teacher, tools)
        teaches = context.id != bare.id
        if search is None and not teaches:
            raise ConfigError("the teacher has the student's own prompt: nothing to distill")
        teacher_lm = find_local_lm(teacher)
        bind(student, context)
        if teacher_lm.policy is not lm.policy:
            raise ProgramError(
                f"the teacher calls {teacher_lm.model}, the student {lm.model}; distill between "
                "programs of one LocalLM"
            )
        if teacher_lm.version != lm.policy.base_version:
            lm.policy.restore(teacher_lm.version)
            lm.policy.keep()
        pupil = bound_to(student, bare, lm.at(teacher_lm.version))
        checked = self.check(pupil, trainset, valset)
        reader = ContextReader(pupil, context, lm)
        spec = replace(
            self.spec(),
            make_learner=partial(DistillLearner, reader, teacher_lm.version),
            identity={"context": dict(context.components)},
        )

        def with_context(plain: FSTResult) -> DistillResult:
            return DistillResult(
                **{f.name: getattr(plain, f.name) for f in fields(FSTResult)},
                context=context,
                teacher_version=teacher_lm.version,
                search=search,
            )

        parts = make_parts(spec, pupil, checked, start)
        if not teaches:
            logger.warning(
                "nothing is distilled: the search for a teacher kept the student's own prompt. "
                "Give it more (max_rollouts, search_share), or give a teacher"
                + ("" if self.log_dir is None else ", and another log_dir")
            )
            parts = replace(parts, progress=_FirstValidation(parts.progress))
        return self.finish(parts, pupil, with_context)

    def _search_budget(self) -> BudgetConfig:
        """The search's budget; once its context is being distilled, what it was: it is kept."""
        folder = self._search.log_dir
        begun = self.log_dir is not None and (self.log_dir / "config.json").exists()
        if folder is None or not (begun and (folder / "config.json").exists()):
            return self._search.config.budget
        return begun_budget(folder)


class _FirstValidation:
    """A listener that ends the run with its first validation, and leaves all else to another."""

    def __init__(self, listener: ProgressListener) -> None:
        self._listener = listener

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def cycle_done(self, record: CycleRecord) -> None:
        self._listener.cycle_done(record)
        raise StopRun("there is nothing to distill")


def _share_of(budget: BudgetConfig, share: float) -> BudgetConfig:
    """A share of every limit that is set, but of cycles."""
    limits = {name: getattr(budget, name) for name in LIMITS if name != "max_cycles"}
    parts: dict[str, Any] = {
        name: limit * share if name.endswith("seconds") else max(1, int(limit * share))
        for name, limit in limits.items()
        if limit is not None
    }
    return replace(budget, **parts)


class DistillLearner:
    """In the slow channel's place: a step's calls, imitated as the teacher would have made them.

    Args:
        reader: Renders the calls under the teacher's context.
        teacher_version: The teacher's weights, at hand in the policy.
        lm, program, config, seed: As for ``GRPOLearner``.
    """

    learns_from_rewards = learns_from_text = False

    def __init__(
        self,
        reader: ContextReader,
        teacher_version: str,
        lm: LocalLM,
        program: dspy.Module,
        config: FSTConfig,
        seed: int,
    ) -> None:
        self._reader = reader
        self._trainer = TaughtTrainer(
            lm.policy,
            config.slow,
            config.sampling,
            schedule_steps(config),
            seed,
            teaching=lambda: lm.policy.at(teacher_version),
            divergence=reverse_kl,
        )

    def advance(self, groups_P: Sequence[Group], candidates: Mapping[str, Candidate]) -> StepStats:
        """See ``Learner.advance``; the rewards are not learned from."""
        readings = self._reader.read(rollouts_of(groups_P), candidates)
        stats = self._trainer.imitate(readings.found)
        return replace(stats, taught=len(readings.found), untaught=readings.untaught)

    def learn_from_text(self) -> None:
        """See ``Learner.learn_from_text``; the teacher here is another one."""

    @property
    def bad_steps(self) -> int:
        """See ``Learner.bad_steps``."""
        return self._trainer.bad_steps

    def state(self) -> TrainingState:
        """See ``Learner.state``."""
        return self._trainer.state()

    def load(self, folder: Path) -> None:
        """See ``Learner.load``."""
        self._trainer.load(folder)
