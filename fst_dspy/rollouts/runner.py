"""Rollouts: run a program many times at once on the live weights, score it, keep everything.

A rollout that fails is data: it is scored with the failure score, and its text and the reason stay
with it. Nothing that a program, a metric or the model does wrong to one rollout ends the others.

Every rollout runs in a thread of its own over its own copy of the program's modules, with DSPy's
settings and language models as they are where the run was started. Generation happens when all of
them wait for the model (``fst_dspy.rollouts.scheduler``): the largest possible batch, and the same
one however the threads were scheduled, so the same seed gives the same rollouts.

A rollout that is lost to what it runs on (failure kind ``"infrastructure"``) says nothing of the
model and is not to be trained on; an engine that fails ends the whole run.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import dspy

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ModelError, TrainingError
from fst_dspy.lm.compiled import follows
from fst_dspy.lm.local_lm import FOLLOWS, LocalLM
from fst_dspy.lm.predictors import RolloutLMs
from fst_dspy.rollouts.health import Tally
from fst_dspy.rollouts.jobs import Channel, RolloutJob
from fst_dspy.rollouts.progress_bars import share_between_threads
from fst_dspy.rollouts.rollout import TOLD, RolloutThread, Setting
from fst_dspy.rollouts.scheduler import POLL_SECONDS, Scheduler, Slot
from fst_dspy.rollouts.session import NAME
from fst_dspy.student.adapter import BOUND_PROGRAMS, strict_adapter
from fst_dspy.student.candidate import bind, example_id, plain_value, predictor_names, with_id
from fst_dspy.student.metric import gives_predictor_feedback
from fst_dspy.student.modules import ProgramCopier, every_predictor
from fst_dspy.types import Candidate, PredictorTrace, Rollout, RolloutCounts, TurnCounts

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.25
"""How often rollouts that are not done are looked at, for one that is stuck, at most."""
WATCHES = 20
"""How often they are looked at within their time limit."""

WAKE_SECONDS = 0.1
"""How often event loops are woken while nothing runs, at most."""
UNASKED = (
    "the metric failed when it was asked about a predictor (pred_name, pred_trace), which gets the "
    "feedback on the whole program instead"
)
"""What is told of a metric that raised there, with what it raised."""


class RolloutRunner:
    """Runs rollouts of one program on the live weights of one ``LocalLM``.

    Args:
        program: The student. Calls that DSPy sends to a ``LocalLM`` over the same policy, whichever
            it is, are sampled from the live weights; others go where DSPy sends them.
        metric: See ``fst_dspy.student.metric``.
        lm: The local model.
        sampling: Temperature, limits and the failure score. What a predictor or its LM says of
            temperature, ``top_p`` and ``max_tokens`` itself wins (``RolloutLMs``).
        seed: Seed of every rollout, together with its job, channel and salt.
        predictor_feedback: Ask the metric about each predictor too, as ``dspy.GEPA`` does, at one
            more call of it a predictor. Only for programs of several predictors and metrics that
            take ``pred_name``, and not on channel ``eval``, from which nothing is learned.

    Attributes:
        predictor_feedback: As the argument; it may be set later.
        counts, tokens: What has been run so far, by channel and by kind.
        lowest_score: The least that the metric has given so far, and at most the failure score.
        explains_format: What is told of an answer that could not be read says why, and what was
            wanted.
        early_batches: Batches that were generated while some rollout waited for something else
            than the model (a lock, a slow tool). Where there are any, repeats of the run may differ
            in rounding, and so from there on; otherwise they are bit-identical.
        turns: What agents did so far.
    """

    def __init__(
        self,
        program: dspy.Module,
        metric: Callable[..., Any],
        lm: LocalLM,
        sampling: SamplingConfig,
        seed: int,
        predictor_feedback: bool = False,
    ) -> None:
        self.program = program
        self.metric = metric
        self.policy = lm.policy
        self.sampling = sampling
        self.seed = seed
        self.predictor_feedback = predictor_feedback
        self._can_ask = len(predictor_names(program)) > 1 and gives_predictor_feedback(metric)
        self.counts = RolloutCounts()
        self.tally = Tally()  # since the last record
        self.tokens: dict[str, int] = {"prompt": 0, "completion": 0}
        self.lowest_score = sampling.failure_score
        self.early_batches = 0
        self.turns = TurnCounts()
        self._shown: set[str] = set()  # what has failed with a traceback that was logged
        self._lms = RolloutLMs(program, lm, sampling)
        self._settings = {
            "lm": self._lms.of(self._lms.settings_lm),
            "adapter": strict_adapter(dspy.settings.adapter),
            TOLD: set(),
        }
        self._bound: dict[str, ProgramCopier] = {}
        self.explains_format = False
        self._structured = False
        self.structured = sampling.structured is True

    @property
    def structured(self) -> bool:
        """Whether answers are held to their format, whatever their language models say."""
        return self._structured

    @structured.setter
    def structured(self, value: bool) -> None:
        self._structured = value
        self._lms.hold(value)

    def run(
        self,
        jobs: Sequence[RolloutJob],
        *,
        channel: Channel,
        salt: int,
        version: str | None = None,
    ) -> list[Rollout]:
        """Run the jobs and return their rollouts in the same order.

        Args:
            jobs: ``sampling.num_threads`` of them are alive at once. Several processes are given
                the same ones and share them out.
            channel: Where the rollouts are counted.
            salt: Tells apart repeated runs of the same job, such as the optimizer step.
            version: The weights to sample from; ``None`` means the live ones.
        """

        if version is not None and not self.policy.has(version):
            raise ModelError(f"the weights {version} are not at hand")

        def run_own(own: list[tuple[RolloutJob, int]]) -> list[Rollout]:
            size = self.sampling.num_threads
            rollouts: list[Rollout] = []
            for start in range(0, len(own), size):
                rollouts += self._run_part(own[start : start + size], channel, version)
            return list(map(_portable, rollouts)) if distributed.processes() > 1 else rollouts

        # A program may write into what it is given, and into what cannot be copied for it.
        jobs = [replace(job, example=with_id(job.example)) for job in jobs]
        seeds = self._slot_seeds(jobs, channel, salt)
        rollouts = self._no_better_failed(
            distributed.spread(run_own, list(zip(jobs, seeds, strict=True)))
        )
        for rollout in rollouts:
            for call in rollout.calls:
                self.tokens["prompt"] += len(call.prompt_ids_T)
                self.tokens["completion"] += len(call.completion_ids_T)
            self.turns = self.turns.plus(rollout.turns)
        self.counts = self.counts.plus(RolloutCounts(**{channel: len(rollouts)}))
        self.tally = self.tally.plus(rollouts, learned_from=channel != "eval")
        return rollouts

    def _no_better_failed(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """No rollout that failed has a higher reward than one that the metric has scored."""
        failed = [r.failure is not None and r.failure.kind != "no_calls" for r in rollouts]
        scored = [r.reward for r, out in zip(rollouts, failed, strict=True) if not out]
        self.lowest_score = min([self.lowest_score, *scored])
        return [
            replace(r, reward=min(r.reward, self.lowest_score)) if out else r
            for r, out in zip(rollouts, failed, strict=True)
        ]

    def _run_part(
        self, jobs: Sequence[tuple[RolloutJob, int]], channel: Channel, version: str | None
    ) -> list[Rollout]:
        share_between_threads()
        slots = [Slot(key=(number,), seed=seed) for number, (_, seed) in enumerate(jobs)]
        scheduler = Scheduler(self.policy, slots)
        setting = Setting(
            self.metric,
            self.sampling,
            self._settings,
            version or self.policy.live_id,
            ask_predictors=self.predictor_feedback and self._can_ask and channel != "eval",
            explains_format=self.explains_format,
        )
        runs = [
            RolloutThread(setting, self._copier(job.candidate), job, slot, scheduler)
            for (job, _), slot in zip(jobs, slots, strict=True)
        ]
        try:
            for run in runs:
                run.start()
            self._watch(runs, scheduler)
        except BaseException:
            for run in runs:
                run.give_up("interrupted", "infrastructure")
            raise
        self.early_batches += scheduler.early
        rollouts = [run.result() for run in runs]
        self._show_first_errors(runs, rollouts)
        return rollouts

    def _show_first_errors(
        self, runs: Sequence[RolloutThread], rollouts: Sequence[Rollout]
    ) -> None:
        """Log the traceback of the first failure of each kind: the message alone names no line."""
        for run, rollout in zip(runs, rollouts, strict=True):
            if rollout.failure is not None:
                self._show(f"a rollout failed ({rollout.failure.kind})", run.error)
            self._show(UNASKED, run.unasked)

    def _show(self, what: str, error: BaseException | None) -> None:
        if error is not None and what not in self._shown:
            self._shown.add(what)
            logger.warning(what, exc_info=error)

    def _watch(self, runs: Sequence[RolloutThread], scheduler: Scheduler) -> None:
        """Wait for the rollouts to end; end those that are stuck, and all if the engine fails."""
        timeout = self.sampling.rollout_timeout
        watch = _Watch(runs, scheduler, timeout) if timeout is not None else None
        woken = 0.0
        for run in runs:
            while not run.done.wait(timeout=POLL_SECONDS):
                _stop_if_failed(runs, scheduler)
                if scheduler.poll() and time.monotonic() - woken > WAKE_SECONDS:
                    woken = time.monotonic()
                    for other in runs:
                        other.wake()
                if watch is not None:
                    watch.look()
        _stop_if_failed(runs, scheduler)

    def bound(self, candidate: Candidate) -> dspy.Module:
        """A fresh copy of the program with a candidate's texts in it."""
        return self._copier(candidate)()[0]

    def _copier(self, candidate: Candidate) -> ProgramCopier:
        """Makes the programs of a candidate's rollouts."""
        if candidate.id not in self._bound:
            # Putting texts in builds new signature classes, which costs more than the copy.
            if len(self._bound) >= BOUND_PROGRAMS:
                self._bound.clear()
            program = bind(self.program, candidate)
            for name, predictor in every_predictor(program).items():
                following = follows(predictor)
                predictor.lm = self._lms.of(predictor.lm)
                if following and predictor.lm is not None:
                    setattr(predictor, FOLLOWS, predictor.lm)
                setattr(predictor, NAME, name)
            self._bound[candidate.id] = ProgramCopier(program)
        return self._bound[candidate.id]

    def _slot_seeds(self, jobs: Sequence[RolloutJob], channel: str, salt: int) -> list[int]:
        """A seed for each job; where one occurs again, as problems do in small sets, another."""
        before: Counter[tuple[Any, ...]] = Counter()
        seeds = []
        for job in jobs:
            parts = (self.seed, channel, salt, example_id(job.example), job.candidate.id, job.index)
            again = (before[parts],) if before[parts] else ()
            before[parts] += 1
            digest = hashlib.sha256("|".join(map(str, (*parts, *again))).encode()).digest()
            seeds.append(int.from_bytes(digest[:8], "big") >> 1)
        return seeds


