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
- ``notify_callbacks``, the events of ``gepa.core.callbacks`` and their fields, and that the
  proposer tells of an iteration's parts; ``GEPAState(frontier_type=)`` and its
  ``get_pareto_front_mapping``, ``add_budget_hook``, ``increment_evals`` and
  ``prog_candidate_val_subscores``; that stop callbacks are called with the state;
- ``ExperimentTracker()``, which without arguments keeps nothing;
- ``gepa.proposer.merge.sample_and_attempt_merge_programs_by_common_predictors``, which gives the
  texts, both parents and the ancestor, or ``None``;
- ``InstructionProposalSignature``: ``default_prompt_template``, ``prompt_renderer`` and
  ``output_extractor``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy

from fst_dspy.config import FastConfig
from fst_dspy.errors import DataError
from fst_dspy.fast import population as populations
from fst_dspy.fast.acceptance import ProposalStats, proposal_of
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.gepa.events import Events
from fst_dspy.fast.gepa.strategies import NAMED, Strategies, acceptance_criterion
from fst_dspy.fast.iterations import Iterations, check_instructions
from fst_dspy.fast.judge import Judge, Verdict
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.merge import merge
from fst_dspy.fast.proposers.demos import DemoProposer, without_answer
from fst_dspy.fast.proposers.protocol import Proposer
from fst_dspy.fast.scores import ValidationScores
from fst_dspy.rollouts.jobs import Runner
from fst_dspy.types import Candidate, Population, Rollout


class FastPhase:
    """Runs fast phases with rollouts of their own (the paper's way); a ``FastChannel``.

    Args:
        config: Population size, minibatch size and the like.
        proposer: Proposes instructions; see ``fst_dspy.fast.proposers.protocol``.
        seed: Seed of the draws of parents and minibatches, together with the cycle.
        demos: Proposes demos; ``None`` leaves them alone.
        strategies: gepa's strategies, in place of those that ``config`` names.
        events: gepa's callbacks, and who may end the run; ``None`` for none.
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
        strategies: Strategies = NAMED,
        events: Events | None = None,
    ) -> None:
        self.config, self.proposer, self.seed = config, proposer, seed
        self.events = events or Events()
        self.memory = Memory(proposer, demos, config)
        self.judge = Judge(acceptance_criterion(config, strategies))
        self.iterations = Iterations(config, seed, self.memory, self.judge, strategies, self.events)

    @property
    def stats(self) -> ProposalStats:
        """What became of the proposals so far."""
        return self.judge.stats

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
        alone: bool = False,
        has_room: Callable[[], bool] = lambda: True,
    ) -> Population:
        """One fast phase: the population after some iterations and merges; see ``FastChannel``.

        Every rollout is counted on channel ``fast``: a minibatch an iteration for the parent,
        another for a child, and the validation examples for a child that is accepted.

        Raises:
            DataError: No training examples, or scores that do not belong to ``valset``.
            ConfigError: The candidates hold no instructions to improve.
        """
        if iterations < 1:
            return population
        _check(population, trainset, valset)
        self.iterations.begin(population, trainset, valset)
        first = self.stats.iterations == 0
        reflector = self.memory.reflector(c.id for c in population.candidates)
        adapter = GepaAdapter(runner, reflector, cycle, (self.memory.bank,))
        scores = ValidationScores(population, adapter, valset)
        members = self.iterations.run(
            adapter, scores, population, trainset, cycle, iterations, has_room
        )
        for number in range(self.config.merge_iterations):
            if self.events.stopped is None and has_room():
                rng = random.Random(f"{self.seed}|{cycle}|merge {number}")
                self._merge_on(adapter, scores, members, trainset, valset, cycle, rng)
        self.iterations.count_reflection(reflector)
        if first:
            self.iterations.advise()
        return populations.choose(
            members,
            scores.rows(members),
            population.val_ids,
            self.config.population_size,
            policy_version,
            objective_K_V=scores.objectives(members),
            frontier=self.config.frontier_type,
        )

    def lineup(
        self, population: Population, group_size: int, problem: str | None = None
    ) -> tuple[Candidate, ...]:
        """The candidate of each of a group's G rollouts in the slow phase; see ``FastChannel``."""
        slots = populations.assign(population, group_size, self.config.population_size)
        return tuple(without_answer(candidate, problem) for candidate in slots)

    def after_step(
        self,
        population: Population,
        trainset: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
        *,
        cycle: int,
        policy_version: int,
        tries: bool = True,
    ) -> Population:
        """Learn from the rollouts of an optimizer step; the population stays as it is.

        Arguments are those of ``FastChannel.after_step``.
        """
        self.events.budget(self.events.calls(), len(rollouts))
        self.observe(list(population.candidates[0].components), trainset, rollouts)
        return population

    def observe(
        self,
        components: Sequence[str],
        trainset: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Let the proposers learn from rollouts; see ``FastChannel``."""
        self.memory.observe(components, trainset, rollouts)

    def take_verdicts(self) -> list[Verdict]:
        """What became of the children that were tried since the last call."""
        return self.judge.take_verdicts()

    def report(self) -> dict[str, Any]:
        """What became of the proposals, and what the reflection LM cost, for JSON."""
        return self.iterations.report()

    def state(self) -> dict[str, Any]:
        """All there is to resume from, for JSON."""
        return self.iterations.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        self.iterations.load_state(state)

    def validated(
        self, population: Population, val_ids: Sequence[str], score_V: Sequence[float]
    ) -> None:
        """Hear of a validation; see ``FastChannel``."""
        self.iterations.validated(population, val_ids, score_V)

    def end(self, population: Population) -> None:
        """Hear of the end of the run."""
        self.iterations.end(population)

    def _merge_on(
        self,
        adapter: GepaAdapter,
        scores: ValidationScores,
        members: list[Candidate],
        trainset: Sequence[dspy.Example],
        valset: Sequence[dspy.Example],
        cycle: int,
        rng: random.Random,
    ) -> None:
        """Add a merged child that does as well as both parents on a draw of validation examples."""
        rows = scores.rows(members)
        means = [populations.mean(row) for row in rows]
        known = adapter.reflector.known_ids
        child = merge(members, means, self.judge.ancestors, known, cycle, rng)
        if child is None:
            return
        state = self.iterations.gepa_state(members, rows, scores.objectives(members))
        self.judge.count(iterations=1)
        self.events.begin_iteration(self.stats.iterations, state, trainset)
        known.add(child.id)
        parents = [m for m in members if m.id in child.parent_ids]
        indices = [members.index(parent) for parent in parents]
        self.events.merging(indices, child.components)
        size = min(len(valset), self.config.minibatch_size)
        columns = sorted(rng.sample(range(len(valset)), size))
        after = adapter.evaluate([valset[v] for v in columns], child.components).scores
        before = [[rows[k][v] for v in columns] for k in indices]
        proposal = proposal_of(child, before, after, indices)
        blocks = [
            ([own], others) for own, others in zip(after, zip(*before, strict=True), strict=True)
        ]
        accepted = self.iterations.accepts(child, parents, proposal, state, blocks)
        if accepted:
            self.iterations.add(child, members, scores, state, proposal)
        self.events.end_iteration(state, accepted)


def _check(
    population: Population, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example]
) -> None:
    check_instructions(population, trainset)
    if not valset or len(valset) != len(population.val_ids):
        raise DataError(
            f"the population was scored on {len(population.val_ids)} validation examples, but "
            f"{len(valset)} are given; score it on these first"
        )
