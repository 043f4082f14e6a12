"""Fast-Slow Training as a DSPy optimizer. The joint loop itself is ``fst_dspy.loop.joint``.

A cycle is one fast phase (GEPA evolves the instructions and demos) and then T optimizer steps
(GRPO on the local model), whose groups are spread over the K candidates that the fast phase left.
The fast phase comes first, because RL under a prompt that gives no reward damages the model.

Departures from the paper (Tiwari et al., 2026), section 3; ``auto="paper"`` leaves out those that
are settings:

* Rollouts are used twice: those of the slow phase score, feed and try the candidates of the fast
  channel (``fst_dspy.fast.trials``). Fast phases with rollouts of their own are cycles by
  themselves: the opening, and others while they pay. They are validated before the weights move:
  what prompts alone reach is known, and kept should training harm it. With ``reuse=False`` it runs
  its own in every cycle, as in the paper; then the whole population is scored on the validation
  examples at the end of every cycle, under the weights of that moment, and the scores serve as
  validation and as the next Pareto front.
* Who has the rollouts of a cycle, prompts, weights or both, is decided by what they gained, and the
  run ends where neither gains (``fst_dspy.loop.share``); in the paper, and with ``reuse=False``,
  both have their share of every cycle.
* Rollouts of both channels are counted, scoring included.
* Fewer than K candidates are kept where the others are likely worse than the best, and win on no
  problems of their own; the pair that is returned is the latest that is not likely worse than the
  highest; validation has one sample an example (``val_samples``; mean@4 in the paper).
  ``docs/decisions.md`` has the rates.
* Steps whose groups are mostly constant are shortened (``damp_constant``); problems whose groups
  were constant come back less often (``revisit_constant``).
* Rollouts of a candidate on trial are trained on, whether it is accepted or not.
* Demos are fast weights too, where iterations have found no better instructions
  (``demo_tokens``); the paper evolves instructions.
* Where the first validation shows nothing to learn from, labelled demos, answers held to the format
  and feedback on it make a start (``cold_start_demos``, ``structured``, ``format_feedback``).
* The metric's text can reach the weights too (``slow_signal``); the paper's weights learn from
  rewards alone.
* Without a ``reflection_lm``, lessons in the feedback are put into the instruction by rule.
* The arms ``rl_only`` and ``gepa_only`` are this loop with one channel off.

Example::

    import dspy, fst_dspy

    dspy.configure(lm=fst_dspy.LocalLM("embedded"))
    compiled = fst_dspy.FST(metric=metric).compile(program, trainset=train, valset=val)
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import dspy
from dspy.teleprompt import Teleprompter
from gepa.core.adapter import ProposalFn
from gepa.utils import StopperProtocol

from fst_dspy.bundle.saving import make_savable
from fst_dspy.config import Auto, FSTConfig, settings_of_arm, without_effect
from fst_dspy.display import on_a_screen
from fst_dspy.errors import ConfigError
from fst_dspy.fast.gepa.plugins import read_plugins
from fst_dspy.fast.proposers.protocol import Proposer
from fst_dspy.files import folder_given
from fst_dspy.lm.predictors import bound_to
from fst_dspy.loop.joint import Run
from fst_dspy.loop.parts import Parts, RunSpec, make_parts
from fst_dspy.loop.progress import ProgressListener
from fst_dspy.loop.records import result_of
from fst_dspy.loop.state import Start
from fst_dspy.results.result import FSTResult, Tester
from fst_dspy.rollouts.checks import CheckedInput, check_input
from fst_dspy.rollouts.evaluate import Quadrants, quadrants
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.run.trackers import tracker_names
from fst_dspy.settings import Settings
from fst_dspy.settings_help import settings_text
from fst_dspy.student.candidate import bind
from fst_dspy.student.seeds import read_seeds
from fst_dspy.types import Arm

logger = logging.getLogger(__name__)


class FST(Teleprompter):
    """Tunes a program's instructions and demos and its local model's weights together.

    Args:
        metric: ``metric(gold, pred, trace=None, pred_name=None, pred_trace=None)`` returning a
            number or ``dspy.Prediction(score=, feedback=)``. The fast channel learns from the
            feedback text, so say what is right as a general rule ("visa tickets go to amber.").
            ``objective_scores={name: number}`` beside these are kept with every rollout, and can
            make the Pareto front (``frontier_type``).
        reflection_lm: The ``dspy.LM`` that rewrites instructions, or its name. Without one, the
            lessons in the feedback are distilled into the instruction by a proposer that needs
            no LM.
        auto: Budget preset: ``"light"`` (the default when no limit is given), ``"medium"`` or
            ``"heavy"``; or ``"paper"``, the paper's settings without what we have added, which take
            far more rollouts. See ``fst_dspy.config.AUTO``.
        arm: ``"fst"``; ``"rl_only"`` and ``"gepa_only"`` switch one channel off.
        seed: Seed of everything random.
        log_dir: Run folder. A compile that was killed goes on when started again with the same
            folder, settings and data.
        log_rollouts: Keep the rollouts of training in ``log_dir``, which the report shows.
        track_stats: Put an ``FSTResult`` on the compiled program as ``detailed_results``.
        instruction_proposer: A proposer of your own in place of both: ``fst_dspy.Proposer``, or
            what ``dspy.GEPA`` takes, which is called under the ``reflection_lm`` if there is one.
        callbacks: gepa's callbacks, objects with methods such as ``on_candidate_accepted(event)``.
            They hear of fast phases and trials (``fst_dspy.fast.gepa.events``).
        stop_callbacks: gepa's stop callbacks, one or several: once one returns true for gepa's
            state, the cycle under way is the last. They are asked before each iteration and trial,
            and at the end of a cycle; which one it was is the result's ``stopped``.
        gepa_kwargs: What ``dspy.GEPA`` passes on to ``gepa.optimize``: taken for our settings where
            there are such, and answered with what to use instead where there are not.
        report_to: ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``, or several; each logs to the run
            folder, and nowhere else unless told to. See ``fst_dspy.run.trackers``.
        progress: Hears what goes on; by default a live line on the terminal or in the notebook,
            elsewhere lines to ``logging``, or to standard error where that is not set up.
        **settings: Any setting of ``fst_dspy.config``, flat: ``learning_rate=1e-4``,
            ``population_size=8``, ``lora=True``, ``max_rollouts=5000``, ... Where gepa has objects
            for one, such as ``component_selector``, these are taken too, and names that DSPy, GEPA
            and TRL have for a setting (``max_metric_calls``, ``max_full_evals``).

    Raises:
        ConfigError: A setting that is unknown or cannot work.
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        reflection_lm: dspy.BaseLM | str | None = None,
        auto: Auto | None = None,
        arm: Arm = "fst",
        seed: int = 0,
        log_dir: str | os.PathLike[str] | None = None,
        log_rollouts: bool = True,
        track_stats: bool = False,
        instruction_proposer: Proposer | ProposalFn | dspy.Module | None = None,
        callbacks: Sequence[Any] | None = None,
        stop_callbacks: StopperProtocol | Sequence[StopperProtocol] | None = None,
        gepa_kwargs: Mapping[str, Any] | None = None,
        report_to: str | Sequence[str] | None = None,
        progress: ProgressListener | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__()
        if arm not in ("fst", "rl_only", "gepa_only"):
            raise ConfigError(f"arm must be 'fst', 'rl_only' or 'gepa_only', got {arm!r}")
        check_kinds(log_dir, progress, log_rollouts=log_rollouts, track_stats=track_stats)
        plugins = read_plugins(
            metric,
            reflection_lm,
            instruction_proposer,
            settings_of_arm(arm, settings),
            callbacks=callbacks,
            stop_callbacks=stop_callbacks,
            gepa_kwargs=gepa_kwargs,
        )
        self.metric = metric
        self.reflection_lm, self.strategies = plugins.reflection_lm, plugins.strategies
        self.config = FSTConfig.make(auto, **plugins.settings)
        self._given = {
            **(gepa_kwargs or {}),
            **settings,
            "reflection_lm": reflection_lm,
            "instruction_proposer": instruction_proposer,
        }
        self.arm: Arm = arm
        self.seed = _read_seed(seed)
        self.log_dir = folder_given(log_dir)
        self.log_rollouts = log_rollouts
        self.track_stats = track_stats
        self.instruction_proposer = plugins.proposer
        self.report_to = tracker_names(report_to, self.log_dir)
        self.progress = progress

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
        seed_candidates: Sequence[Mapping[str, str] | dspy.Module] | None = None,
    ) -> dspy.Module:
        """Tune a copy of the student and return it.

        Args:
            student: The program; it is left as it was. Its predictors call a ``LocalLM``, their
                own or the one set with ``dspy.configure(lm=...)``.
            trainset: Examples to learn from.
            teacher: Not used by FST; must be ``None``.
            valset: Examples to choose the best weights and candidate on, at most ``val_size`` of
                them. Without one, a fifth of the training set, drawn with the seed.
            seed_candidates: Other texts to begin with, besides the student's own: for each
                candidate a dict of instructions by predictor (gepa's ``seed_candidate``), or a
                program of the student's shape, such as one that was compiled before. All are
                scored in the first validation.

        Returns:
            A copy of the student with the best candidate's instructions and demos, its predictors
            bound to the best weights. Its ``save(folder)`` writes a bundle for ``fst_dspy.load``.

        Raises:
            ConfigError, DataError, MetricError, ProgramError: Input that cannot work, before any
                training.
            StoreError: The run folder cannot be used.
            TrainingError: Training diverged and cannot go on.
            KeyboardInterrupt: After Ctrl-C, once the step under way is finished and saved.
        """
        if teacher is not None:
            raise ConfigError("FST has no use for a teacher; pass the student alone")
        start = Start()
        if seed_candidates is not None:
            checked = self.check(student, trainset, valset)
            trainset, valset = checked.trainset, checked.valset
            start = Start(read_seeds(student, seed_candidates, self.config.fast.tool_descriptions))
        return self.compile_from(start, student, trainset=trainset, valset=valset)

    def compile_from(
        self,
        start: Start,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """As ``compile``, from a population that was found before.

        Raises:
            ConfigError: Besides, a candidate that was made for another program.
        """
        self.tell_without_effect()
        checked = self.check(student, trainset, valset)
        for candidate in start.candidates:
            bind(student, candidate)
        parts = make_parts(self.spec(), student, checked, start)
        return self.finish(parts, student)

    def tell_without_effect(self) -> None:
        """Tell which of the options that were given change nothing; not of parts of another."""
        for text in without_effect(self.arm, self.config, self._given):
            logger.warning(text)

    def check(
        self,
        student: dspy.Module,
        trainset: list[dspy.Example],
        valset: list[dspy.Example] | None,
    ) -> CheckedInput:
        """What can be checked without running the model; errors are those of ``compile``."""
        fast_on = self.arm in ("fst", "gepa_only")
        return check_input(
            student,
            self.metric,
            trainset,
            valset,
            seed=self.seed,
            val_size=self.config.sampling.val_size,
            frontier=self.config.fast.frontier_type if fast_on else "instance",
        )

    def spec(self) -> RunSpec:
        """What this optimizer asks of the joint loop."""
        return RunSpec(
            config=self.config,
            arm=self.arm,
            seed=self.seed,
            metric=self.metric,
            reflection_lm=self.reflection_lm,
            instruction_proposer=self.instruction_proposer,
            strategies=self.strategies,
            log_dir=self.log_dir,
            log_rollouts=self.log_rollouts,
            report_to=self.report_to,
            progress=self.progress,
        )

    def finish(
        self,
        parts: Parts,
        student: dspy.Module,
        make_result: Callable[[FSTResult], FSTResult] = lambda result: result,
    ) -> dspy.Module:
        """Run the loop, and bind what it found into a copy of the student.

        Args:
            parts: Of the run; its folder and weights are let go of afterwards.
            student: The program.
            make_result: Adds to the result what the loop does not know.
        """
        try:
            return self._finished(parts, student, make_result)
        finally:
            parts.let_go()

    def _finished(
        self,
        parts: Parts,
        student: dspy.Module,
        make_result: Callable[[FSTResult], FSTResult],
    ) -> dspy.Module:
        try:
            state = Run(parts).loop()
            result = make_result(result_of(parts, state))
            if parts.folder is not None:
                parts.folder.finish(result)
        finally:
            parts.close()
        result = result.with_tester(_tester(parts, student, result))
        best = result.best
        parts.policy.restore(best.version)
        lm = parts.lm.at(best.version)
        compiled = bound_to(student, best.candidate, lm, structured=result.structured)
        # A student that was compiled before has the result of that.
        vars(compiled).pop("detailed_results", None)
        if self.track_stats:
            compiled.detailed_results = result
        make_savable(compiled, result)
        return compiled

    def __repr__(self) -> str:
        usual, own = FSTConfig.make().to_dict(), self.config.to_dict()
        changed = (
            f"{name}={value!r}"
            for part, values in own.items()
            for name, value in values.items()
            if value != usual[part][name]
        )
        metric = getattr(self.metric, "__name__", type(self.metric).__name__)
        about = (f"metric={metric}", f"arm={self.arm!r}", f"seed={self.seed}")
        folder = () if self.log_dir is None else (f"log_dir={str(self.log_dir)!r}",)
        return on_a_screen([f"{type(self).__name__}({', '.join((*about, *folder, *changed))})"])


def check_kinds(log_dir: object, progress: object, **switches: object) -> None:
    """That what is no setting is of its kind.

    Raises:
        ConfigError: It is not.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            kind = type(value).__name__
            raise ConfigError(f"{name} must be True or False, got {value!r} ({kind})")
    if not isinstance(log_dir, str | os.PathLike | None):
        kind = type(log_dir).__name__
        raise ConfigError(f"log_dir must be the path of a folder, got {log_dir!r} ({kind})")
    told = ("begin", "phase", "cycle_done", "end")
    missing = [name for name in told if not callable(getattr(progress, name, None))]
    if progress is not None and missing:
        raise ConfigError(
            f"progress must be a listener with the methods {', '.join(told)}; "
            f"{type(progress).__name__} has no {', '.join(missing)}"
        )


def _read_seed(given: Any) -> int:
    """The seed as Python's own number; libraries take no others.

    Raises:
        ConfigError: It is none, or out of numpy's range.
    """
    number = operator.index(given) if hasattr(given, "__index__") else -1
    if isinstance(given, bool) or not 0 <= number < 2**32:
        raise ConfigError(
            f"seed must be a whole number from 0 to 2**32 - 1, got {given!r} "
            f"({type(given).__name__})"
        )
    return number


def _tester(parts: Parts, student: dspy.Module, result: FSTResult) -> Tester:
    """Tests the result's texts and weights with what they were found with."""

    # Of the parts these alone: the optimizer's state is large, and a result may live long.
    # And the live model, lest the weights that it began with stay in memory.
    metric, lm = parts.spec.metric, parts.lm.live()
    program = bound_to(student, result.seed_candidate, lm)
    sampling, seed = result.sampling, parts.spec.seed

    def test(testset: Sequence[dspy.Example], samples: int) -> Quadrants:
        return quadrants(
            RolloutRunner(program, metric, lm, sampling, seed),
            result.seed_candidate,
            result.best.candidate,
            testset,
            base_version=result.base_version,
            trained_version=result.best.version,
            samples=samples,
        )

    return test


if FST.__doc__:  # none under ``python -OO``
    FST.__doc__ += f"\n    {settings_text().replace(chr(10), chr(10) + '    ')}\n"