def _stop_if_failed(runs: Sequence[RolloutThread], scheduler: Scheduler) -> None:
    """Raise what ends all rollouts: Ctrl-C, or an engine that fails."""
    if interrupt := next((run.interrupt for run in runs if run.interrupt), None):
        raise interrupt
    if (error := scheduler.failure) is not None:
        raise TrainingError(
            f"generation failed ({type(error).__name__}: {error}); what the run has saved stands, "
            "so it can be resumed once the cause is mended"
        ) from error


class _Watch:
    """Keeps account of the rollouts' own time, and ends those that have used it up."""

    def __init__(self, runs: Sequence[RolloutThread], scheduler: Scheduler, timeout: float) -> None:
        self.runs, self.scheduler, self.timeout = runs, scheduler, timeout
        self._every = max(WATCH_SECONDS, timeout / WATCHES)
        self._looked, self._generated = time.monotonic(), scheduler.generated()

    def look(self) -> None:
        """Add the time since the look before to everyone's own, if it is long enough ago."""
        if time.monotonic() - self._looked < self._every:
            return
        # Those that have ended were busy for a part of the time, too.
        times = [run.time.since() for run in self.runs]
        now, generated = time.monotonic(), self.scheduler.generated()
        passed, busy = now - self._looked, generated - self._generated
        self._looked, self._generated = now, generated
        busy += sum(found.busy for found in times)
        for run, own in zip(self.runs, times, strict=True):
            if not run.done.is_set():
                run.time.add(passed, own.ran, busy - own.busy)
                run.give_up_if_stuck(self.timeout)


def _portable(rollout: Rollout) -> Rollout:
    """The rollout, with what cannot be sent to another process as plain values."""
    try:
        pickle.dumps(rollout.traces)
        return rollout
    except Exception:
        return replace(rollout, traces=tuple(map(_plain_trace, rollout.traces)))


def _plain_trace(trace: PredictorTrace) -> PredictorTrace:
    outputs = None if trace.outputs is None else plain_value(trace.outputs)
    return replace(trace, inputs=plain_value(trace.inputs), outputs=outputs)
