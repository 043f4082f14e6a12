"""gepa's own iterations over a population: both ways of the fast channel begin with them.

An iteration draws a parent from the Pareto front, runs it on a minibatch, has new texts proposed,
and runs the child on the same minibatch. What lasts from one to the next is held here: the
proposers' memory, the judge, and whose turn it is to be rewritten.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import dspy
from gepa.core.adapter import GEPAAdapter
from gepa.core.state import FrontierType, GEPAState, ValsetEvaluation
from gepa.logging.experiment_tracker import ExperimentTracker
from gepa.proposer.base import CandidateProposal
from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer

from fst_dspy.config import FastConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.fast.decide import Block
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.gepa.events import Events
from fst_dspy.fast.gepa.strategies import (
    Strategies,
    batch_sampler,
    candidate_selector,
    component_selector,
)
from fst_dspy.fast.judge import Judge
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.population import Row, best, blocks_of, mean
from fst_dspy.fast.reflector import Reflector, candidate_of
from fst_dspy.fast.scores import PooledScores, Scores, ValidationScores
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
        events: Whom to tell what happens, and whom to ask whether to go on.

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
        events: Events,
    ) -> None:
        self.config, self.seed, self.memory, self.judge = config, seed, memory, judge
        self.own, self.events = own, events
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
        has_room: Callable[[], bool],
        until_proven: bool = False,
    ) -> list[Candidate]:
        """The population's candidates and the accepted children, after some iterations.

        Args:
            adapter: Runs the rollouts.
            scores: Of the population's candidates; accepted children are added.
            population: Where the first parents come from.
            trainset: Where minibatches come from.
            cycle: Number of the cycle, part of every seed.
            iterations: How many at most.
            has_room: Whether there is budget for another.
            until_proven: Whether a child that is better by more than chance is the last one.
        """
        members, reflector = list(population.candidates), adapter.reflector
        self.memory.study(trainset)
        self.judge.remember(members)
        if isinstance(scores, PooledScores) and not scores.pool.rollouts and len(members) > 1:
            self._compare(adapter, members, trainset, cycle)
        reflection = self._reflection(adapter, trainset, cycle)
        for number in range(iterations):
            self.turn_to_demos()
            state = self.gepa_state(members, scores.rows(members), scores.objectives(members))
            if self.events.stop(state) or (number and not has_room()):
                break
            if until_proven and self.judge.stats.proven:
                break
            self.judge.count(iterations=1)
            self.events.begin_iteration(self.judge.stats.iterations, state, trainset)
            state.i = number  # by which minibatches are drawn, anew in every phase
            state.full_program_trace.append({"i": number})
            outcome = reflector.outcomes.copy(), reflector.errors.copy()
            proposals = reflection.propose(state)
            try:
                adapter.raise_fault()
            except Exception as error:
                self.events.failed(error)
                raise
            if not proposals and outcome == (reflector.outcomes, reflector.errors):
                reflector.outcomes["empty"] += 1  # nothing was asked: the minibatch was perfect
            before = len(members)
            for proposal in proposals:
                (parent,) = (members[k] for k in proposal.parent_program_ids)
                child = candidate_of(proposal.candidate, parent, cycle)
                if proposal.eval_after is not None:
                    trajectories = proposal.eval_after.trajectories or []
                    reflector.learn(child.components, trajectories)
                reflector.known_ids.add(child.id)
                after, own = proposal.subsample_scores_after, proposal.subsample_scores_before
                blocks = blocks_of(after or [], own or [])
                if self.accepts(child, [parent], proposal, state, blocks):
                    self.add(child, members, scores, state, proposal)
            self.turn += 1
            self.events.end_iteration(state, len(members) > before)
        return members

    def accepts(
        self,
        child: Candidate,
        parents: Sequence[Candidate],
        proposal: CandidateProposal,
        state: GEPAState,
        blocks: Sequence[Block],
    ) -> bool:
        """Whether the judge accepts a child; callbacks hear it where it does not."""
        accepted = self.judge.accepts(child, parents, proposal, state, blocks)
        if not accepted:
            reason = self.judge.reason(proposal, state)
            self.events.judged(proposal, accepted=False, index=-1, why=reason)
        return accepted

    def add(
        self,
        child: Candidate,
        members: list[Candidate],
        scores: Scores,
        state: GEPAState,
        proposal: CandidateProposal,
    ) -> None:
        """Score an accepted child, put it to the members, and tell."""
        rollouts = scores.add(child)
        members.append(child)
        if isinstance(scores, ValidationScores):
            highest = max(map(mean, scores.rows(members)))
            self.judge.scored(rollouts, (self.events.calls(), highest))
        if not self.events.callbacks:
            return
        state.increment_evals(max(0, self.events.calls() - state.total_num_evals))
        rows = scores.rows(members)
        after = self.gepa_state(members, rows, scores.objectives(members))
        self.events.front(state, after)
        if isinstance(scores, ValidationScores):
            score_K_V = scores.rows(members)
            means = list(map(mean, score_K_V))
            self.events.validated(
                len(members) - 1,
                child.components,
                dict(zip(scores.val_ids, score_K_V[-1], strict=True)),
                is_best=means[-1] == max(means),
                parents=proposal.parent_program_ids,
            )
        self.events.judged(proposal, accepted=True, index=len(members) - 1, why="")

    def begin(
        self,
        population: Population,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example],
    ) -> None:
        """Tell that the fast channel begins, the first time."""
        seed, config = population.candidates[0].components, dataclasses.asdict(self.config)
        self.events.begin(seed, len(trainset), len(valset), config)

    def validated(
        self, population: Population, val_ids: Sequence[str], score_V: Sequence[float]
    ) -> None:
        """Hear of a validation; stop callbacks are asked whether the run goes on.

        Args:
            population: Its scores are those of the validation where ``val_ids`` are its own.
            val_ids, score_V: Length V, the scores of its best candidate.
        """
        if not self.events.heard:
            return
        k = best(population)
        state = self.gepa_state(
            population.candidates, population.score_K_V, population.objective_K_V
        )
        rows = dict(enumerate(population.score_K_V))
        if tuple(val_ids) != population.val_ids:  # the others have scores on other examples
            rows = {k: tuple(score_V)}
            state.prog_candidate_val_subscores[k] = dict(enumerate(score_V))
        for index, row in rows.items():
            texts = population.candidates[index].components
            scores = dict(zip(val_ids, row, strict=True))
            self.events.validated(index, texts, scores, is_best=index == k)
        self.events.stop(state)

    def end(self, population: Population) -> None:
        """Tell that the run ends."""
        if not self.events.heard:
            return
        state = self.gepa_state(
            population.candidates, population.score_K_V, population.objective_K_V
        )
        self.events.end(state, best(population))

    def count_reflection(self, reflector: Reflector) -> None:
        """Count what became of a reflector's proposals."""
        self.judge.count(
            empty=reflector.outcomes["empty"],
            duplicate=reflector.outcomes["duplicate"],
            errors=dict(reflector.errors),
        )

    def gepa_state(
        self,
        members: Sequence[Candidate],
        score_K: Sequence[Row],
        objective_K: Sequence[Sequence[Mapping[str, float]]] = (),
    ) -> GEPAState:
        """gepa's state, as if it had found all the members by itself.

        Where there are no objectives (yet), its front is over examples. One on which a single
        member of several has run is left out, where there are others: nobody was beaten there.
        """
        frontier: FrontierType = self.config.frontier_type if objective_K else "instance"
        columns = shared_columns(score_K)
        evaluations: list[ValsetEvaluation] = []
        for k, row in enumerate(score_K):
            scores = {v: score for v, score in enumerate(row) if v in columns and score is not None}
            # gepa wants objectives of all: of one that was compared nowhere, those it has.
            known = scores or range(len(row))
            objectives = {v: dict(objective_K[k][v]) for v in known} if objective_K else None
            evaluations.append(ValsetEvaluation({}, scores, objectives))
        state: GEPAState = GEPAState(
            dict(members[0].components), evaluations[0], frontier_type=frontier
        )
        for member, evaluation in zip(members[1:], evaluations[1:], strict=True):
            state.update_state_with_new_program([], dict(member.components), evaluation, None, 0)
        state.total_num_evals = self.events.calls()
        names = self.memory.ready(members[0].components)
        state.list_of_named_predictors = names
        state.named_predictor_id_to_update_next_for_program_candidate = [
            self.turn % len(names) for _ in members
        ]
        return state

    def turn_to_demos(self) -> None:
        """Have demos proposed too, once some iterations have found no better instructions."""
        told = self.memory.turn_to_demos(self.judge.stats)
        if told is not None:
            logger.warning("%s", told)

    def advise(self) -> None:
        """Tell, after a first phase, if there was nothing to learn in it."""
        self.advice = self.memory.advice(self.judge.stats)
        if self.advice is not None:
            logger.warning("%s", self.advice)

    def report(self) -> dict[str, Any]:
        """What became of the proposals, and what the reflection LM cost, for JSON.

        ``"advice"`` is there where there is any, ``"stopped"`` where a stop callback ended the run.
        """
        told = {"advice": self.advice, "stopped": self.events.stopped}
        said = {name: text for name, text in told.items() if text is not None}
        return {**self.judge.stats.to_dict(), "reflection": self.memory.usage(), **said}

    def state(self) -> dict[str, Any]:
        """All there is to resume from, for JSON."""
        advice = {"advice": self.advice} if self.advice is not None else {}
        return {**self.memory.state(), **self.judge.state(), "turn": self.turn, **advice}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        self.memory.load_state(state)
        self.judge.load_state(state)
        self.turn, self.advice = state["turn"], state.get("advice")
        self.events.iteration = self.judge.stats.iterations

    def _compare(
        self,
        adapter: GepaAdapter,
        members: Sequence[Candidate],
        trainset: Sequence[dspy.Example],
        cycle: int,
    ) -> None:
        """Run several first candidates on one minibatch: unscored, they would be dropped."""
        rng = random.Random(f"{self.seed}|{cycle}|first candidates")
        batch = rng.sample(list(trainset), min(len(trainset), self.config.minibatch_size))
        for member in members:
            found = adapter.evaluate(batch, member.components, capture_traces=True)
            adapter.reflector.learn(member.components, found.trajectories or [])

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
            callbacks=self.events.for_gepa,
        )


def shared_columns(score_K: Sequence[Row]) -> set[int]:
    """The columns that have scores of two members, if there are such."""
    seen = [{v for v, score in enumerate(row) if score is not None} for row in score_K]
    counts = Counter(v for columns in seen for v in columns)
    return {v for v, count in counts.items() if count >= min(2, len(seen))} or set(counts)


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
