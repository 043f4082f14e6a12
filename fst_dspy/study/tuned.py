"""``TunedFST``: FST that also finds its own settings, within one budget of rollouts.

Successive halving (Jamieson & Talwalkar, 2016). A few settings, the defaults among them, run on a
share of the budget: all of them a little, then the better half further, and so on. The best run
then *goes on* where it stood and gets all that is left, so nothing it did is lost. Every rollout of
the runs given up counts against the budget and is in the result.

It is worth it for budgets of many cycles; on a small one, plain ``FST`` spends it better.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt import Teleprompter

from fst_dspy.config import check_share
from fst_dspy.errors import ConfigError, TrainingError
from fst_dspy.fast.proposers.protocol import own_copy
from fst_dspy.files import folder_given, read_jsonl
from fst_dspy.lm.predictors import find_local_lm
from fst_dspy.loop.progress import (
    ProgressListener,
    SilentProgress,
    StopRun,
    default_progress,
    tell,
    tell_plan,
)
from fst_dspy.model.sizes import parameter_count
from fst_dspy.optimizer import FST, check_kinds
from fst_dspy.plan.plan import Plan
from fst_dspy.results.result import FSTResult
from fst_dspy.run.records import cycle_record
from fst_dspy.study.space import Space, draw_settings, usual_space
from fst_dspy.types import CycleRecord, RolloutCounts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriedSettings:
    """One setting that was tried, and how far its run came.

    Attributes:
        settings: What was tuned; the rest is as the user gave it.
        score: Best validation score when it was last compared.
        rollouts: All rollouts of its run.
        given_up_after: Round of halving after which it was given up; ``None`` for the winner.
    """

    settings: Mapping[str, Any]
    score: float
    rollouts: RolloutCounts
    given_up_after: int | None = None


@dataclass(frozen=True)
class TunedResult(FSTResult):
    """The result of the winning run, and what else was tried.

    Attributes:
        tried: Every setting, the defaults first.
    """

    tried: tuple[TriedSettings, ...] = field(default=())

    @property
    def rollouts(self) -> RolloutCounts:
        """Every rollout of the compile, the runs that were given up included."""
        return _total([one.rollouts for one in self.tried])


def _total(counts: Sequence[RolloutCounts]) -> RolloutCounts:
    return functools.reduce(RolloutCounts.plus, counts, RolloutCounts())


class TunedFST(Teleprompter):
    """FST with its outer settings tuned inside the compile.

    Args:
        metric: As for ``FST``.
        max_rollouts: The budget of the whole compile, over all settings tried and all channels.
            The cycle under way when it is reached is finished.
        trials: Settings to try, the defaults included; at least 2.
        tuning_share: Share of the budget that is spent on comparing them, in (0, 1).
        space: What is tuned; ``default_space()`` if not given, less what ``options`` set.
        seed: Seed of the draws and of every run.
        log_dir: Folder of the run folders, one a setting. Started again with the same one, a
            compile that was killed goes on.
        track_stats: Put a ``TunedResult`` on the compiled program as ``detailed_results``.
        progress: As for ``FST``.
        **options: Anything else that ``FST`` takes: settings that are not to be tuned, ``arm``,
            ``reflection_lm``, ... Limits beside ``max_rollouts`` hold for each run.

    Raises:
        ConfigError: A setting that is unknown or cannot work.
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        max_rollouts: int,
        trials: int = 4,
        tuning_share: float = 0.5,
        space: Space | None = None,
        seed: int = 0,
        log_dir: str | os.PathLike[str] | None = None,
        track_stats: bool = False,
        progress: ProgressListener | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if type(trials) is not int or trials < 2:
            raise ConfigError(
                f"trials must be a whole number of at least 2, got {trials!r}; one is plain FST"
            )
        check_share("tuning_share", tuning_share)
        check_kinds(log_dir, progress, track_stats=track_stats)
        if space is not None and not isinstance(space, Space):
            raise ConfigError(f"space must be a fst_dspy.study.Space, got {type(space).__name__}")
        arm = options.get("arm", "fst")
        self.space = space.beside(options) if space is not None else usual_space(arm, options)
        self.metric, self.max_rollouts, self.trials = metric, max_rollouts, trials
        self.tuning_share, self.seed, self.track_stats = tuning_share, seed, track_stats
        self.log_dir = folder_given(log_dir)
        self.progress = progress
        self.options = {**options, "max_rollouts": max_rollouts}
        # Refuses settings that cannot work.
        self._fst(self.space.defaults(), self.log_dir, progress)

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Tune a copy of the student, and the settings on the way. As ``FST.compile``.

        Settings that training diverges with are given up, unless it does with all of them.

        Raises:
            ConfigError: Besides, settings that were drawn cannot work together.
        """
        trainset = list(trainset) if isinstance(trainset, Iterator) else trainset
        valset = list(valset) if isinstance(valset, Iterator) else valset
        size = parameter_count(find_local_lm(student).policy.model)
        drawn = draw_settings(self.space.for_size(size), self.trials, self.seed)
        for settings in drawn:  # what cannot work is refused before any of them has run
            self._fst(settings, self.log_dir, self.progress)
        with ExitStack() as stack:
            folder = self.log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runs = [
                _Run(settings, folder / f"settings-{index}") for index, settings in enumerate(drawn)
            ]

            def go_on(run: _Run, rollouts: int) -> dspy.Module:
                others = [other.rollouts for other in runs if other is not run]
                settings = dict(run.settings)
                if "instruction_proposer" in self.options:  # what it learned would help the next
                    settings["instruction_proposer"] = own_copy(
                        self.options["instruction_proposer"]
                    )
                fst = self._fst(settings, run.folder, RunTo(rollouts, self.progress, others))
                compiled = fst.compile(student, teacher=teacher, trainset=trainset, valset=valset)
                run.result = compiled.detailed_results
                run.score = best_score(run.result.records, rollouts)
                return compiled

            def compare(run: _Run, rollouts: int) -> None:
                lm = find_local_lm(student)
                try:
                    version = go_on(run, rollouts).detailed_results.best.version
                except TrainingError as error:
                    if error.__cause__ is not None:  # the machine's fault, and not the settings'
                        raise
                    run.fail(error)
                    version = lm.policy.version()  # it is back at its best weights
                if version != lm.version and lm.policy.has(version):
                    lm.policy.forget(version)  # its run folder has it

            best = self._halve(runs, compare)
            if best.error is not None:
                raise best.error
            others = sum(run.spent for run in runs if run is not best)
            compiled = go_on(best, self.max_rollouts - others)
        if self.track_stats:
            plain = {f.name: getattr(best.result, f.name) for f in fields(FSTResult)}
            plain["log_dir"] = str(best.folder) if self.log_dir is not None else None
            result = TunedResult(**plain, tried=tuple(run.tried() for run in runs))
            if (tester := compiled.detailed_results.tester) is not None:
                result = result.with_tester(tester)
            compiled.detailed_results = result
        else:
            del compiled.detailed_results
        return compiled

    def _halve(self, runs: list[_Run], compare: Callable[[_Run, int], None]) -> _Run:
        """Give up the worse half of the runs, round by round, until one is left."""
        rounds = math.ceil(math.log2(len(runs)))
        share = self.max_rollouts * self.tuning_share / rounds
        alive, target = runs, 0.0
        for number in range(1, rounds + 1):
            target += share / len(alive)
            for run in alive:
                if run.error is None:
                    compare(run, int(target))
            # Stable: the defaults win ties.
            ranked = sorted(alive, key=lambda run: (run.error is not None, -run.score))
            alive = ranked[: math.ceil(len(ranked) / 2)]
            for run in ranked[len(alive) :]:
                run.given_up_after = number
        return alive[0]

    def _fst(
        self, settings: Mapping[str, Any], folder: Path | None, progress: ProgressListener | None
    ) -> FST:
        return FST(
            self.metric,
            seed=self.seed,
            log_dir=folder,
            track_stats=True,
            progress=progress,
            **{**self.options, **settings},
        )


@dataclass
class _Run:
    """The run of one setting, as far as it has come."""

    settings: Mapping[str, Any]
    folder: Path
    score: float = -math.inf
    given_up_after: int | None = None
    result: FSTResult | None = None
    error: TrainingError | None = None

    lost: RolloutCounts = field(default_factory=RolloutCounts)

    @property
    def rollouts(self) -> RolloutCounts:
        """Those it has run; of one that failed, those up to its last cycle."""
        return self.lost if self.result is None or self.error else self.result.rollouts

    @property
    def spent(self) -> int:
        return self.rollouts.total

    def fail(self, error: TrainingError) -> None:
        """Note that it cannot go on, and how far it came."""
        logger.warning("the settings %s are given up: %s", dict(self.settings), error)
        self.error = error
        records = [cycle_record(row) for row in read_jsonl(self.folder / "cycles.jsonl")]
        if records:
            self.score = max(record.val_score for record in records)
            self.lost = records[-1].total_rollouts

    def tried(self) -> TriedSettings:
        return TriedSettings(dict(self.settings), self.score, self.rollouts, self.given_up_after)


class RunTo(SilentProgress):
    """Ends a run after the cycle that reaches a number of rollouts; tells another listener.

    Args:
        rollouts: Rollouts of the run, over all channels.
        inner: Hears everything too; ``None`` for the default.
        others: Rollouts of the other runs so far, which are of the same budget.
    """

    def __init__(
        self,
        rollouts: int,
        inner: ProgressListener | None,
        others: Sequence[RolloutCounts] = (),
    ) -> None:
        self.rollouts, self.inner = rollouts, inner or default_progress()
        self.others = others

    def begin(self, budget: Any) -> None:
        self.inner.begin(budget)

    def plan(self, plan: Plan) -> None:
        tell_plan(self.inner, plan)

    def phase(self, cycle: int, name: str, counts: RolloutCounts) -> None:
        self.inner.phase(cycle, name, _total([counts, *self.others]))

    def cycle_done(self, record: CycleRecord) -> None:
        """Stop where the run has come far enough; the student as it came never is."""
        self.inner.cycle_done(record)
        if record.cycle > 0 and record.total_rollouts.total >= self.rollouts:
            raise StopRun

    def end(self) -> None:
        self.inner.end()

    def say(self, text: str) -> None:
        tell(self.inner, text)


def best_score(records: Sequence[CycleRecord], rollouts: int) -> float:
    """The best score up to the first cycle that reaches a number of rollouts, where ``RunTo`` ends.

    What the run did after it does not count, so that a compile started again decides as before.
    """
    best = -math.inf
    for record in records:
        best = max(best, record.val_score)
        if record.cycle > 0 and record.total_rollouts.total >= rollouts:
            break
    return best
