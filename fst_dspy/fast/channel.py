"""The fast channel as the joint loop sees it; see ``phase`` and ``trials`` for its two kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import dspy

from fst_dspy.fast.gepa.events import Events
from fst_dspy.fast.judge import Verdict
from fst_dspy.rollouts.jobs import Runner
from fst_dspy.types import Candidate, Population, Rollout


class FastChannel(Protocol):
    """Improves the population from feedback, and says which candidate a rollout is under."""

    @property
    def reuses(self) -> bool:
        """Whether candidates are scored on the slow phase's rollouts, not on validation ones."""
        ...

    @property
    def events(self) -> Events:
        """Whom it tells what happens, and asks whether to go on."""
        ...

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
        """One fast phase: the population after some iterations.

        Args:
            runner: Runs the rollouts, on channel ``fast``.
            population: Scored on ``valset`` under the current weights.
            trainset: Examples to reflect on, at least one.
            valset: Length V, in the order of ``population.val_ids``.
            cycle: Number of the cycle, part of every seed.
            iterations: GEPA iterations; 0 returns the population as it is.
            policy_version: Optimizer steps taken so far.
            alone: Whether no slow phase follows, so that all it needs to know is to be run here.
            has_room: Asked after each iteration whether there is budget for another.

        Raises:
            DataError: No training examples, or scores that do not belong to ``valset``.
            ConfigError: The candidates hold no instructions to improve.
        """
        ...

    def lineup(
        self, population: Population, group_size: int, problem: str | None = None
    ) -> tuple[Candidate, ...]:
        """The candidate of each of a group's G rollouts in the slow phase.

        Args:
            population: Scored.
            group_size: G.
            problem: Id of the group's example. A candidate whose demos show its answer runs
                without these, as a candidate of another id: copying an answer is nothing to train.
        """
        ...

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
        """Learn from the rollouts of an optimizer step; the population for the next one.

        Args:
            population: The one the rollouts were run with.
            trainset: All training examples.
            rollouts: All of the step. Never validation or test rollouts: what is learned from
                them would be scored on them.
            cycle: Number of the cycle.
            policy_version: Optimizer steps taken, this one included.
            tries: Whether a new candidate may go on trial; one that is on trial stays.
        """
        ...

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
        ...

    def validated(
        self, population: Population, val_ids: Sequence[str], score_V: Sequence[float]
    ) -> None:
        """Hear of a validation, at the end of a cycle; stop callbacks are asked.

        Args:
            population: As it is then.
            val_ids, score_V: Length V, the scores of its best candidate.
        """
        ...

    def end(self, population: Population) -> None:
        """Hear of the end of the run."""
        ...

    def take_verdicts(self) -> list[Verdict]:
        """What became of the children that were tried since the last call, oldest first.

        Asked after every phase and step, so that none is left when the state is saved.
        """
        ...

    def report(self) -> dict[str, Any]:
        """What became of the proposals, and what the reflection LM cost, for JSON."""
        ...

    def state(self) -> dict[str, Any]:
        """All there is to resume from: plain values, and rollouts."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        ...
