"""GEPA's view of a DSPy program: texts in, scores, traces and reflective records out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import dspy
from gepa.core.adapter import EvaluationBatch

from fst_dspy.fast.proposers.demos import shown_examples, without_answer
from fst_dspy.fast.proposers.protocol import Record
from fst_dspy.fast.reflector import Reflector, Trajectory
from fst_dspy.rollouts.evaluate import objectives_in, score_of
from fst_dspy.rollouts.jobs import RolloutJob, Runner
from fst_dspy.student.candidate import example_id, make_candidate
from fst_dspy.types import Rollout


@dataclass
class GepaAdapter:
    """Implements gepa's ``GEPAAdapter`` for one fast phase.

    Attributes:
        runner: Runs the rollouts, on channel ``fast``.
        reflector: Proposes texts.
        cycle: Part of every rollout's salt.
        keep: Each is given the rollouts of every training minibatch.
    """

    runner: Runner
    reflector: Reflector
    cycle: int
    keep: Sequence[Callable[[Sequence[Rollout]], None]] = ()
    _runs: int = 0
    _fault: Exception | None = None

    def evaluate(
        self,
        batch: Sequence[dspy.Example],
        candidate: Mapping[str, str],
        capture_traces: bool = False,
    ) -> EvaluationBatch[Trajectory, Rollout]:
        """Run the candidate on the batch: one score an example, whatever failed.

        Args:
            batch: Examples.
            candidate: Texts by component name.
            capture_traces: Whether to keep the trajectories: training examples alone. There are
                none where all rollouts were lost, which makes gepa skip the iteration.
        """
        self._runs += 1
        bound = make_candidate(candidate)
        # An answer that stands in the prompt says nothing of the candidate.
        shown = bool(shown_examples(bound))
        candidates = [without_answer(bound, example_id(e)) if shown else bound for e in batch]
        pairs = zip(batch, candidates, strict=True)
        rollouts = self.runner.run(
            [RolloutJob(example, own, index) for index, (example, own) in enumerate(pairs)],
            channel="fast",
            salt=phase_salt(self.cycle, self._runs),
        )
        for keep in self.keep if capture_traces else ():
            keep(rollouts)
        trajectories = [Trajectory(e, r) for e, r in zip(batch, rollouts, strict=True)]
        tells = capture_traces and not all(rollout.is_lost for rollout in rollouts)
        names = objectives_in(rollouts)
        return EvaluationBatch(
            outputs=rollouts,
            scores=[rollout.reward for rollout in rollouts],
            trajectories=trajectories if tells else None,
            objective_scores=[
                {name: score_of(rollout, name) for name in names} for rollout in rollouts
            ]
            if names
            else None,
        )

    def make_reflective_dataset(
        self,
        candidate: Mapping[str, str],
        eval_batch: EvaluationBatch[Trajectory, Rollout],
        components_to_update: Sequence[str],
    ) -> dict[str, list[Record]]:
        """For each component, one record a rollout, failures included, but for lost ones."""
        trajectories = [t for t in eval_batch.trajectories or [] if not t.rollout.is_lost]
        return {name: self.reflector.records(name, trajectories) for name in components_to_update}

    def propose_new_texts(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Record]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        """See :meth:`Reflector.propose`; what that raises is kept for :meth:`raise_fault`."""
        try:
            return self.reflector.propose(candidate, reflective_dataset, components_to_update)
        except Exception as error:  # gepa would log it, and ask once more
            self._fault = error
            return {}

    def raise_fault(self) -> None:
        """Raise what a proposer's fault was, if there was one."""
        if self._fault is not None:
            raise self._fault


def phase_salt(cycle: int, run: int) -> int:
    """Salt of the ``run``-th batch of rollouts (from 1) in a cycle's fast phase."""
    return int.from_bytes(hashlib.sha256(f"fast|{cycle}|{run}".encode()).digest()[:4], "big")
