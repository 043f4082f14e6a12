"""Fast-Slow Training as a DSPy optimizer: the joint loop, to be read top to bottom.

A cycle is one fast phase (GEPA evolves the instructions and demos) and then T optimizer steps
(GRPO on the local model), whose groups are spread over the K candidates that the fast phase left.
The fast phase comes first, because RL under a prompt that gives no reward damages the model.

Departures from the paper (Tiwari et al., 2026), section 3:

* Rollouts are used twice: those of the slow phase score, feed and try the candidates of the fast
  channel (``fst_dspy.fast.trials``). Its one fast phase with rollouts of its own is cycle 1, an
  opening that is validated before the weights move: what prompts alone reach is known, and kept
  should training harm it. With ``reuse=False`` it runs its own in every cycle, as in the paper;
  then the whole population is scored on the validation examples at the end of every cycle, under
  the weights of that moment, and the scores serve as validation and as the next Pareto front.
* Rollouts of both channels are counted, scoring included.
* The arms ``rl_only`` and ``gepa_only`` are this loop with one channel off.

Example::

    import dspy, fst_dspy

    dspy.configure(lm=fst_dspy.LocalLM("embedded"))
    compiled = fst_dspy.FST(metric=metric).compile(program, trainset=train, valset=val)
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy
from dspy.teleprompt import Teleprompter
from gepa.core.adapter import ProposalFn

from fst_dspy import distributed
from fst_dspy.bundle.saving import make_savable
from fst_dspy.config import Auto, FSTConfig, LoraConfig
from fst_dspy.errors import ConfigError, TrainingError
from fst_dspy.fast import population as populations
from fst_dspy.fast.channel import FastChannel
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.plugins import read_plugins
from fst_dspy.fast.proposers.demos import DemoProposer
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.protocol import Proposer
from fst_dspy.fast.proposers.reflection import ReflectionLMProposer
from fst_dspy.fast.trials import TrialPhase
from fst_dspy.lm.predictors import bound_to
from fst_dspy.loop.folder import RunFolder
from fst_dspy.loop.interrupt import Interrupt
from fst_dspy.loop.progress import (
    ProgressListener,
    SilentProgress,
    StopRun,
    default_progress,
)
from fst_dspy.loop.sampling import StepSampler
from fst_dspy.loop.state import LoopState
from fst_dspy.model.divergence import kl_to_base
from fst_dspy.model.policy import Policy
from fst_dspy.results.result import Best, FSTResult
from fst_dspy.rollouts.checks import CheckedInput, check_first_rollouts, check_input
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import Channel, calls_of
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.run.trackers import Trackers, tracker_names
from fst_dspy.slow.advantage import constant_group_share, group_rows
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.student.candidate import bind, example_id, seed_candidate
from fst_dspy.types import (
    Arm,
    Candidate,
    CycleRecord,
    Group,
    Population,
    Rollout,
    RolloutCounts,
    StepRecord,
    StepStats,
)

logger = logging.getLogger(__name__)

KL_CALLS = 64
"""Validation calls that the KL to the base model is measured on."""


@dataclass(frozen=True)
class Start:
    """What a run begins with; the weights are those that the student's LM names.

    Attributes:
        candidates: The first population; the student's own texts where there are none.
        counts, tokens, seconds: What finding them has cost, as in ``CycleRecord``; the run counts
            on from there, also towards its budget.
    """

    candidates: tuple[Candidate, ...] = ()
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class FST(Teleprompter):
    """Tunes a program's instructions and demos and its local model's weights together.

    Args:
        metric: ``metric(gold, pred, trace=None, pred_name=None, pred_trace=None)`` returning a
            number or ``dspy.Prediction(score=, feedback=)``. The fast channel learns from the
            feedback text, so say what is right as a general rule ("visa tickets go to amber.").
        reflection_lm: The ``dspy.LM`` that rewrites instructions, or its name. Without one, the
            lessons in the feedback are distilled into the instruction by a proposer that needs
            no LM.
        auto: Budget preset: ``"light"`` (the default when no limit is given), ``"medium"`` or
            ``"heavy"``. See ``fst_dspy.config.AUTO``.
        arm: ``"fst"``; ``"rl_only"`` and ``"gepa_only"`` switch one channel off.
        seed: Seed of everything random.
        log_dir: Run folder. A compile that was killed goes on when started again with the same
            folder, settings and data.
        track_stats: Put an ``FSTResult`` on the compiled program as ``detailed_results``.
        instruction_proposer: A proposer of your own in place of both: ``fst_dspy.Proposer``, or
            what ``dspy.GEPA`` takes, which is called under the ``reflection_lm`` if there is one.
        report_to: ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``, or several; each logs to the run
            folder, and nowhere else unless told to. See ``fst_dspy.run.trackers``.
        progress: Hears what goes on; by default a live line on the terminal, and nothing where
            there is none.
        **settings: Any setting of ``fst_dspy.config``, flat: ``learning_rate=1e-4``,
            ``population_size=8``, ``lora=True``, ``max_rollouts=5000``, ... Where gepa has objects
            for one, such as ``component_selector``, these are taken too.

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
        track_stats: bool = False,
        instruction_proposer: Proposer | ProposalFn | dspy.Module | None = None,
        report_to: str | Sequence[str] | None = None,
        progress: ProgressListener | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if arm not in ("fst", "rl_only", "gepa_only"):
            raise ConfigError(f"arm must be 'fst', 'rl_only' or 'gepa_only', got {arm!r}")
        if arm == "rl_only":
            settings = {**settings, "population_size": 1}
        plugins = read_plugins(metric, reflection_lm, instruction_proposer, settings)
        self.metric = metric
        self.reflection_lm, self.strategies = plugins.reflection_lm, plugins.strategies
        self.config = FSTConfig.make(auto, **plugins.settings)
        self.arm: Arm = arm
        self.seed = seed
        self.log_dir = Path(log_dir) if log_dir is not None else None
        self.track_stats = track_stats
        self.instruction_proposer = plugins.proposer
        self.report_to = tracker_names(report_to)
        self.progress = progress

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: list[dspy.Example],
        teacher: dspy.Module | None = None,
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Tune a copy of the student and return it.

        Args:
            student: The program; it is left as it was. Its predictors call a ``LocalLM``, their
                own or the one set with ``dspy.configure(lm=...)``.
            trainset: Examples to learn from.
            teacher: Not used by FST; must be ``None``.
            valset: Examples to choose the best weights and candidate on, at most ``val_size`` of
                them. Without one, the last fifth of the training set.

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
        return self.compile_from(Start(), student, trainset=trainset, valset=valset)

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
        checked = check_input(student, self.metric, trainset, valset)
        for candidate in start.candidates:
            bind(student, candidate)
        return self._finish(_Run(self, student, checked, start), student)

    def _finish(self, run: _Run, student: dspy.Module) -> dspy.Module:
        """Run the loop, and bind what it found into a copy of the student."""
        try:
            state = run.loop()
        finally:
            run.close()
        assert state.best is not None
        run.policy.restore(state.best.version)
        compiled = bound_to(student, state.best.candidate, run.lm.at(state.best.version))
        result = run.result(state)
        if self.track_stats:
            compiled.detailed_results = result
        make_savable(compiled, result)
        return compiled


