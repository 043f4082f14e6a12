"""The fast channel without rollouts of its own: candidates are tried in the slow phase's groups.

Every optimizer step runs K candidates on P problems anyway. Here these rollouts are

* the Pareto scores: a table of candidates by problems, over the last ``reuse_window`` steps;
* what is reflected on: the failures and feedback of the parent drawn from that front;
* demos, and lessons for a proposer that keeps a memory;
* the trial of a new candidate: for ``steps_per_cycle / cycle_iterations`` steps it gets slots in
  every group, those of the candidate that adds least to the front. It is accepted if it does better
  than its parent on the same problems at the same time.

A trial follows a trial, so a cycle has ``cycle_iterations`` of them, each on more rollouts than a
minibatch of GEPA's. A candidate leaves, too, when nothing recent is known of it. Only a
fast phase that no steps follow, as the first, has rollouts of its own; children are scored on their
minibatches there, not on the validation examples. These are left for validation.

A proposer that waits for others, such as a reflection LM, is asked for the next candidate while the
last step of a trial runs, from what is known before that step. So the model does not wait for it,
and it is taken up after that step however long it took.
"""

from __future__ import annotations

import contextvars
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import dspy
from gepa.core.adapter import EvaluationBatch
from gepa.core.state import GEPAState

from fst_dspy import distributed
from fst_dspy.config import FastConfig
from fst_dspy.fast import population as populations
from fst_dspy.fast.acceptance import ProposalStats, proposal_of
from fst_dspy.fast.decide import LIKELY, share
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.gepa.events import Events, Told, proposed, reflecting, selected
from fst_dspy.fast.gepa.strategies import (
    NAMED,
    Strategies,
    acceptance_criterion,
    candidate_selector,
    component_selector,
)
from fst_dspy.fast.iterations import Iterations, check_instructions
from fst_dspy.fast.judge import Judge, Verdict
from fst_dspy.fast.lineup import Trial, lineup
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.merge import merge
from fst_dspy.fast.pool import (
    RolloutPool,
    minibatch,
    observed,
    paired,
    pool_from_json,
    score_table,
)
from fst_dspy.fast.proposers.demos import DemoProposer, without_answer
from fst_dspy.fast.proposers.protocol import Proposer
from fst_dspy.fast.reflector import Reflector, Trajectory, candidate_of
from fst_dspy.fast.scores import PooledScores
from fst_dspy.rollouts.jobs import Runner
from fst_dspy.student.candidate import candidate_from_json, candidate_to_json
from fst_dspy.types import Candidate, Population, Rollout

POOL_SIZE = 4096
"""Rollouts kept at most, however slowly the policy's version moves."""
TRIED = 256
"""Candidates remembered by id, the latest, so that none is tried twice."""


Made = tuple[Candidate | None, Reflector, list[Told]]
"""A new candidate, if there is one to be had, and the account of how it was made, with what
callbacks are to hear of it once its iteration has begun."""


