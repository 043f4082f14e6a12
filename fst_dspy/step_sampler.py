"""The groups of an optimizer step: which problems, which candidates, and their rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import dspy

from fst_dspy.advantage import by_candidate, constant_group_share
from fst_dspy.ahead import Attempts, as_saved
from fst_dspy.candidate import example_id
from fst_dspy.config import SlowConfig
from fst_dspy.evaluate import Evaluation, evaluation_jobs, evaluation_of
from fst_dspy.fast import FastPhase
from fst_dspy.policy import Policy
from fst_dspy.problems import ProblemStream
from fst_dspy.rollout import Channel, RolloutBatch, RolloutJob, RolloutRunner
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
        fast: FastPhase,
        config: SlowConfig,
        trainset: Sequence[dspy.Example],
        seed: int,
    ) -> None:
        self.runner, self.fast, self.config = runner, fast, config
        self.trainset, self.seed = trainset, seed

    def sample(
        self,
        population: Population,
        step: int,
        stream: ProblemStream,
        policy: Policy | None = None,
    ) -> tuple[Attempts, ProblemStream]:
        """The groups of a step; others in their place while all of them are constant.

        Args:
            population: The candidates.
            step: The step that they are for; part of the sampling seed.
            stream: The problems that come next.
            policy: A copy of the policy, to sample from in its place.

        Returns:
            The groups, and the problems behind them.
        """
        attempts: Attempts = ()
        for attempt in range(self.config.resample_constant + 1):
            problems_P, stream = self._pick(stream)
            jobs = self._jobs(problems_P, population, attempt)
            rollouts = self.runner.run(jobs, channel="slow", salt=step, policy=policy)
            groups_P = self._groups(problems_P, rollouts)
            attempts = (*attempts, groups_P)
            if constant_group_share(groups_P) < 1:
                break
        return attempts, stream

    def sample_and_score(
        self,
        population: Population,
        step: int,
        stream: ProblemStream,
        candidates: Sequence[Candidate],
        valset: Sequence[dspy.Example],
        channel: Channel,
    ) -> tuple[Attempts, ProblemStream, Evaluation]:
        """The groups of a step, and in the same batches the scores of candidates.

        Both are of the weights as they are now. For ``resample_constant=0`` only.

        Args:
            population, step, stream: As for ``sample``.
            candidates, valset, channel: As for ``evaluate``; its salt is the policy's step.

        Returns:
            The groups, as a resumed run would read them from a checkpoint, the problems behind
            them, and the scores.
        """
        problems_P, stream = self._pick(stream)
        scoring = evaluation_jobs(candidates, valset)
        scored, sampled = self.runner.run_together(
            [
                RolloutBatch(scoring, channel, salt=self.runner.policy.step),
                RolloutBatch(self._jobs(problems_P, population), "slow", salt=step),
            ]
        )
        attempts = as_saved((self._groups(problems_P, sampled),))
        return attempts, stream, evaluation_of(scored, len(candidates))

    def _pick(self, stream: ProblemStream) -> tuple[list[dspy.Example], ProblemStream]:
        size, revisit = self.config.problems_per_step, self.config.revisit_constant
        return stream.pick(self.trainset, size, self.seed, revisit)

    def _jobs(
        self, problems_P: Sequence[dspy.Example], population: Population, attempt: int = 0
    ) -> list[RolloutJob]:
        size = self.config.group_size
        candidates_G = self.fast.lineup(population, size)
        return [
            RolloutJob(example, candidate, index)
            for example in problems_P
            for index, candidate in enumerate(candidates_G, start=attempt * size)
        ]

    def _groups(
        self, problems_P: Sequence[dspy.Example], rollouts: Sequence[Rollout]
    ) -> tuple[Group, ...]:
        """A group shares one advantage: the whole of a problem, or a candidate's part of it."""
        size = self.config.group_size
        groups_P = [
            Group(example_id(example), tuple(rollouts[p * size : (p + 1) * size]))
            for p, example in enumerate(problems_P)
        ]
        return tuple(groups_P if self.config.advantage == "problem" else by_candidate(groups_P))
