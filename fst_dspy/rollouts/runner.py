"""Rollouts: run a program many times at once on the live weights, score it, keep everything.

A rollout that fails is data: it is scored with the failure score, and its text and the reason stay
with it. Nothing that a program, a metric or the model does wrong to one rollout ends the others.

Every rollout runs in a thread of its own over its own copy of the program. Generation happens when
all of them are blocked on a model call (``fst_dspy.rollouts.barrier``): the largest possible batch,
and the same one however the threads were scheduled, so the same seed gives the same rollouts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dspy

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.rollouts.barrier import BarrierBatcher, Slot
from fst_dspy.rollouts.health import Tally
from fst_dspy.rollouts.jobs import Channel, RolloutJob
from fst_dspy.rollouts.rollout import RolloutThread, Setting
from fst_dspy.student.adapter import BOUND_PROGRAMS, strict_adapter
from fst_dspy.student.candidate import bind, example_id, predictor_names
from fst_dspy.student.metric import gives_predictor_feedback
from fst_dspy.types import Candidate, Rollout, RolloutCounts

WATCH_SECONDS = 0.25
"""How often rollouts that are not done are looked at, for one that is stuck."""


class RolloutRunner:
    """Runs rollouts of one program on the live weights of one ``LocalLM``.

    Args:
        program: The student. Each predictor that has no LM of its own, or a ``LocalLM`` over the
            same policy, is sampled from the live weights; another LM is left as it is.
        metric: See ``fst_dspy.student.metric``.
        lm: The local model; its ``max_tokens`` holds where ``sampling.max_tokens`` is ``None``.
        sampling: Temperature, limits and the failure score.
        seed: Seed of every rollout, together with its job, channel and salt.
        predictor_feedback: Ask the metric about each predictor too, as ``dspy.GEPA`` does, at one
            more call of it a predictor. Only for programs of several predictors and metrics that
            take ``pred_name``, and not on channel ``eval``, from which nothing is learned.
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
        self.predictor_feedback = (
            predictor_feedback
            and len(predictor_names(program)) > 1
            and gives_predictor_feedback(metric)
        )
        self.counts = RolloutCounts()
        self.tally = Tally()  # since the last record
        self.tokens: dict[str, int] = {"prompt": 0, "completion": 0}
        self._lm = lm.live().copy(num_retries=0, **_sampling_kwargs(sampling))
        self._adapter = strict_adapter(dspy.settings.adapter)
        self._bound: dict[str, dspy.Module] = {}

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

        def run_own(own: list[RolloutJob]) -> list[Rollout]:
            size = self.sampling.num_threads
            rollouts: list[Rollout] = []
            for start in range(0, len(own), size):
                rollouts += self._run_part(own[start : start + size], channel, salt, version)
            return rollouts

        rollouts = distributed.spread(run_own, list(jobs))
        for rollout in rollouts:
            for call in rollout.calls:
                self.tokens["prompt"] += len(call.prompt_ids_T)
                self.tokens["completion"] += len(call.completion_ids_T)
        self.counts = self.counts.plus(RolloutCounts(**{channel: len(rollouts)}))
        self.tally = self.tally.plus(rollouts, learned_from=channel != "eval")
        return rollouts

    def _run_part(
        self, jobs: Sequence[RolloutJob], channel: Channel, salt: int, version: str | None
    ) -> list[Rollout]:
        slots = [
            Slot(key=(number,), seed=self._slot_seed(job, channel, salt))
            for number, job in enumerate(jobs)
        ]
        batcher = BarrierBatcher(self.policy, slots)
        setting = Setting(
            self.metric,
            self.sampling,
            self._lm,
            self._adapter,
            version,
            ask_predictors=self.predictor_feedback and channel != "eval",
        )
        runs = [
            RolloutThread(setting, partial(self.bound, job.candidate), job, slot, batcher)
            for job, slot in zip(jobs, slots, strict=True)
        ]
        try:
            for run in runs:
                run.start()
            for run in runs:
                while not run.done.wait(timeout=WATCH_SECONDS):
                    for other in runs:
                        other.give_up_if_stuck(self.sampling.rollout_timeout)
        except BaseException:
            for run in runs:
                run.give_up("interrupted")
            raise
        return [run.result() for run in runs]

    def bound(self, candidate: Candidate) -> dspy.Module:
        """A fresh copy of the program with a candidate's texts in it."""
        if candidate.id not in self._bound:
            # Putting texts in builds new signature classes, which costs more than the copy.
            if len(self._bound) >= BOUND_PROGRAMS:
                self._bound.clear()
            self._bound[candidate.id] = bind(self.program, candidate)
        return self._bound[candidate.id].deepcopy()

    def _slot_seed(self, job: RolloutJob, channel: str, salt: int) -> int:
        parts = (self.seed, channel, salt, example_id(job.example), job.candidate.id, job.index)
        digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def _sampling_kwargs(sampling: SamplingConfig) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    if sampling.max_tokens is not None:
        kwargs["max_tokens"] = sampling.max_tokens
    return kwargs
