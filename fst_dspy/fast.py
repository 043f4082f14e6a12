"""The fast channel: GEPA over the whole population, on the current weights.

A fast phase is a few of gepa's own iterations: a parent is drawn from the per-example Pareto
front, run on a minibatch of training examples, a proposer reads what happened and rewrites one
component, and the child is run on the same minibatch. A child that does better is scored on the
validation examples. The K candidates that cover the front are the next population.

Where this departs from ``gepa.optimize`` and ``dspy.GEPA``: they start from one candidate and
cache scores by text. Here the state starts from the whole population, with scores measured under
the current weights, because the weights move between the phases.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import dspy
from gepa.core.adapter import GEPAAdapter
from gepa.core.state import GEPAState, ValsetEvaluation
from gepa.logging.experiment_tracker import ExperimentTracker
from gepa.proposer.reflective_mutation.base import ReflectionComponentSelector
from gepa.proposer.reflective_mutation.reflective_mutation import ReflectiveMutationProposer
from gepa.strategies.acceptance import AcceptanceCriterion, StrictImprovementAcceptance
from gepa.strategies.batch_sampler import EpochShuffledBatchSampler
from gepa.strategies.candidate_selector import ParetoCandidateSelector
from gepa.strategies.component_selector import RoundRobinReflectionComponentSelector

from fst_dspy.candidate import INSTRUCTIONS, split_component
from fst_dspy.config import FastConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.evaluate import evaluate
from fst_dspy.gepa_adapter import GepaAdapter, Trajectory, candidate_of, make_records
from fst_dspy.population import choose
from fst_dspy.proposers import HasState, LearnsFromRecords, Proposer
from fst_dspy.rollout import Channel, Runner
from fst_dspy.types import Candidate, Population, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProposalStats:
    """What became of the iterations so far.

    Attributes:
        iterations: Iterations run; each costs a minibatch of rollouts.
        proposals: Children that were run on the minibatch, at the cost of another.
        accepted: Children that did better, and were scored on the validation examples.
        rejected: Children that did not.
        empty: Iterations whose proposer changed nothing.
        duplicate: Iterations whose proposal there was already.
        errors: Iterations without a usable proposal, by kind.
    """

    iterations: int = 0
    proposals: int = 0
    accepted: int = 0
    rejected: int = 0
    empty: int = 0
    duplicate: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)

    def plus(self, other: ProposalStats) -> ProposalStats:
        """The sum of two counts."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "errors"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return ProposalStats(**sums, errors=dict(Counter(self.errors) + Counter(other.errors)))


class WorstFirstComponentSelector:
    """Picks the component whose predictor fares worst on the minibatch.

    Worst is the largest share of calls that could not be read, then the lowest mean reward of the
    rollouts that reached the predictor; equals are taken in the program's order.
    """

    def __call__(
        self,
        state: GEPAState,
        trajectories: list[Any],
        subsample_scores: list[float],
        candidate_idx: int,
        candidate: dict[str, str],
    ) -> list[str]:
        """The one component to update."""
        names = state.list_of_named_predictors
        return [min(names, key=lambda name: _health(split_component(name)[0], trajectories))]


def _health(predictor: str, trajectories: Sequence[Trajectory]) -> tuple[float, float]:
    reads, rewards = [], []
    for trajectory in trajectories:
        traces = [t for t in trajectory.rollout.traces if t.predictor == predictor]
        reads += [trace.outputs is not None for trace in traces]
        rewards += [trajectory.rollout.reward] if traces else []
    if not reads:
        return (1.0, float("inf"))
    return (sum(reads) / len(reads), sum(rewards) / len(rewards))


