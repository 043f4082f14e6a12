"""The joint loop, to be read top to bottom.

A cycle is one fast phase (GEPA evolves the instructions and demos), then T optimizer steps (GRPO on
the local model), whose groups are spread over the K candidates that the fast phase left, then
validation. Parts are made in ``loop.parts``, records in ``loop.records``; nothing here does either.

With several processes, all run this loop and reach the same state: whatever one of them decides by
a clock, a signal or a listener is asked for in all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fst_dspy import distributed
from fst_dspy.errors import TrainingError
from fst_dspy.fast.judge import Verdict
from fst_dspy.fast.population import mean
from fst_dspy.loop.cold_start import warmed_up
from fst_dspy.loop.ending import (
    check_limits,
    check_not_all_failed,
    check_perfect_score,
    counts_spent,
    cycles_spent,
    fits,
    has_ended,
    iterations_of,
    measured_plan,
    not_sampled,
    recorded_spent,
    share_of,
    shared_out,
    time_spent,
    troubles,
    turns_to_text,
    with_end,
    without_signal,
)
from fst_dspy.loop.interrupt import Interrupt
from fst_dspy.loop.parts import Parts
from fst_dspy.loop.progress import StopRun, tell, tell_plan
from fst_dspy.loop.records import cycle_record, rollouts_of, step_record
from fst_dspy.loop.state import LoopState
from fst_dspy.loop.validation import better_of, score
from fst_dspy.plan.plan import Plan
from fst_dspy.rollouts.health import Tally
from fst_dspy.rollouts.jobs import Channel
from fst_dspy.types import Group, Population, RolloutCounts

logger = logging.getLogger(__name__)


class Run:
    """One compile: its parts, and the loop over them."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.policy, self.runner = parts, parts.policy, parts.runner
        self._saved: LoopState | None = None  # what the last checkpoint holds
        self._told_spent = False

    def loop(self) -> LoopState:
        """Cycles until the budget is spent, from the start or from the last checkpoint.

        Raises:
            TrainingError: Training diverged and cannot go on.
            KeyboardInterrupt: After Ctrl-C, once the step under way is finished and saved.
        """
        parts = self.parts
        # A run that was stopped goes on where it stood, to the same end as if it had not been.
        state = self._resume() or self._start()
        parts.progress.begin(parts.budget)
        if not state.records:
            self._tell_plan(parts.plan)
        try:
            self._tell_ended(state)
            folder = parts.folder.path if parts.folder else None
            with parts.trackers, Interrupt(folder, partial(tell, parts.progress)) as interrupt:
                # The student as it came: what everything after is compared with, and the first
                # sight of a program or metric that fails.
                if not state.records:
                    state = self._validate(state)
                    self._tell_plan(measured_plan(parts, state))
                stopped = self._tell_cycle(state)
                if state.cycle == 0:
                    self._tell_untouched(state)
                    interrupt.requested = distributed.any_process(interrupt.requested)
                    self._checkpoint(state, now=interrupt.requested)
                    interrupt.stop_if_requested()
                while not (stopped or self._finished(state)):
                    # Prompts first: RL under a prompt that gives no reward damages the model.
                    if state.phase == "fast":
                        state = self._fast_phase(state)
                        # A fast phase may have cost minutes of a reflection LM; steps that follow
                        # are saved when a while has passed.
                        self._tell_spent(state)
                        interrupt.requested = distributed.any_process(interrupt.requested)
                        self._checkpoint(state, now=interrupt.requested)
                        interrupt.stop_if_requested()
                    # Then weights, under the prompts that were found; each step's rollouts try and
                    # score the prompts as well.
                    while state.phase == "slow":
                        state = self._slow_step(state)
                        parts.trackers.step(state.steps[-1], state.counts.total)
                        self._stop_if_diverged(state)
                        self._tell_spent(state)
                        # Ctrl-C reaches one process; the step is the last one for all of them.
                        interrupt.requested = distributed.any_process(interrupt.requested)
                        self._checkpoint(state, now=interrupt.requested)
                        interrupt.stop_if_requested()
                    # Both together, as they are now: this is what is kept, and what is told.
                    state = self._validate(state)
                    interrupt.requested = distributed.any_process(interrupt.requested)
                    self._checkpoint(state, now=interrupt.requested, closes=True)
                    stopped = self._tell_cycle(state)
                    interrupt.stop_if_requested()
                self._checkpoint(state, now=True)
                parts.fast.end(state.population)
        finally:
            parts.progress.end()
        return state

    # --- the parts of a cycle -----------------------------------------------------------------

    def _fast_phase(self, state: LoopState) -> LoopState:
        """The population evolves under the weights as they are."""
        parts, started, cycle = self.parts, time.monotonic(), state.cycle + 1
        population, share = state.population, share_of(self.parts, state)
        # An opening is validated before the weights move: what prompts alone reach is known then,
        # and kept should training harm it. So is every phase of prompts alone.
        alone = parts.learner is not None and not share.weights
        if share.prompts:
            self._tell(cycle, "fast phase")
            population = parts.fast.run(
                self.runner,
                population,
                parts.trainset,
                parts.valset,
                cycle=cycle,
                iterations=iterations_of(parts, state, alone),
                policy_version=self.policy.step,
                alone=alone,
                has_room=partial(self._has_room, state.seconds, started, step=False),
            )
        verdicts = self._keep_verdicts()
        trains = parts.learner is not None and not alone
        # Rollouts of its own may have used up what a step would take.
        if trains and self.runner.counts.total > state.counts.total:
            trains = self._has_room(state.seconds, started, step=True)
        return replace(
            state,
            population=population,
            early_scores=tuple(verdict.known for verdict in verdicts if verdict.known),
            share=share,
            phase="slow" if trains else "validate",
            fast_state=parts.fast.state(),
            **self._counted(),
            seconds=_add_seconds(state.seconds, "fast", started),
        )

    def _slow_step(self, state: LoopState) -> LoopState:
        """One optimizer step: sample the groups, learn from them, then show them to the prompts."""
        parts, started = self.parts, time.monotonic()
        cycle, step, steps_per_cycle = state.cycle + 1, state.step + 1, self._steps_per_cycle
        done = step - 1 - state.records[-1].step
        self._tell(cycle, f"step {done + 1}/{steps_per_cycle}")
        # G rollouts of each of P problems, spread over the population's candidates.
        learner = parts.learner
        assert learner is not None
        # Text that teaches the weights is that of each predictor, as the prompts have it.
        self.runner.predictor_feedback |= learner.learns_from_text
        groups_P, candidates, stream = parts.sampler.sample(
            state.population, step, state.stream, learner.learns_from_rewards
        )
        # Exactly one optimizer step; all G rollouts of a problem are compared with each other.
        stats = learner.advance(groups_P, candidates)
        record = step_record(cycle, step, groups_P, stats)
        if parts.folder is not None:
            parts.folder.record_step(record, groups_P, parts.config.slow.scale_rewards)
        seconds, started = _add_seconds(state.seconds, "slow", started), time.monotonic()
        # The same rollouts score the candidates, feed the proposers and decide a trial.
        population = self._learn_from(state, groups_P)
        room = self._has_room(seconds, started, step=True)
        return replace(
            state,
            population=population,
            step=step,
            steps=(*state.steps, record),
            # A cycle is cut short rather than the budget overdrawn.
            phase="slow" if done + 1 < steps_per_cycle and room else "validate",
            stream=stream.after(groups_P),
            fast_state=parts.fast.state(),
            **self._counted(),
            seconds=_add_seconds(seconds, "fast", started),
        )

    def _has_room(self, seconds: Mapping[str, float], started: float, *, step: bool) -> bool:
        """Whether there is budget for another step or iteration, and the validation behind it."""
        parts, counts = self.parts, self.runner.counts
        spent = time_spent(parts, _add_seconds(seconds, "fast", started)) is not None
        if distributed.any_process(spent):  # clocks differ
            return False
        return fits(parts, counts.total, self.runner.turns, step=step)

    def _learn_from(self, state: LoopState, groups_P: tuple[Group, ...]) -> Population:
        """Let the fast channel use the slow rollouts, which cost nothing more."""
        parts, cycle, rollouts = self.parts, state.cycle + 1, rollouts_of(groups_P)
        if not parts.fast_on or (parts.slow_opens and cycle == 1):
            return state.population
        self.runner.counts = self.runner.counts.plus(RolloutCounts(reused=len(rollouts)))
        population = parts.fast.after_step(
            state.population,
            parts.trainset,
            rollouts,
            cycle=cycle,
            policy_version=self.policy.step,
            tries=share_of(self.parts, state).prompts,
        )
        self._keep_verdicts()
        return population

    def _keep_verdicts(self) -> list[Verdict]:
        """Write down which candidates were accepted or not, and why."""
        verdicts = self.parts.fast.take_verdicts()
        if self.parts.folder is not None:
            self.parts.folder.record_verdicts(verdicts, self.policy.step)
        return verdicts

    def _validate(self, state: LoopState) -> LoopState:
        """Score the fast weights under the slow ones as they are, and close the cycle's record."""
        parts, started, first = self.parts, time.monotonic(), not state.records
        cycle = 0 if first else state.cycle + 1
        self._tell(cycle, "validation")
        found = came = score(parts, state)
        if first:  # where it shows nothing to learn from, give it something
            check_limits(parts)
            check_perfect_score(parts, came.rollouts)
            if (words := not_sampled(parts, came.rollouts)) and distributed.is_main():
                logger.warning(words)
            state, found = warmed_up(parts, state, came)
        seconds = _add_seconds(state.seconds, "eval", started)
        parts.fast.validated(found.population, parts.val_ids, found.score_V)
        state, decision = shared_out(parts, state, found)
        record = cycle_record(parts, state, cycle, found, seconds, decision)
        record = with_end(parts, (*state.records, record))
        if parts.learner is not None and turns_to_text(parts, (*state.records, record)):
            parts.learner.learn_from_text()
        # Processes that no longer agree would only be noticed by their results.
        facts = (record.weights_version, record.val_scores, record.candidate_ids)
        distributed.check_same("weights and population", facts)
        self.runner.tally = Tally()
        best = better_of(parts, state, found, cycle)
        if parts.folder is not None:
            parts.folder.record_cycle(record, found.population)
            if first:
                parts.folder.record_answers(came.rollouts, cycle, record.step, parts.valset)
            if best.cycle == cycle and not (first and found is came):
                parts.folder.record_answers(found.rollouts, cycle, record.step)
        return replace(
            state,
            cycle=cycle,
            phase="slow" if first and parts.slow_opens else "fast",
            share=decision.share,
            population=found.population,
            records=(*state.records, record),
            steps=(),
            early_scores=(),
            best=best,
            peak_V=max(filter(None, (found.score_V, state.peak_V)), key=mean),
            **self._counted(),
            seconds=seconds,
        )

    # --- start, stop, resume ------------------------------------------------------------------

    def _start(self) -> LoopState:
        parts, start = self.parts, self.parts.start
        self.runner.counts, self.runner.turns = start.counts, start.turns
        self.runner.tokens |= start.tokens
        population = Population(start.candidates or (parts.seed_candidate,), parts.val_ids, (), 0)
        return LoopState(
            population=population,
            counts=start.counts,
            turns=start.turns,
            seconds=start.seconds,
            fast_state=parts.fast.state(),
        )

    def _resume(self) -> LoopState | None:
        parts = self.parts
        checkpoint = distributed.from_main(lambda: parts.folder.latest() if parts.folder else None)
        if checkpoint is None:
            return None
        found = checkpoint.restore(self.policy, parts.learner)
        if found.fast_state:  # earlier versions had none before the first fast phase
            parts.fast.load_state(found.fast_state)
        runner = self.runner
        runner.counts, runner.tally, runner.tokens = found.counts, found.tally, dict(found.tokens)
        runner.early_batches, runner.turns = found.early_batches, found.turns
        if found.lowest_score is not None:
            runner.lowest_score = found.lowest_score
        runner.structured = runner.structured or found.structured
        runner.explains_format = found.explains_format
        self._saved = found
        return found

    def _finished(self, state: LoopState) -> bool:
        """Whether the budget is spent; a cycle that was begun is ended first."""
        parts = self.parts
        opens = parts.slow_opens and not state.cycle and not state.step
        if state.phase != "fast" and not opens:
            return False
        last = with_end(parts, state.records)  # of a run of before, which did not say so
        if cycles_spent(parts, state):
            return True
        if spent := recorded_spent(parts, state):
            self._tell_once(f"the run ends after {spent}")
            return True
        stopped = last.proposals.get("stopped")
        if stopped and parts.spec.strategies.stop_callbacks:
            logger.info("the run ends: %s", stopped)
            return True
        # On a resume as well: it is a matter of the last record.
        if reason := without_signal(parts, state.records):
            check_not_all_failed(parts, last, reason)
            logger.warning("%s", reason)
        if has_ended(parts, last):
            return True
        return distributed.any_process(time_spent(parts, state.seconds) is not None)

    def _stop_if_diverged(self, state: LoopState) -> None:
        """Stop where step after step gives no finite gradient; the last checkpoint stands."""
        limit, learner = self.parts.config.slow.max_bad_steps, self.parts.learner
        if learner is None or learner.bad_steps < limit:
            return
        assert state.best is not None
        self.policy.restore(state.best.version)
        raise TrainingError(
            f"{limit} optimizer steps in a row had a loss or gradient that is not finite; the "
            f"policy is back at its best weights, {state.best.version}. Try a lower learning_rate"
            " (or max_grad_norm), or float32"
        )

    def _checkpoint(self, state: LoopState, *, now: bool = False, closes: bool = False) -> None:
        """Save everything the loop needs to go on, if it is time to or ``now``; then wait for it.

        Checkpoints take a share of the time at most, so that some steps and, of large models, some
        cycles are not saved: a run that is killed takes these again.
        """
        if self._saved is state:
            return
        folder, learner = self.parts.folder, self.parts.learner
        due = distributed.from_main(
            lambda: folder is not None and (now or folder.is_due(closes=closes))
        )
        if not due:
            return
        self._saved = state  # in every process: all of them ask at the same states
        if folder is not None:
            folder.checkpoint(replace(state, tokens=dict(self.runner.tokens)), learner, self.policy)
            self.parts.fast.events.saved(str(folder.path))
            if now:
                folder.settle()
        elif learner is not None:
            learner.state()  # under FSDP every process has its part of the optimizer

    def _counted(self) -> dict[str, Any]:
        """What the runner has counted so far, and what else the state keeps of the parts."""
        learner = self.parts.learner
        return {
            "counts": self.runner.counts,
            "tally": self.runner.tally,
            "lowest_score": self.runner.lowest_score,
            "early_batches": self.runner.early_batches,
            "structured": self.runner.structured,
            "explains_format": self.runner.explains_format,
            "turns": self.runner.turns,
            "by_text": learner is not None and learner.learns_from_text,
        }

    # --- telling ------------------------------------------------------------------------------

    def _tell(self, cycle: int, name: str) -> None:
        self.parts.progress.phase(cycle, name, self.runner.counts)

    def _tell_spent(self, state: LoopState) -> None:
        """Say once that a limit was reached within a cycle, which is closed then."""
        counts = self.runner.counts.total, self.runner.turns
        spent = counts_spent(self.parts, *counts) or time_spent(self.parts, state.seconds)
        if spent:
            self._tell_once(f"{spent} reached; closing the cycle")

    def _tell_once(self, words: str) -> None:
        """Say that the budget is spent, or next to, unless that has been said."""
        if not self._told_spent:
            tell(self.parts.progress, words)
            self._told_spent = True

    def _tell_untouched(self, state: LoopState) -> None:
        """Say that the first validation has used a limit up, so that nothing can be learned."""
        record = state.records[0]  # a run that goes on has spent more since
        counts = record.total_rollouts.total, record.turns
        spent = counts_spent(self.parts, *counts) or time_spent(self.parts, record.seconds)
        if spent:
            words = f"{spent} reached by the first validation: nothing is learned"
            self._tell_once(f"{words}; a higher limit lets the run go on")

    def _tell_ended(self, state: LoopState) -> None:
        """Say of a run that had ended before why nothing happens, and how it is extended."""
        if not state.records or state.phase != "fast":
            return
        last = with_end(self.parts, state.records)
        spent = cycles_spent(self.parts, state) or recorded_spent(self.parts, state)
        if has_ended(self.parts, last):
            words = f"this run had ended: {last.decided}"
            self._tell_once(f'{words}; on_no_signal="warn" lets it go on')
        elif spent:
            self._tell_once(f"this run had ended, after {spent}; a higher limit lets it go on")

    def _tell_plan(self, plan: Plan) -> None:
        """Tell what the run is expected to take, and what is wrong with that."""
        tell_plan(self.parts.progress, plan)
        if self.parts.folder is not None:
            self.parts.folder.record_plan(plan)
        for name, words in plan.lines():
            level = logging.WARNING if name == "problem" else logging.INFO
            if name != "problem" or plan.timing == "estimated":
                logger.log(level, "plan: %s: %s", name, words)

    def _tell_cycle(self, state: LoopState) -> bool:
        """Tell that a cycle has ended; whether the listener wants the run to end with it."""
        stop, record = False, state.records[-1]
        for trouble in troubles(self.parts, state.records) if distributed.is_main() else ():
            logger.warning("cycle %d: %s", record.cycle, trouble)
        self.parts.trackers.cycle(record, state.population)
        try:
            self.parts.progress.cycle_done(record)
        except StopRun as error:
            stop = True
            if said := str(error):
                logger.info("the run ends: %s", said)
        return distributed.any_process(stop)

    @property
    def _steps_per_cycle(self) -> int:
        return self.parts.config.slow.steps_per_cycle


def _add_seconds(
    seconds: Mapping[str, float], channel: Channel, started: float
) -> dict[str, float]:
    """The seconds by channel, with the time since ``started`` added to one of them."""
    return {**seconds, channel: seconds.get(channel, 0.0) + time.monotonic() - started}
