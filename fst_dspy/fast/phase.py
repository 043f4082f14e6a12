"""The fast channel: GEPA over the whole population, on the current weights.

A fast phase is a few of gepa's own iterations: a parent is drawn from the per-example Pareto
front, run on a minibatch of training examples, a proposer reads what happened and rewrites one
component, and the child is run on the same minibatch. A child that does better is scored on the
validation examples. The K candidates that cover the front are the next population.

Where this departs from ``gepa.optimize`` and ``dspy.GEPA``: they start from one candidate and
cache scores by text. Here the state starts from the whole population, with scores measured under
the current weights, because the weights move between the phases. Demos are components like
instructions. ``fst_dspy.fast.trials`` does the same without rollouts of its own.

What the package relies on of gepa's insides, here and elsewhere; ran with 0.1.4, held by the test
``test_gepa_contract``:

- ``GEPAState(seed_candidate, base_evaluation)``, to which ``update_state_with_new_program`` adds
  candidates, also without parents; its ``i``, the number of the iteration, by which minibatches are
  drawn, ``full_program_trace``, ``total_num_evals``, ``list_of_named_predictors`` and
  ``named_predictor_id_to_update_next_for_program_candidate``, which may be assigned to;
  ``ValsetEvaluation(outputs, scores)`` by validation example;
- ``ReflectiveMutationProposer``, whose ``propose(state)`` runs a parent and its child on one
  minibatch with ``capture_traces=True``, takes the child's texts from the adapter's
  ``propose_new_texts``, skips an empty dict, and gives ``CandidateProposal``s with one of
  ``parent_program_ids``, ``subsample_scores_before`` and ``_after``, ``eval_after.trajectories``;
- ``GEPAAdapter`` and ``EvaluationBatch(outputs, scores, trajectories)``;
- ``ParetoCandidateSelector(rng)``, ``EpochShuffledBatchSampler(size, rng)`` and
  ``RoundRobinReflectionComponentSelector``, which moves the turn in the state on; what a
  ``ReflectionComponentSelector`` is given;
- ``StrictImprovementAcceptance`` and ``ImprovementOrEqualAcceptance``: ``should_accept`` reads the
  proposal's minibatch scores alone, so that there need not be a state;
- ``ExperimentTracker()``, which without arguments keeps nothing;
- ``gepa.proposer.merge.sample_and_attempt_merge_programs_by_common_predictors``, which gives the
  texts, both parents and the ancestor, or ``None``;
- ``InstructionProposalSignature``: ``default_prompt_template``, ``prompt_renderer`` and
  ``output_extractor``.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import dspy
from gepa.core.adapter import GEPAAdapter
from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.logging.experiment_tracker import ExperimentTracker
from gepa.proposer.base import CandidateProposal
from gepa.proposer.reflective_mutation.base import ReflectionComponentSelector
from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer
from gepa.strategies.acceptance import AcceptanceCriterion, StrictImprovementAcceptance
from gepa.strategies.batch_sampler import EpochShuffledBatchSampler
from gepa.strategies.candidate_selector import ParetoCandidateSelector

from fst_dspy.config import FastConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.fast import population as populations
from fst_dspy.fast.acceptance import ProposalStats, criterion_for, proposal_of
from fst_dspy.fast.gepa_adapter import GepaAdapter
from fst_dspy.fast.merge import merge
from fst_dspy.fast.population import choose
from fst_dspy.fast.proposers.demos import DemoProposer
from fst_dspy.fast.proposers.protocol import HasState, Proposer
from fst_dspy.fast.proposers.reflection import ReflectionUsage
from fst_dspy.fast.reflector import Reflector, Trajectory, candidate_of
from fst_dspy.fast.selectors import SELECTORS
from fst_dspy.rollouts.jobs import Runner
from fst_dspy.student.candidate import (
    DEMOS,
    INSTRUCTIONS,
    candidate_from_json,
    candidate_to_json,
    example_id,
    split_component,
)
from fst_dspy.types import Candidate, Population, Rollout

logger = logging.getLogger(__name__)

ANCESTORS = 64
"""Accepted candidates remembered, the latest, so that merges can tell who descends from whom."""


class Scores(Protocol):
    """Where a fast phase's Pareto scores come from."""

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
        """Scores of the members, a row each, on the same columns."""
        ...

    def add(self, child: Candidate) -> None:
        """Score an accepted child, where that takes rollouts."""
        ...