@dataclass(frozen=True)
class _Scored:
    """The population with its scores of now, and those of its best candidate.

    Attributes:
        score_V, val_score: Of the best candidate, by example and their mean.
        kl_to_base: Of the weights, on the best candidate's calls.
    """

    population: Population
    score_V: tuple[float, ...]
    val_score: float
    kl_to_base: float


class _Run:
    """The parts of one compile, and the loop over them."""

    def __init__(self, fst: FST, student: dspy.Module, checked: CheckedInput, start: Start) -> None:
        self.config, self.arm, self.seed, self.start = fst.config, fst.arm, fst.seed, start
        self.lm, self.policy = checked.lm, checked.lm.policy
        self.trainset = checked.trainset
        self.valset = sample(checked.valset, self.config.sampling.val_size, self.seed)
        self.val_ids = tuple(example_id(example) for example in self.valset)
        self.seed_candidate = seed_candidate(student)
        main = distributed.is_main()
        self.progress = (fst.progress or default_progress()) if main else SilentProgress()
        self.fast_on, self.slow_on = self.arm in ("fst", "gepa_only"), self.arm != "gepa_only"
        self.slow_opens = self.slow_on and self.config.fast.first_phase == "slow"
        self.trained_before = checked.lm.version != self.policy.base_version
        self.folder: RunFolder | None = None
        distributed.from_main(partial(self._open_folder, fst.log_dir, checked))
        self.trackers = Trackers(
            fst.report_to if main else (),
            self.folder.store if self.folder is not None else None,
            {"arm": self.arm, "seed": self.seed, "model": checked.lm.version}
            | self.config.to_dict(),
        )
        self.policy.restore(checked.lm.version)
        self.policy.step = 0
        if self.slow_on and self.config.slow.lora is not None:
            begin_lora(self.policy, self.config.slow.lora, self.seed)
        self.runner = RolloutRunner(
            student,
            fst.metric,
            self.lm,
            self.config.sampling,
            self.seed,
            predictor_feedback=self.fast_on,
        )
        self.fast = self._make_fast(fst)
        self.sampler = StepSampler(
            self.runner, self.fast, self.config.slow, self.trainset, self.seed
        )
        self.has_opening = self.fast.reuses and not self.slow_opens
        cycles = self.config.budget.max_cycles
        self.max_cycles = cycles and cycles + int(self.has_opening)
        self.trainer = self._make_trainer() if self.slow_on else None

    def loop(self) -> LoopState:
        """Cycles until the budget is spent, from the start or from the last checkpoint."""
        state = self._resume() or self._start()
        self.progress.begin(replace(self.config.budget, max_cycles=self.max_cycles))
        try:
            folder = self.folder.path if self.folder else None
            with self.trackers, Interrupt(folder) as interrupt:
                if not state.records:
                    state = self._validate(state)
                stopped = self._tell_cycle(state)
                while not (stopped or self._finished(state)):
                    if state.phase == "fast":
                        state = self._fast_phase(state)
                        self._checkpoint(state, now=False)
                    while state.phase == "slow":
                        state = self._slow_step(state)
                        self.trackers.step(state.steps[-1], state.counts.total)
                        self._stop_if_diverged(state)
                        interrupt.requested = distributed.any_process(interrupt.requested)
                        self._checkpoint(state, now=interrupt.requested)
                        interrupt.stop_if_requested()
                    state = self._validate(state)
                    interrupt.requested = distributed.any_process(interrupt.requested)
                    self._checkpoint(state)
                    stopped = self._tell_cycle(state)
                    interrupt.stop_if_requested()
        finally:
            self.progress.end()
        if self.folder is not None:
            self.folder.finish(self.result(state))
        return state

    # --- the parts of a cycle -----------------------------------------------------------------

    def _fast_phase(self, state: LoopState) -> LoopState:
        started, cycle = time.monotonic(), state.cycle + 1
        population = state.population
        first = state.cycle == int(self.slow_opens)
        if self.fast_on:
            self._tell(cycle, "fast phase")
            fast = self.config.fast
            population = self.fast.run(
                self.runner,
                population,
                self.trainset,
                self.valset,
                cycle=cycle,
                iterations=fast.first_cycle_iterations if first else fast.cycle_iterations,
                policy_version=self.policy.step,
            )
        return replace(
            state,
            population=population,
            phase="slow" if self.slow_on and not (first and self.has_opening) else "validate",
            fast_state=self.fast.state(),
            counts=self.runner.counts,
            seconds=add_seconds(state.seconds, "fast", started),
        )

    def _slow_step(self, state: LoopState) -> LoopState:
        started, cycle, step = time.monotonic(), state.cycle + 1, state.step + 1
        slow = self.config.slow
        done = step - 1 - self._steps_before(state)
        self._tell(cycle, f"step {done + 1}/{slow.steps_per_cycle}")
        groups_P, stream = self.sampler.sample(state.population, step, state.stream)
        rollouts = rollouts_of(groups_P)
        last = done + 1 == slow.steps_per_cycle
        stats = self._advance(groups_P)
        record = StepRecord(
            cycle=cycle,
            step=step,
            reward=mean([rollout.reward for rollout in rollouts]),
            constant_group_share=constant_group_share(groups_P),
            failures=dict(Counter(r.failure.kind for r in rollouts if r.failure is not None)),
            rollouts=len(rollouts),
            stats=stats,
        )
        if self.folder is not None:
            self.folder.record_step(record, groups_P, slow.scale_rewards)
        seconds = add_seconds(state.seconds, "slow", started)
        started = time.monotonic()
        population = self._learn_from(state.population, rollouts, cycle)
        return replace(
            state,
            population=population,
            step=step,
            steps=(*state.steps, record),
            phase="validate" if last else "slow",
            stream=stream.after(groups_P),
            fast_state=self.fast.state(),
            counts=self.runner.counts,
            seconds=add_seconds(seconds, "fast", started),
        )

    def _advance(self, groups_P: Sequence[Group]) -> StepStats:
        """Exactly one optimizer step on the groups."""
        assert self.trainer is not None
        rows = group_rows(groups_P, self.config.slow.scale_rewards)
        return self.trainer.advance(rows)

    def _learn_from(
        self, population: Population, rollouts: Sequence[Rollout], cycle: int
    ) -> Population:
        """Let the fast channel use the slow rollouts, which cost nothing more."""
        if not self.fast_on or (self.slow_opens and cycle == 1):
            return population
        self.runner.counts = self.runner.counts.plus(RolloutCounts(reused=len(rollouts)))
        return self.fast.after_step(
            population, self.trainset, rollouts, cycle=cycle, policy_version=self.policy.step
        )

    def _validate(self, state: LoopState) -> LoopState:
        """Score the fast weights under the slow ones as they are, and close the cycle's record."""
        started = time.monotonic()
        first = not state.records
        cycle = 0 if first else state.cycle + 1
        self._tell(cycle, "validation")
        found = self._score(state)
        seconds = add_seconds(state.seconds, "eval", started)
        record = self._record(state, cycle, found, self.runner.counts, seconds)
        facts = (record.weights_version, record.val_scores, record.candidate_ids)
        distributed.check_same("weights and population", facts)
        best = self._best(state, record, found)
        if self.folder is not None:
            self.folder.record_cycle(record, found.population)
        return replace(
            state,
            cycle=cycle,
            phase="slow" if first and self.slow_opens else "fast",
            population=found.population,
            records=(*state.records, record),
            steps=(),
            best=best,
            peak_V=max(found.score_V, state.peak_V, key=mean),
            counts=self.runner.counts,
            seconds=seconds,
        )

    def _score(self, state: LoopState) -> _Scored:
        """Score the population on the validation examples, where its scores are not of now.

        Where slow rollouts are reused, they have scored the population; what is left to validate is
        its best candidate. Else all are scored, and the next front is made of it.
        """
        population = state.population
        kl = state.records[-1].kl_to_base if state.records else 0.0
        first, best_only = not state.records, bool(state.records) and self.fast.reuses
        best_k = 0 if first else populations.best(population)
        if not (first or best_only or population.policy_version != self.policy.step):
            score_V = population.score_K_V[best_k]
            return _Scored(population, score_V, mean(score_V), kl)
        candidates = (population.candidates[best_k],) if best_only else population.candidates
        channel: Channel = "fast" if self.fast_on and not self.fast.reuses else "eval"
        scored = evaluate(
            self.runner, candidates, self.valset, channel=channel, salt=self.policy.step
        )
        if not best_only:
            population = replace(
                population, score_K_V=scored.score_K_V, policy_version=self.policy.step
            )
        k = 0 if best_only else populations.best(population)
        if first:
            check_first_rollouts(scored.rollouts_K[k])
        if self.policy.step > 0 or self.trained_before:
            kl = kl_to_base(self.policy, calls_of(scored.rollouts_K[k])[:KL_CALLS])
        return _Scored(population, scored.score_K_V[k], scored.mean_K[k], kl)

    def _record(
        self,
        state: LoopState,
        cycle: int,
        found: _Scored,
        counts: RolloutCounts,
        seconds: Mapping[str, float],
    ) -> CycleRecord:
        steps, population = state.steps, found.population
        last = state.records[-1] if state.records else None
        rollouts = max(1, sum(step.rollouts for step in steps))
        failures = sum((Counter(step.failures) for step in steps), Counter[str]())
        return CycleRecord(
            cycle=cycle,
            step=state.step,
            candidate_ids=tuple(c.id for c in population.candidates),
            best_candidate_id=population.candidates[populations.best(population)].id,
            train_reward=mean([step.reward for step in steps]) if steps else None,
            val_score=found.val_score,
            val_scores=tuple(mean(score_V) for score_V in population.score_K_V),
            kl_to_base=found.kl_to_base,
            entropy=mean([step.stats.entropy for step in steps]) if steps else None,
            constant_group_share=mean([step.constant_group_share for step in steps]),
            failure_shares={kind: count / rollouts for kind, count in sorted(failures.items())},
            rollouts=counts.minus(last.total_rollouts) if last else counts,
            total_rollouts=counts,
            tokens=dict(self.runner.tokens),
            seconds=dict(seconds),
            weights_version=self.policy.version(),
            proposals=self.fast.report(),
        )

    def _best(self, state: LoopState, record: CycleRecord, found: _Scored) -> Best:
        """The latest (weights, candidate) that is not clearly worse than the highest score.

        The highest of many noisy scores is luck as often as skill, and the later pair has learned
        more.
        """
        best, population = state.best, found.population
        if best is not None and populations.worse_by_sign_test(found.score_V, state.peak_V):
            return best
        candidate = population.candidates[populations.best(population)]
        version = self.policy.keep()
        if best is not None and best.version not in (version, self.lm.version):
            self.policy.forget(best.version)
        if self.folder is not None:
            self.folder.keep_version(version, self.policy)
        return Best(version, candidate, record.val_score, record.cycle)

    # --- start, stop, resume --------------------------------------------------------------------

    def _start(self) -> LoopState:
        start = self.start
        self.runner.counts = start.counts
        self.runner.tokens |= start.tokens
        population = Population(start.candidates or (self.seed_candidate,), self.val_ids, (), 0)
        return LoopState(population=population, counts=start.counts, seconds=start.seconds)

    def _resume(self) -> LoopState | None:
        checkpoint = distributed.from_main(lambda: self.folder.latest() if self.folder else None)
        if checkpoint is None:
            return None
        found = checkpoint.restore(self.policy, self.trainer)
        self.fast.load_state(found.fast_state)
        self.runner.counts = found.counts
        self.runner.tokens = dict(found.tokens)
        return found

    def _finished(self, state: LoopState) -> bool:
        budget = self.config.budget
        if state.phase != "fast":
            return False
        if self.max_cycles is not None and state.cycle >= self.max_cycles:
            return True
        rollouts = state.records[-1].total_rollouts.total
        if budget.max_rollouts is not None and rollouts >= budget.max_rollouts:
            return True
        late = budget.max_seconds is not None and sum(state.seconds.values()) >= budget.max_seconds
        return distributed.any_process(late)  # their clocks differ

    def _stop_if_diverged(self, state: LoopState) -> None:
        """Stop where step after step gives no finite gradient; the last checkpoint stands."""
        limit = self.config.slow.max_bad_steps
        last = [step.stats.skipped for step in state.steps[-limit:]]
        if len(last) < limit or set(last) != {"non_finite"}:
            return
        assert state.best is not None
        self.policy.restore(state.best.version)
        raise TrainingError(
            f"{limit} optimizer steps in a row had a loss or gradient that is not finite; the "
            f"policy is back at its best weights, {state.best.version}. Try a lower learning_rate"
            " (or max_grad_norm), or float32"
        )

    def _checkpoint(self, state: LoopState, *, now: bool = True) -> None:
        """Save everything the loop needs to go on; what takes no time does so at intervals."""
        due = distributed.from_main(
            lambda: self.folder is not None and (now or self.folder.is_old())
        )
        if due and self.folder is not None:
            state = replace(state, tokens=dict(self.runner.tokens))
            self.folder.checkpoint(state, self.trainer)
        elif due and self.trainer is not None:
            self.trainer.save(None)

    def _steps_before(self, state: LoopState) -> int:
        return state.records[-1].step

    def _make_fast(self, fst: FST) -> FastChannel:
        fast, proposer = self.config.fast, self._make_proposer(fst)
        demos = DemoProposer(fast.demo_tokens, self._count_tokens) if fast.demo_tokens else None
        if fast.reuse and self.fast_on and self.slow_on:
            steps = self.config.slow.steps_per_cycle
            return TrialPhase(
                fast,
                proposer,
                self.seed,
                steps_per_cycle=steps,
                demos=demos,
                strategies=fst.strategies,
            )
        return FastPhase(fast, proposer, self.seed, demos=demos, strategies=fst.strategies)

    def _make_proposer(self, fst: FST) -> Proposer:
        if fst.instruction_proposer is not None:
            return fst.instruction_proposer
        fast = self.config.fast
        lessons = LessonProposer(fast.instruction_tokens, self._count_tokens)
        if fst.reflection_lm is None:
            return lessons
        return ReflectionLMProposer(
            fst.reflection_lm,
            fast.instruction_tokens,
            self._count_tokens,
            fallback=lessons,
            max_cost=fast.max_reflection_cost,
            max_tokens=fast.max_reflection_tokens,
            template=fast.reflection_prompt_template,
        )

    def _count_tokens(self, text: str) -> int:
        return len(self.policy.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _make_trainer(self) -> SlowTrainer:
        cycles = self.config.budget.max_cycles
        total_steps = (cycles or 1) * self.config.slow.steps_per_cycle
        return SlowTrainer(
            self.policy, self.config.slow, self.config.sampling, total_steps, self.seed
        )

    def _identity(self, checked: CheckedInput) -> dict[str, Any]:
        start = [candidate.id for candidate in self.start.candidates]
        return {
            **({"start": start} if start else {}),
            "arm": self.arm,
            "seed": self.seed,
            "settings": self.config.to_dict(),
            "model": checked.lm.version,
            "student": dict(self.seed_candidate.components),
            "train_ids": [example_id(example) for example in checked.trainset],
            "val_ids": list(self.val_ids),
        }

    def _tell(self, cycle: int, name: str) -> None:
        self.progress.phase(cycle, name, self.runner.counts)

    def _tell_cycle(self, state: LoopState) -> bool:
        """Tell that a cycle has ended; whether the listener wants the run to end with it."""
        stop = False
        self.trackers.cycle(state.records[-1], state.population)
        try:
            self.progress.cycle_done(state.records[-1])
        except StopRun:
            stop = True
        return distributed.any_process(stop)

    def _open_folder(self, path: Path | None, checked: CheckedInput) -> None:
        if path is not None:
            self.folder = RunFolder(path)
            self.folder.begin(self._identity(checked))

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()

    def result(self, state: LoopState) -> FSTResult:
        assert state.best is not None
        return FSTResult(
            arm=self.arm,
            seed=self.seed,
            config=self.config,
            records=state.records,
            population=state.population,
            best=state.best,
            seed_candidate=self.seed_candidate,
            base_version=self.policy.base_version,
            weights_version=self.policy.version(),
            log_dir=str(self.folder.path) if self.folder is not None else None,
        )


def begin_lora(policy: Policy, lora: LoraConfig, seed: int) -> None:
    """Make adapters the trained weights: those that the live weights have, or fresh ones.

    Raises:
        ConfigError: The live weights have adapters of other settings.
        ModelError: They have none and are not the base.
    """
    if policy.lora is None:
        policy.add_lora(lora, seed)
    elif policy.lora != lora:
        raise ConfigError(
            f"the weights {policy.version()} have adapters with {policy.lora}; train them on with "
            f"the same lora settings, or start from {policy.base_version}"
        )


def sample(examples: Sequence[dspy.Example], size: int, seed: int) -> list[dspy.Example]:
    """At most ``size`` of the examples, drawn with the seed, in their own order."""
    if len(examples) <= size:
        return list(examples)
    chosen = random.Random(seed).sample(range(len(examples)), size)
    return [examples[index] for index in sorted(chosen)]


def rollouts_of(groups_P: Sequence[Group]) -> list[Rollout]:
    """All rollouts of some groups, in order."""
    return [rollout for group in groups_P for rollout in group.rollouts_G]


def mean(values: Sequence[float]) -> float:
    """The mean, 0 for none."""
    return sum(values) / len(values) if values else 0.0


def add_seconds(seconds: Mapping[str, float], channel: Channel, started: float) -> dict[str, float]:
    """The seconds by channel, with the time since ``started`` added to one of them."""
    return {**seconds, channel: seconds.get(channel, 0.0) + time.monotonic() - started}
