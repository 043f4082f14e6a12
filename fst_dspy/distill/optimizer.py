"""``FSTDistill``: an evolved context distilled into the weights (the paper's arm ``fst_distill``).

The prompted policy teaches the bare one: the weights under the evolved context are held fixed, and
the same weights under the student's own prompt are trained to answer alike, by reverse KL on what
the bare policy samples (``fst_dspy.distill.trainer``). The outcome is the bare prompt with the
distilled weights.

It is the joint loop of ``fst_dspy.optimizer`` with the fast channel off and another loss, so run
folders, resuming, budgets and records are the same. Every step runs ``problems_per_step`` times
``group_size`` rollouts; their rewards are recorded, and nothing is learned from them.

Example::

    evolved = fst_dspy.FST(metric, arm="gepa_only").compile(program, trainset=train, valset=val)
    bare = fst_dspy.FSTDistill(metric).compile(
        program, teacher=evolved, trainset=train, valset=val
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import dspy

from fst_dspy.distill.reader import ContextReader
from fst_dspy.distill.trainer import DistillTrainer
from fst_dspy.errors import ConfigError, ProgramError
from fst_dspy.lm.predictors import bound_to, find_local_lm
from fst_dspy.loop.state import LoopState
from fst_dspy.optimizer import FST, Start, _Run
from fst_dspy.results.result import FSTResult
from fst_dspy.rollouts.checks import CheckedInput, check_input
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.student.candidate import bind, seed_candidate
from fst_dspy.types import Candidate, Group, StepStats


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

    Args:
        metric: As for ``FST``.
        search_share: Share of ``max_rollouts`` and ``max_seconds`` that the search for the context
            may take, in (0, 1). ``max_cycles`` holds for the search and the distillation each.
        **options: As for ``FST``, but for ``arm``: settings, ``seed``, ``log_dir``, ... The search
            has the run folder ``log_dir/search``.

    Raises:
        ConfigError: A setting that is unknown or cannot work.
    """

    def __init__(
        self, metric: Callable[..., Any], *, search_share: float = 0.5, **options: Any
    ) -> None:
        if "arm" in options:
            raise ConfigError("FSTDistill is an arm of its own; leave arm out")
        if not 0 < search_share < 1:
            raise ConfigError(f"search_share must be between 0 and 1, got {search_share}")
        super().__init__(metric, arm="rl_only", **options)
        self.arm = "fst_distill"
        # Groups of equal rewards have a gradient here, so there is no need to draw others.
        slow = replace(self.config.slow, revisit_constant=1.0)
        self.config = replace(self.config, slow=slow)
        self._search = FST(metric, arm="gepa_only", **self._search_options(options, search_share))

    def _search_options(self, options: Mapping[str, Any], share: float) -> dict[str, Any]:
        # Its groups need not suit a population, and the search has none.
        own = {
            k: v for k, v in options.items() if k not in ("group_size", "rollouts_per_candidate")
        }
        own |= {"rollouts_per_candidate": 2, "track_stats": True}
        if self.log_dir is not None:
            own["log_dir"] = self.log_dir / "search"
        if options.get("max_rollouts") is not None:
            own["max_rollouts"] = max(1, int(options["max_rollouts"] * share))
        if options.get("max_seconds") is not None:
            own["max_seconds"] = options["max_seconds"] * share
        return own

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Train a copy of the student's weights to do without the teacher's context.

        Args:
            student: The program with the bare prompt.
            trainset: Examples to sample on.
            teacher: The same program with an evolved context, such as a compiled one. Its weights
                are the teacher's, and what the student's start from. What it has cost is not
                counted here. By default it is searched for.
            valset: As for ``FST.compile``.

        Returns:
            A copy of the student with its own prompt, bound to the best distilled weights.

        Raises:
            ConfigError: The teacher has the student's own prompt, or is another program.
            ProgramError: The teacher calls another local model than the student.
            Else as ``FST.compile``.
        """
        lm = check_input(student, self.metric, trainset, valset).lm
        bare, start, search = seed_candidate(student), Start(), None
        if teacher is None:
            teacher = self._search.compile(student, trainset=trainset, valset=valset)
            search = teacher.detailed_results
            last = search.records[-1]
            start = Start((), last.total_rollouts, last.tokens, last.seconds)
        elif seed_candidate(teacher).id == bare.id:
            raise ConfigError("the teacher has the student's own prompt: nothing to distill")
        teacher_lm, context = find_local_lm(teacher), seed_candidate(teacher)
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
        checked = check_input(pupil, self.metric, trainset, valset)
        return self._finish(_DistillRun(self, pupil, checked, start, context, search), pupil)


class _DistillRun(_Run):
    """The joint loop with the fast channel off, whose steps are distillation's."""

    def __init__(
        self,
        fst: FSTDistill,
        student: dspy.Module,
        checked: CheckedInput,
        start: Start,
        context: Candidate,
        search: FSTResult | None,
    ) -> None:
        self.context, self.search = context, search
        self.reader = ContextReader(student, context, checked.lm)
        super().__init__(fst, student, checked, start)

    def _make_trainer(self) -> SlowTrainer:
        cycles, slow = self.config.budget.max_cycles, self.config.slow
        total_steps = (cycles or 1) * slow.steps_per_cycle
        return DistillTrainer(
            self.policy, slow, self.config.sampling, total_steps, self.seed, self.lm.version
        )

    def _advance(self, groups_P: Sequence[Group]) -> StepStats:
        assert isinstance(self.trainer, DistillTrainer)
        rollouts = [rollout for group in groups_P for rollout in group.rollouts_G]
        return self.trainer.imitate(self.reader.read(rollouts))

    def _identity(self, checked: CheckedInput) -> dict[str, Any]:
        return {**super()._identity(checked), "context": dict(self.context.components)}

    def result(self, state: LoopState) -> DistillResult:
        plain = super().result(state)
        return DistillResult(
            **{f.name: getattr(plain, f.name) for f in fields(FSTResult)},
            context=self.context,
            teacher_version=self.lm.version,
            search=self.search,
        )
