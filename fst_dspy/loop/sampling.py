"""The groups of an optimizer step: which problems, which candidates, and their rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import dspy

from fst_dspy.config import SlowConfig
from fst_dspy.fast.channel import FastChannel
from fst_dspy.loop.problems import ProblemStream
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.slow.advantage import by_candidate, without_lost
from fst_dspy.student.candidate import example_id
from fst_dspy.types import Candidate, Group, Population, Rollout


class StepSampler:
    """Samples G rollouts of each of P problems, spread over the candidates.

    Args:
        runner: Runs them.
        fast: Says which candidate each of a group's rollouts is under.
        config: P, G, and how constant groups are dealt with.
        trainset: Where problems come from.
        seed: Of their order.
    """

    def __init__(
        self,
        runner: RolloutRunner,
        fast: FastChannel,
        config: SlowConfig,
        trainset: Sequence[dspy.Example],
        seed: int,
    ) -> None:
        self.runner, self.fast, self.config = runner, fast, config
        self.trainset, self.seed = trainset, seed

    def sample(
        self, population: Population, step: int, stream: ProblemStream, by_reward: bool = True
    ) -> tuple[tuple[Group, ...], dict[str, Candidate], ProblemStream]:
        """The groups of a step.

        Args:
            population: The candidates.
            step: The step that they are for; part of the sampling seed.
            stream: The problems that come next.
            by_reward: Whether groups of equal rewards teach nothing, so that others are drawn.

        Returns:
            The groups, the candidates they ran under by id, and the problems behind them.
        """
        size = self.config.problems_per_step
        revisit = self.config.revisit_constant if by_reward else 1.0
        problems_P, stream = stream.pick(self.trainset, size, self.seed, revisit)
        jobs = self._jobs(problems_P, population)
        rollouts = self.runner.run(jobs, channel="slow", salt=step)
        candidates = {job.candidate.id: job.candidate for job in jobs}
        return self._groups(problems_P, rollouts), candidates, stream

    def _jobs(self, problems_P: Sequence[dspy.Example], population: Population) -> list[RolloutJob]:
        size = self.config.group_size
        return [
            RolloutJob(example, candidate, index)
            for example in problems_P
            for index, candidate in enumerate(
                self.fast.lineup(population, size, example_id(example))
            )
        ]

    def _groups(
        self, problems_P: Sequence[dspy.Example], rollouts: Sequence[Rollout]
    ) -> tuple[Group, ...]:
        """A group shares one advantage: the whole of a problem, or a candidate's part of it."""
        size = self.config.group_size
        groups_P = [
            without_lost(Group(example_id(example), tuple(rollouts[p * size : (p + 1) * size])))
            for p, example in enumerate(problems_P)
        ]
        return tuple(groups_P if self.config.advantage == "problem" else by_candidate(groups_P))