class TrialPhase:
    """A fast channel that uses the slow phase's rollouts; a ``FastChannel``.

    Args:
        config, proposer, seed: As for :class:`~fst_dspy.fast.phase.FastPhase`.
        steps_per_cycle: T, optimizer steps a cycle.
        demos, strategies, events: As for :class:`~fst_dspy.fast.phase.FastPhase`.

    Attributes:
        trial: The candidate on trial, if one is.
    """

    reuses = True
    """Whether candidates are scored on the slow phase's rollouts, not on validation examples."""

    def __init__(
        self,
        config: FastConfig,
        proposer: Proposer,
        seed: int,
        *,
        steps_per_cycle: int,
        demos: DemoProposer | None = None,
        strategies: Strategies = NAMED,
        events: Events | None = None,
    ) -> None:
        self.config, self.proposer, self.seed = config, proposer, seed
        self.strategies, self.memory = strategies, Memory(proposer, demos, config)
        self.events = events or Events()
        self.judge = Judge(acceptance_criterion(config, strategies))
        self.iterations = Iterations(config, seed, self.memory, self.judge, strategies, self.events)
        self.scores = PooledScores()
        self.trial_steps = max(1, steps_per_cycle // max(1, config.cycle_iterations))
        self.window = max(self.trial_steps, config.reuse_window or steps_per_cycle)
        self.trial: Trial | None = None
        self._trials = 0
        self._tried: list[str] = []
        self._due: tuple[int, int] | None = None  # cycle and version to make a candidate from
        self._asked: Future[Made] | None = None
        self._trainset: Sequence[dspy.Example] = ()

    @property
    def stats(self) -> ProposalStats:
        """What became of the proposals so far."""
        return self.judge.stats

    @property
    def pool(self) -> RolloutPool:
        """The rollouts that candidates are scored on."""
        return self.scores.pool

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
        """A fast phase; it runs rollouts where no slow one follows, or while there are no others.

        Arguments and errors are those of ``FastPhase.run``; ``valset`` is not touched. The
        population that comes back is scored on training problems, which ``val_ids`` names.
        """
        if iterations < 1:
            return population
        self._trainset = trainset
        self.memory.study(trainset)
        self.iterations.begin(population, trainset, valset)
        members = list(population.candidates)
        if alone or not self.pool.rollouts:
            self._drop_trial(members)
            check_instructions(population, trainset)
            first = self.stats.iterations == 0
            reflector = self.memory.reflector(c.id for c in members)
            adapter = GepaAdapter(runner, reflector, cycle, (self.memory.bank, self.scores.keep))
            members = self.iterations.run(
                adapter,
                self.scores,
                population,
                trainset,
                cycle,
                iterations,
                has_room,
                until_proven=alone and first,
            )
            self.iterations.count_reflection(reflector)
            if first:
                self.iterations.advise()
        population = self._choose(members, population, policy_version)
        if self.trial is None and not alone:
            self._begin_trial(population, trainset, cycle, policy_version)
            self._ask_ahead(cycle, policy_version)
        return population

    def lineup(
        self, population: Population, group_size: int, problem: str | None = None
    ) -> tuple[Candidate, ...]:
        """The candidate of each of a group's G rollouts: the one on trial gets its share.

        A candidate whose demos show the problem's answer does without these; see ``FastChannel``.

        These rollouts are about to run, so it is now that a proposer that waits is asked.
        """
        # After a resume it is asked when it is needed, and so it is with several processes, which
        # share the answer and must not talk to each other from two threads.
        can_ask = self._trainset and distributed.processes() == 1
        if self._due is not None and self._asked is None and can_ask:
            make = partial(self._make_child, population, self._trainset, *self._due)
            thread = ThreadPoolExecutor(1, "proposal")
            self._asked = thread.submit(contextvars.copy_context().run, make)
            thread.shutdown(wait=False)
        if self.trial is None:
            slots = populations.assign(population, group_size, self.config.population_size)
        else:
            slots = lineup(population, self.trial, group_size, self.config.population_size)
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
        """Learn from a step's rollouts, judge a trial that is over, and begin the next.

        Arguments are those of ``FastPhase.after_step``.
        """
        self._trainset = trainset
        self.memory.study(trainset)
        self.events.budget(self.events.calls(), len(rollouts))
        made = self._take_up(population)  # it knows nothing of what is observed now
        self.observe(list(population.candidates[0].components), trainset, rollouts)
        recent = self.pool.since(policy_version - self.window)
        self.scores.pool = recent.latest(POOL_SIZE)
        members = list(population.candidates)
        if self.trial is not None:
            self.trial = dataclasses.replace(self.trial, steps_left=self.trial.steps_left - 1)
            if self.trial.steps_left == 0:
                members += self._judge(self.trial, population)
                self.trial = None
        population = self._choose(members, population, policy_version)
        if self.trial is None and tries:
            self._begin_trial(population, trainset, cycle, policy_version, made)
        if tries:
            self._ask_ahead(cycle, policy_version)
        return population

    def observe(
        self,
        components: Sequence[str],
        trainset: Sequence[dspy.Example],
        rollouts: Sequence[Rollout],
    ) -> None:
        """Let the proposers learn from rollouts, and keep these for scores; see ``FastChannel``."""
        self.memory.observe(components, trainset, rollouts)
        self.scores.keep(rollouts)

    def validated(
        self, population: Population, val_ids: Sequence[str], score_V: Sequence[float]
    ) -> None:
        """Hear of a validation; see ``FastChannel``."""
        self.iterations.validated(population, val_ids, score_V)

    def end(self, population: Population) -> None:
        """Hear of the end of the run."""
        self.iterations.end(population)

    def take_verdicts(self) -> list[Verdict]:
        """What became of the children that were tried since the last call."""
        return self.judge.take_verdicts()

    def report(self) -> dict[str, Any]:
        """What became of the proposals, and what the reflection LM cost, for JSON."""
        return self.iterations.report()

    def state(self) -> dict[str, Any]:
        """All there is to resume from, for JSON; the pool's rollouts are left as they are.

        They are many, and most states are never written.
        """
        trial = self.trial
        return {
            **self.iterations.state(),
            "pool": self.pool.rollouts,
            "trials": self._trials,
            "tried": list(self._tried),
            "due": self._due,
            "trial": None
            if trial is None
            else {
                "child": candidate_to_json(trial.child),
                "parents": [candidate_to_json(parent) for parent in trial.parents],
                "since": trial.since,
                "steps_left": trial.steps_left,
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        self.iterations.load_state(state)
        self.scores.pool = pool_from_json(state["pool"])
        self._trials = state["trials"]
        self._tried = list(state["tried"])
        self._due = tuple(state["due"]) if state["due"] else None
        row = state["trial"]
        self.trial = row and Trial(
            child=candidate_from_json(row["child"]),
            parents=tuple(map(candidate_from_json, row["parents"])),
            since=row["since"],
            steps_left=row["steps_left"],
        )

    def _choose(
        self, members: Sequence[Candidate], population: Population, policy_version: int
    ) -> Population:
        """The K members that cover the front over the problems in the pool.

        Who is likely worse leaves as often as trials end: in one window of rollouts an equal
        candidate is sent away at the rate of ``LIKELY`` at most, however often it is looked at.
        To lose an equal costs nothing; to keep a worse one, slots of every group.
        """
        due = policy_version % self.trial_steps == 0
        table = score_table(self.pool, members)
        if not table.candidates:
            return population
        return populations.choose(
            table.candidates,
            table.score_K_P,
            table.problem_ids,
            self.config.population_size,
            policy_version,
            objective_K_V=table.objective_K_P,
            frontier=self.config.frontier_type,
            seen_K_V=table.seen_K_P,
            pairs=partial(observed, self.pool),
            level=share(self.window / self.trial_steps, LIKELY) if due else 0.0,
        )

    def _judge(self, trial: Trial, population: Population) -> list[Candidate]:
        """The child, if it did better than its parents."""
        pool = self.pool.since(trial.since)
        before, after = paired(pool, trial.child, trial.parents)
        by_id = {c.id: c for c in (*population.candidates, *trial.parents)}
        members = list(by_id.values())
        state = self._state(members)
        indices = [list(by_id).index(parent.id) for parent in trial.parents]
        proposal = proposal_of(trial.child, before, after, indices)
        blocks = observed(pool, trial.child, *trial.parents)
        accepted = self.iterations.accepts(trial.child, trial.parents, proposal, state, blocks)
        if accepted:
            self.iterations.add(trial.child, members, self.scores, state, proposal)
        self.events.end_iteration(state, accepted)
        return [trial.child] if accepted else []

    def _state(self, members: Sequence[Candidate]) -> GEPAState:
        rows, objectives = self.scores.rows(members), self.scores.objectives(members)
        return self.iterations.gepa_state(members, rows, objectives)

    def _begin_trial(
        self,
        population: Population,
        trainset: Sequence[dspy.Example],
        cycle: int,
        policy_version: int,
        made: Made | None = None,
    ) -> None:
        """Put a new candidate on trial, one made before or now, if there is one to be had."""
        if self.config.cycle_iterations < 1 or not self.pool.rollouts:
            return
        self.iterations.turn_to_demos()
        state = self._state(population.candidates)
        if self.events.stop(state):
            return
        members = {candidate.id: candidate for candidate in population.candidates}
        make = partial(self._make_child, population, trainset, cycle, policy_version)
        child, reflector, told = made or make()
        self.judge.count(iterations=1)
        self.events.begin_iteration(self.stats.iterations, state, trainset)
        self.iterations.count_reflection(reflector)
        if child is not None and made is not None and not members.keys() >= set(child.parent_ids):
            # A parent has left since, and there would be nothing to compare it with.
            child, reflector, told = make()
            self.iterations.count_reflection(reflector)
        self.events.tell_all(told)
        if child is None:
            self.events.end_iteration(state, accepted=False)
            return
        self._trials += 1
        self._tried = [*self._tried, child.id][-TRIED:]
        parents = tuple(members[parent] for parent in members if parent in child.parent_ids)
        self.trial = Trial(child, parents, policy_version, self.trial_steps)
        if child.source == "merge":
            indices = [list(members).index(parent.id) for parent in parents]
            self.events.merging(indices, child.components)

    def _drop_trial(self, members: Sequence[Candidate]) -> None:
        """Give a trial up that has not begun to run: what it was to show is found out here."""
        self._due = self._asked = None
        if self.trial is not None:
            self.trial = None
            self.events.end_iteration(self._state(members), accepted=False)

    def _ask_ahead(self, cycle: int, policy_version: int) -> None:
        """Have the next candidate made during the next step, where that is the trial's last."""
        waits = getattr(self.proposer, "waits", False)
        if waits and self.trial is not None and self.trial.steps_left == 1:
            self._due = (cycle, policy_version)

    def _take_up(self, population: Population) -> Made | None:
        """The candidate that was due, if one was: made in the meantime, or now."""
        due, asked = self._due, self._asked
        self._due = self._asked = None
        if due is None:
            return None
        return asked.result() if asked else self._make_child(population, self._trainset, *due)

    def _make_child(
        self,
        population: Population,
        trainset: Sequence[dspy.Example],
        cycle: int,
        policy_version: int,
    ) -> Made:
        rng = random.Random(f"{self.seed}|{cycle}|{policy_version}|trial")
        self.judge.remember(population.candidates)
        known = {c.id for c in population.candidates} | set(self._tried)
        reflector = self.memory.reflector(known)
        merging = self._trials % (self.config.cycle_iterations + self.config.merge_iterations)
        child, told = None, list[Told]()
        if merging >= self.config.cycle_iterations:
            means = [populations.mean(row) for row in population.score_K_V]
            child = merge(population.candidates, means, self.judge.ancestors, known, cycle, rng)
        if child is None:
            child = self._reflect(reflector, population, trainset, cycle, rng, told)
        return child, reflector, told

    def _reflect(
        self,
        reflector: Reflector,
        population: Population,
        trainset: Sequence[dspy.Example],
        cycle: int,
        rng: random.Random,
        told: list[Told],
    ) -> Candidate | None:
        """A child of a parent drawn from the front, from the parent's rollouts in the pool."""
        state = self._state(population.candidates)
        k = candidate_selector(self.config, self.strategies, rng).select_candidate_idx(state)
        parent = population.candidates[k]
        examples = self.memory.by_id(trainset)
        rollouts = minibatch(self.pool.of(parent.id), self.config.minibatch_size, rng)
        trajectories = [Trajectory(examples[r.example_id], r) for r in rollouts]
        batch = EvaluationBatch(rollouts, [r.reward for r in rollouts], trajectories)
        texts = dict(parent.components)
        told.append(selected(k, texts, state))
        best = self.config.perfect_score if self.config.skip_perfect_score else None
        perfect = best is not None and all(score >= best for score in batch.scores)
        if not rollouts or perfect:
            reflector.outcomes["empty"] += 1
            return None
        selector = component_selector(self.config, self.strategies)
        names = selector(state, trajectories, batch.scores, k, texts)
        self.iterations.turn += 1
        records = {name: reflector.records(name, trajectories) for name in names}
        told += reflecting(k, texts, names, records)
        changed = reflector.propose(texts, records, names)
        if not changed:
            return None
        told.append(proposed(changed))
        return candidate_of({**texts, **changed}, parent, cycle)