class FastPhase:
    """Runs fast phases with rollouts of their own (the paper's way).

    Between them it keeps the proposers' memories, the ancestors of candidates and the counts.

    Args:
        config: Population size, minibatch size and the like.
        proposer: Proposes instructions; see ``fst_dspy.fast.proposers.protocol``.
        seed: Seed of the draws of parents and minibatches, together with the cycle.
        demos: Proposes demos; ``None`` leaves them alone.
        acceptance: gepa's criterion for a child, by its minibatch scores and its parent's.
        component_selector: Makes gepa's selector of the component to update; by default the one
            that ``config`` names.
    """

    reuses = False
    """Whether candidates are scored on the slow phase's rollouts, not on validation examples."""

    def __init__(
        self,
        config: FastConfig,
        proposer: Proposer,
        seed: int,
        *,
        demos: DemoProposer | None = None,
        acceptance: AcceptanceCriterion | None = None,
        component_selector: Callable[[], ReflectionComponentSelector] | None = None,
    ) -> None:
        self.config = config
        self.proposer = proposer
        self.seed = seed
        self.demos = demos
        self.acceptance = acceptance or StrictImprovementAcceptance()
        self.component_selector = component_selector or SELECTORS[config.component_selector]
        self.stats = ProposalStats()
        self._turn = 0  # components updated so far, over all phases
        self._ancestors: dict[str, Candidate] = {}
        self._indexed: tuple[Sequence[dspy.Example], dict[str, dspy.Example]] = ((), {})

    def run(
        self,
        runner: Runner,
        population: Population,
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example],
        *,
        cycle: int,
        iterations: int,
        policy_version: int,
    ) -> Population:
        """One fast phase: the population after some iterations and merges.

        Every rollout is counted on channel ``fast``: a minibatch an iteration for the parent,
        another for a child, and the validation examples for a child that is accepted.

        Args:
            runner: Runs the rollouts.
            population: Scored on ``valset`` under the current weights.
            trainset: Examples to reflect on, at least one.
            valset: Length V, in the order of ``population.val_ids``.
            cycle: Number of the cycle, part of every seed.
            iterations: GEPA iterations; 0 returns the population as it is.
            policy_version: Optimizer steps taken so far.

        Raises:
            DataError: No training examples, or scores that do not belong to ``valset``.
            ConfigError: The candidates hold no instructions to improve.
        """
        if iterations < 1:
            return population
        _check(population, trainset, valset)
        adapter = self._adapter(runner, population.candidates, cycle)
        scores = _ValidationScores(population, adapter, valset)
        members = self._iterate(adapter, scores, population, trainset, cycle, iterations)
        for number in range(self.config.merge_iterations):
            rng = random.Random(f"{self.seed}|{cycle}|merge {number}")
            child = self._merge_on(adapter, scores, members, valset, cycle, rng)
            members += [child] if child is not None else []
        self._count_reflection(adapter.reflector)
        size = self.config.population_size
        return choose(members, scores.rows(members), population.val_ids, size, policy_version)

    def lineup(self, population: Population, group_size: int) -> tuple[Candidate, ...]:
        """The candidate of each of a group's G rollouts in the slow phase."""
        return populations.assign(population, group_size, self.config.population_size)

    def after_step(
        self,
        population: Population,
        trainset: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
        *,
        cycle: int,
        policy_version: int,
    ) -> Population:
        """Learn from the rollouts of an optimizer step; the population for the next one.

        Args:
            population: The one the rollouts were run with.
            trainset: All training examples.
            rollouts: All of the step. Never validation or test rollouts: what is learned from
                them would be scored on them.
            cycle: Number of the cycle.
            policy_version: Optimizer steps taken, this one included.
        """
        self.observe(list(population.candidates[0].components), trainset, rollouts)
        return population

    def observe(
        self,
        components: Sequence[str],
        trainset: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Let the proposers learn from rollouts run for another purpose, at no cost.

        Args:
            components: The candidates' component names.
            trainset: The training examples that the rollouts were run on, and maybe others.
            rollouts: Such as those of the slow phase.
        """
        examples = self.by_id(trainset)
        pairs = [Trajectory(examples[rollout.example_id], rollout) for rollout in rollouts]
        Reflector(self.proposer, set()).learn(components, pairs)
        self._keep(rollouts)

    def by_id(self, trainset: Sequence[dspy.Example]) -> dict[str, dspy.Example]:
        """The examples by their ids, which are hashes of what is in them, and not taken twice."""
        if self._indexed[0] is not trainset:
            self._indexed = (trainset, {example_id(example): example for example in trainset})
        return self._indexed[1]

    def report(self) -> dict[str, Any]:
        """What became of the proposals, and what the reflection LM cost, for JSON."""
        usage = getattr(self.proposer, "usage", None)
        reflection = dataclasses.asdict(usage) if isinstance(usage, ReflectionUsage) else None
        return {**dataclasses.asdict(self.stats), "reflection": reflection}

    def state(self) -> dict[str, Any]:
        """All there is to resume from, for JSON."""
        return {
            "proposer": self.proposer.state() if isinstance(self.proposer, HasState) else None,
            "demos": self.demos.state() if self.demos is not None else None,
            "stats": dataclasses.asdict(self.stats),
            "turn": self._turn,
            "ancestors": [candidate_to_json(c) for c in self._ancestors.values()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        if isinstance(self.proposer, HasState) and state["proposer"] is not None:
            self.proposer.load_state(state["proposer"])
        if self.demos is not None and state["demos"] is not None:
            self.demos.load_state(state["demos"])
        self.stats = ProposalStats(**state["stats"])
        self._turn = state["turn"]
        self._remember(map(candidate_from_json, state["ancestors"]))

    def _iterate(
        self,
        adapter: GepaAdapter,
        scores: Scores,
        population: Population,
        trainset: Sequence[dspy.Example],
        cycle: int,
        iterations: int,
    ) -> list[Candidate]:
        """gepa's iterations: the population's candidates and the accepted children."""
        members = list(population.candidates)
        self._remember(members)
        reflection = self._reflection(adapter, trainset, cycle)
        for number in range(iterations):
            state = self._gepa_state(members, scores.rows(members))
            state.i = number
            state.full_program_trace.append({"i": number})
            for proposal in reflection.propose(state):
                (parent,) = (members[k] for k in proposal.parent_program_ids)
                child = candidate_of(proposal.candidate, parent, cycle)
                if proposal.eval_after is not None:
                    trajectories = proposal.eval_after.trajectories or []
                    adapter.reflector.learn(child.components, trajectories)
                adapter.reflector.known_ids.add(child.id)
                if self._judge(child, [parent], proposal, state):
                    scores.add(child)
                    members.append(child)
            self._turn += 1
        self.stats = self.stats.plus(ProposalStats(iterations=iterations))
        return members

    def _merge_on(
        self,
        adapter: GepaAdapter,
        scores: Scores,
        members: Sequence[Candidate],
        valset: Sequence[dspy.Example],
        cycle: int,
        rng: random.Random,
    ) -> Candidate | None:
        """A merged child that does as well as both parents on a draw of validation examples."""
        rows = scores.rows(members)
        means = [sum(row) / len(row) for row in rows]
        known = adapter.reflector.known_ids
        child = merge(members, means, self._ancestors, known, cycle, rng)
        if child is None:
            return None
        self.stats = self.stats.plus(ProposalStats(iterations=1))
        known.add(child.id)
        parents = [m for m in members if m.id in child.parent_ids]
        size = min(len(valset), self.config.minibatch_size)
        columns = sorted(rng.sample(range(len(valset)), size))
        after = adapter.evaluate([valset[v] for v in columns], child.components).scores
        before = [[rows[members.index(parent)][v] for v in columns] for parent in parents]
        if not self._judge(child, parents, proposal_of(child, before, after), None):
            return None
        scores.add(child)
        return child

    def _judge(
        self,
        child: Candidate,
        parents: Sequence[Candidate],
        proposal: CandidateProposal,
        state: GEPAState | None,
    ) -> bool:
        """Whether gepa's criterion accepts the child; counts and remembers it."""
        criterion = criterion_for(child, parents[0], self.acceptance)
        accepted = criterion.should_accept(proposal, cast(GEPAState, state))
        self.stats = self.stats.plus(
            ProposalStats(
                proposals=1,
                accepted=int(accepted),
                rejected=int(not accepted),
                merges=int(accepted and child.source == "merge"),
            )
        )
        if accepted:
            self._remember([child])
        return accepted

    def _adapter(self, runner: Runner, candidates: Sequence[Candidate], cycle: int) -> GepaAdapter:
        reflector = Reflector(self.proposer, {c.id for c in candidates}, self.demos)
        return GepaAdapter(runner, reflector, cycle, self._keep)

    def _keep(self, rollouts: Sequence[Rollout]) -> None:
        """Take what may be used again from training rollouts of either channel."""
        if self.demos is not None:
            self.demos.bank(rollouts)

    def _remember(self, candidates: Iterable[Candidate]) -> None:
        for candidate in candidates:
            self._ancestors.setdefault(candidate.id, candidate)
        while len(self._ancestors) > ANCESTORS:
            del self._ancestors[next(iter(self._ancestors))]

    def _count_reflection(self, reflector: Reflector) -> None:
        self.stats = self.stats.plus(
            ProposalStats(
                empty=reflector.outcomes["empty"],
                duplicate=reflector.outcomes["duplicate"],
                errors=dict(reflector.errors),
            )
        )

    def _gepa_state(
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
        names = self._components(members)
        state.list_of_named_predictors = names
        state.named_predictor_id_to_update_next_for_program_candidate = [
            self._turn % len(names) for _ in members
        ]
        return state

    def _components(self, members: Sequence[Candidate]) -> list[str]:
        """What may be updated: instructions, and demos once there is something to show."""
        components = members[0].components
        demos = [name for name in components if split_component(name)[1] == DEMOS]
        ready = [name for name in demos if self.demos is not None and self.demos.ready(name)]
        return [*_instructions(components), *ready]

    def _reflection(
        self, adapter: GepaAdapter, trainset: Sequence[dspy.Example], cycle: int
    ) -> ReflectiveMutationProposer:
        parents = random.Random(f"{self.seed}|{cycle}|parents")
        batches = random.Random(f"{self.seed}|{cycle}|minibatches")
        return ReflectiveMutationProposer(
            logger=_QuietLogger(),
            trainset=list(trainset),
            adapter=cast(GEPAAdapter[Any, Any, Any], adapter),
            candidate_selector=ParetoCandidateSelector(parents),
            module_selector=self.component_selector(),
            batch_sampler=EpochShuffledBatchSampler(self.config.minibatch_size, batches),
            perfect_score=None,
            skip_perfect_score=False,
            experiment_tracker=ExperimentTracker(),
        )


class _ValidationScores:
    """Scores on the validation examples, measured with rollouts of channel ``fast``."""

    def __init__(
        self, population: Population, adapter: GepaAdapter, valset: Sequence[dspy.Example]
    ) -> None:
        self.adapter, self.valset = adapter, valset
        self.by_id: dict[str, Sequence[float]] = {
            candidate.id: score_V
            for candidate, score_V in zip(population.candidates, population.score_K_V, strict=True)
        }

    def rows(self, members: Sequence[Candidate]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(self.by_id[member.id]) for member in members)

    def add(self, child: Candidate) -> None:
        self.by_id[child.id] = self.adapter.evaluate(self.valset, child.components).scores


class _QuietLogger:
    """gepa's log lines, for those who ask for them."""

    def log(self, message: str) -> None:
        logger.debug("%s", message)


def _instructions(components: Iterable[str]) -> list[str]:
    return [name for name in components if split_component(name)[1] == INSTRUCTIONS]


def _check(
    population: Population, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example]
) -> None:
    check_instructions(population, trainset)
    if not valset or len(valset) != len(population.val_ids):
        raise DataError(
            f"the population was scored on {len(population.val_ids)} validation examples, but "
            f"{len(valset)} are given; score it on these first"
        )


def check_instructions(population: Population, trainset: Sequence[dspy.Example]) -> None:
    """Check that there is something to reflect on, and something to improve.

    Raises:
        DataError, ConfigError: As ``FastPhase.run``.
    """
    if not trainset:
        raise DataError("the fast phase needs at least one training example to reflect on")
    if not _instructions(population.candidates[0].components):
        raise ConfigError("the candidates hold no '<predictor>.instructions' to improve")
