"""gepa's own iterations over a population: both ways of the fast channel begin with them.

An iteration draws a parent from the Pareto front, runs it on a minibatch, has new texts proposed,
and runs the child on the same minibatch. What lasts from one to the next is held here: the
proposers' memory, the judge, and whose turn it is to be rewritten.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import dspy
from gepa.core.adapter import GEPAAdapter
from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.logging.experiment_tracker import ExperimentTracker
from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer

from fst_dspy.config import FastConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.gepa.strategies import (
    Strategies,
    batch_sampler,
    candidate_selector,
    component_selector,
)
from fst_dspy.fast.judge import Judge
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.reflector import Reflector, candidate_of
from fst_dspy.fast.scores import Scores
from fst_dspy.student.candidate import instructions_in
from fst_dspy.types import Candidate, Population

logger = logging.getLogger(__name__)


class Iterations:
    """Runs iterations, and holds what lasts from one to the next.

    Args:
        config: Minibatch size and the like.
        seed: Seed of the draws of parents and minibatches, together with the cycle.
        memory: What proposes.
        judge: Who is accepted.
        own: The user's own strategies, in place of those that ``config`` names.

    Attributes:
        turn: Components updated so far, over all phases.
        advice: What to do where the first phase found nothing to learn; ``None``: nothing.
    """

    def __init__(
        self,
        config: FastConfig,
        seed: int,
        memory: Memory,
        judge: Judge,
        own: Strategies,
    ) -> None:
        self.config, self.seed, self.memory, self.judge = config, seed, memory, judge
        self.own = own
        self.turn = 0
        self.advice: str | None = None

    def run(
        self,
        adapter: GepaAdapter,
        scores: Scores,
        population: Population,
        trainset: Sequence[dspy.Example],
        cycle: int,
        iterations: int,
    ) -> list[Candidate]:
        """The population's candidates and the accepted children, after some iterations.

        Args:
            adapter: Runs the rollouts.
            scores: Of the population's candidates; accepted children are added.
            population: Where the first parents come from.
            trainset: Where minibatches come from.
            cycle: Number of the cycle, part of every seed.
            iterations: How many.
        """
        members, reflector = list(population.candidates), adapter.reflector
        self.memory.study(trainset)
        self.judge.remember(members)
        reflection = self._reflection(adapter, trainset, cycle)
        for number in range(iterations):
            state = self.gepa_state(members, scores.rows(members))
            state.i = number
            state.full_program_trace.append({"i": number})
            outcome = reflector.outcomes.copy(), reflector.errors.copy()
            proposals = reflection.propose(state)
            adapter.raise_fault()
            if not proposals and outcome == (reflector.outcomes, reflector.errors):
                reflector.outcomes["empty"] += 1  # nothing was asked: the minibatch was perfect
            for proposal in proposals:
                (parent,) = (members[k] for k in proposal.parent_program_ids)
                child = candidate_of(proposal.candidate, parent, cycle)
                if proposal.eval_after is not None:
                    trajectories = proposal.eval_after.trajectories or []
                    reflector.learn(child.components, trajectories)
                reflector.known_ids.add(child.id)
                if self.judge.accepts(child, [parent], proposal, state):
                    scores.add(child)
                    members.append(child)
            self.turn += 1
        self.judge.count(iterations=iterations)
        return members

    def count_reflection(self, reflector: Reflector) -> None:
        """Count what became of a reflector's proposals."""
        self.judge.count(
            empty=reflector.outcomes["empty"],
            duplicate=reflector.outcomes["duplicate"],
            errors=dict(reflector.errors),
        )

    def gepa_state(
        self, members: Sequence[Candidate], score_K: Sequence[Sequence[float]]
    ) -> GEPAState:
        """gepa's state, as if it had found all the members by itself."""
        evaluations: list[ValsetEvaluation] = [
            ValsetEvaluation({}, dict(enumerate(row))) for row in score_K
        ]
        state: GEPAState = GEPAState(dict(members[0].components), evaluations[0])
        for member, evaluation in zip(members[1:], evaluations[1:], strict=True):
            state.update_state_with_new_program([], dict(member.components), evaluation, None, 0)
        state.total_num_evals = 0
        names = self.memory.ready(members[0].components)
        state.list_of_named_predictors = names
        state.named_predictor_id_to_update_next_for_program_candidate = [
            self.turn % len(names) for _ in members
        ]
        return state

    def advise(self) -> None:
        """Tell, after a first phase, if there was nothing to learn in it."""
        self.advice = self.memory.advice(self.judge.stats)
        if self.advice is not None:
            logger.warning("%s", self.advice)

    def report(self) -> dict[str, Any]:
        """What became of the proposals, and what the reflection LM cost, for JSON.

        ``"advice"`` is there where there is any.
        """
        advice = {"advice": self.advice} if self.advice is not None else {}
        return {**self.judge.stats.to_dict(), "reflection": self.memory.usage(), **advice}

    def state(self) -> dict[str, Any]:
        """All there is to resume from, for JSON."""
        advice = {"advice": self.advice} if self.advice is not None else {}
        return {**self.memory.state(), **self.judge.state(), "turn": self.turn, **advice}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        self.memory.load_state(state)
        self.judge.load_state(state)
        self.turn, self.advice = state["turn"], state.get("advice")

    def _reflection(
        self, adapter: GepaAdapter, trainset: Sequence[dspy.Example], cycle: int
    ) -> ReflectiveMutationProposer:
        parents = random.Random(f"{self.seed}|{cycle}|parents")
        batches = random.Random(f"{self.seed}|{cycle}|minibatches")
        return ReflectiveMutationProposer(
            logger=_QuietLogger(),
            trainset=list(trainset),
            adapter=cast(GEPAAdapter[Any, Any, Any], adapter),
            candidate_selector=candidate_selector(self.config, self.own, parents),
            module_selector=component_selector(self.config, self.own),
            batch_sampler=batch_sampler(self.config, self.own, batches),
            perfect_score=self.config.perfect_score,
            skip_perfect_score=self.config.skip_perfect_score,
            experiment_tracker=ExperimentTracker(),
        )


class _QuietLogger:
    """gepa's log lines, for those who ask for them."""

    def log(self, message: str) -> None:
        logger.debug("%s", message)


def check_instructions(population: Population, trainset: Sequence[dspy.Example]) -> None:
    """Check that there is something to reflect on, and something to improve.

    Raises:
        DataError: No training examples.
        ConfigError: The candidates hold no instructions.
    """
    if not trainset:
        raise DataError("the fast phase needs at least one training example to reflect on")
    if not instructions_in(population.candidates[0].components):
        raise ConfigError("the candidates hold no '<predictor>.instructions' to improve")