class FastPhase:
    """Runs fast phases. Between them it keeps only the proposer's memory and the counts.

    Args:
        config: Population size, minibatch size.
        proposer: Proposes instructions; see ``fst_dspy.proposers``.
        seed: Seed of the draws of parents and minibatches, together with the cycle.
        acceptance: gepa's criterion for a child, by its minibatch scores and its parent's.
        component_selector: Makes gepa's selector of the component to update, for each phase.
    """

    def __init__(
        self,
        config: FastConfig,
        proposer: Proposer,
        seed: int,
        *,
        acceptance: AcceptanceCriterion | None = None,
        component_selector: Callable[
            [], ReflectionComponentSelector
        ] = RoundRobinReflectionComponentSelector,
    ) -> None:
        self.config = config
        self.proposer = proposer
        self.seed = seed
        self.acceptance = acceptance or StrictImprovementAcceptance()
        self.component_selector = component_selector
        self.stats = ProposalStats()

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
        """One fast phase: the population after some iterations.

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
        candidates = list(population.candidates)
        state = _state_of(population, cycle)
        adapter = GepaAdapter(runner, self.proposer, cycle, {c.id for c in candidates})
        reflection = self._reflection(adapter, trainset, cycle)
        accepted = rejected = 0
        for _ in range(iterations):
            state.i += 1
            state.full_program_trace.append({"i": state.i})
            for proposal in reflection.propose(state):
                if proposal.eval_after is not None:
                    adapter.observe(
                        state.list_of_named_predictors, proposal.eval_after.trajectories or []
                    )
                if not self.acceptance.should_accept(proposal, state):
                    rejected += 1
                    continue
                accepted += 1
                parents = proposal.parent_program_ids
                child = candidate_of(proposal.candidate, candidates[parents[0]], cycle)
                scores = dict(enumerate(adapter.evaluate(valset, child.components).scores))
                state.update_state_with_new_program(
                    parents, dict(child.components), ValsetEvaluation({}, scores), None, 0
                )
                candidates.append(child)
                adapter.known_ids.add(child.id)
        self.stats = self.stats.plus(
            ProposalStats(
                iterations=iterations,
                proposals=accepted + rejected,
                accepted=accepted,
                rejected=rejected,
                empty=adapter.outcomes["empty"],
                duplicate=adapter.outcomes["duplicate"],
                errors=dict(adapter.errors),
            )
        )
        rows = state.prog_candidate_val_subscores
        score_K_V = [[row[v] for v in range(len(valset))] for row in rows]
        return choose(
            candidates, score_K_V, population.val_ids, self.config.population_size, policy_version
        )

    def observe(
        self,
        components: Sequence[str],
        examples: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Let the proposer learn from rollouts run for another purpose, at no cost.

        Does nothing for a proposer without ``observe``. Never pass validation or test rollouts:
        what is learned from them would be scored on them.

        Args:
            components: The candidates' component names; only instructions count.
            examples: The training examples, one a rollout.
            rollouts: Such as those of the slow phase.
        """
        if isinstance(self.proposer, LearnsFromRecords):
            pairs = [Trajectory(e, r) for e, r in zip(examples, rollouts, strict=True)]
            for name in _instructions(components):
                self.proposer.observe(name, make_records(name, pairs))

    def state(self) -> dict[str, Any]:
        """All there is to resume from, for JSON."""
        memory = self.proposer.state() if isinstance(self.proposer, HasState) else None
        return {"proposer": memory, "stats": dataclasses.asdict(self.stats)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        if isinstance(self.proposer, HasState) and state["proposer"] is not None:
            self.proposer.load_state(state["proposer"])
        self.stats = ProposalStats(**state["stats"])

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


def score(
    runner: Runner,
    candidates: Sequence[Candidate],
    valset: Sequence[dspy.Example],
    *,
    channel: Channel,
    salt: int,
) -> tuple[tuple[float, ...], ...]:
    """score_K_V: each candidate once on each validation example, under the current weights.

    Args:
        runner: Runs the K x V rollouts.
        candidates: Length K.
        valset: Length V.
        channel: Where the rollouts are counted.
        salt: Tells apart repeated scorings.
    """
    return evaluate(runner, candidates, valset, channel=channel, salt=salt).score_K_V


class _QuietLogger:
    """gepa's log lines, for those who ask for them."""

    def log(self, message: str) -> None:
        logger.debug("%s", message)


def _instructions(components: Sequence[str]) -> list[str]:
    return [name for name in components if split_component(name)[1] == INSTRUCTIONS]


def _check(
    population: Population, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example]
) -> None:
    if not trainset:
        raise DataError("the fast phase needs at least one training example to reflect on")
    if len(valset) != len(population.val_ids) or not valset:
        raise DataError(
            f"the population was scored on {len(population.val_ids)} validation examples, but "
            f"{len(valset)} are given; score it on these first"
        )
    if not _instructions(list(population.candidates[0].components)):
        raise ConfigError("the candidates hold no '<predictor>.instructions' to improve")


def _state_of(population: Population, cycle: int) -> GEPAState:
    """gepa's state, as if it had found the whole population by itself."""
    evaluations: list[ValsetEvaluation] = [
        ValsetEvaluation({}, dict(enumerate(score_V))) for score_V in population.score_K_V
    ]
    first, *others = population.candidates
    state: GEPAState = GEPAState(dict(first.components), evaluations[0])
    state.total_num_evals = 0
    state.num_full_ds_evals = len(evaluations)
    for candidate, evaluation in zip(others, evaluations[1:], strict=True):
        state.update_state_with_new_program([], dict(candidate.components), evaluation, None, 0)
    # Round robin runs over these; demos are carried along unchanged. It starts elsewhere each
    # cycle: a short phase that always began at the first component would never reach the last.
    names = _instructions(list(first.components))
    state.list_of_named_predictors = names
    state.named_predictor_id_to_update_next_for_program_candidate = [
        (cycle + k) % len(names) for k in range(len(evaluations))
    ]
    return state
