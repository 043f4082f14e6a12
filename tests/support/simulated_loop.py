"""The joint loop around scripted rollouts: both ways of the fast channel at the cost of none.

What the optimizer does in a cycle, without a model: the fast phase, T steps of groups, validation
of the best candidate. Weights that learn are a number that rises with every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dspy
from records import make_rollout

from fst_dspy.fast import population as populations
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.trials import TrialPhase
from fst_dspy.loop.problems import ProblemStream
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import example_id
from fst_dspy.types import Candidate, Population, PredictorTrace, Rollout, RolloutCounts

Reward = Callable[[dspy.Example, Candidate, int, random.Random], tuple[float, str]]
"""(example, candidate, optimizer steps, random numbers) -> reward and feedback."""


class ScriptedRunner:
    """Rollouts by a function: reproducible, counted like the real ones."""

    def __init__(self, reward: Reward, seed: int) -> None:
        self.reward, self.seed = reward, seed
        self.step = 0
        self.counts = RolloutCounts()

    def run(
        self, jobs: Sequence[RolloutJob], *, channel: str, salt: int, version: str | None = None
    ) -> list[Rollout]:
        self.counts = self.counts.plus(RolloutCounts(**{channel: len(jobs)}))
        return [self.rollout(job, f"{channel}|{salt}|{number}") for number, job in enumerate(jobs)]

    def rollout(self, job: RolloutJob, salt: str) -> Rollout:
        ident = example_id(job.example)
        rng = random.Random(f"{self.seed}|{salt}|{ident}|{job.candidate.id}|{job.index}")
        reward, feedback = self.reward(job.example, job.candidate, self.step, rng)
        inputs = job.example.inputs().toDict()
        trace = PredictorTrace("solve", inputs, job.example.labels().toDict(), "")
        return make_rollout(
            reward,
            example_id=ident,
            candidate_id=job.candidate.id,
            traces=(trace,),
            feedback=feedback,
            policy_version=self.step,
        )


@dataclass(frozen=True)
class Loop:
    """What a simulated run came to."""

    best: Candidate
    population: Population
    counts: RolloutCounts
    after_first: RolloutCounts


def simulate(
    phase: FastPhase | TrialPhase,
    runner: ScriptedRunner,
    seed_candidate: Candidate,
    trainset: Sequence[dspy.Example],
    valset: Sequence[dspy.Example],
    *,
    cycles: int = 6,
    steps: int = 6,
    group_size: int = 8,
    problems: int = 8,
    after: Callable[[Any], Any] = lambda phase: phase,
) -> Loop:
    """Run the loop; ``after`` may replace the phase between steps, as a resume does."""
    val_ids = tuple(example_id(example) for example in valset)
    population = Population((seed_candidate,), val_ids, (), 0)
    channel: Any = "eval" if phase.reuses else "fast"
    scored = evaluate(runner, population.candidates, valset, channel=channel, salt=-1)
    population = replace(population, score_K_V=scored.score_K_V)
    first, stream = RolloutCounts(), ProblemStream()
    best: tuple[float, Candidate] = (-1.0, seed_candidate)
    for cycle in range(1, cycles + 1):
        fast = phase.config
        population = phase.run(
            runner,
            population,
            trainset,
            valset,
            cycle=cycle,
            iterations=fast.first_cycle_iterations if cycle == 1 else fast.cycle_iterations,
            policy_version=runner.step,
        )
        for _ in range(steps):
            lineup = phase.lineup(population, group_size)
            picked, stream = stream.pick(trainset, problems, runner.seed, 1.0)
            jobs = [
                RolloutJob(example, candidate, index)
                for example in picked
                for index, candidate in enumerate(lineup)
            ]
            rollouts = runner.run(jobs, channel="slow", salt=runner.step)
            runner.step += 1
            population = phase.after_step(
                population, trainset, rollouts, cycle=cycle, policy_version=runner.step
            )
            phase = after(phase)
        if phase.reuses:
            candidate = population.candidates[populations.best(population)]
            scored = evaluate(runner, [candidate], valset, channel="eval", salt=runner.step)
            val = scored.mean_K[0]
        else:
            scored = evaluate(
                runner, population.candidates, valset, channel="fast", salt=runner.step
            )
            population = replace(population, score_K_V=scored.score_K_V, policy_version=runner.step)
            candidate = population.candidates[populations.best(population)]
            val = scored.mean_K[populations.best(population)]
        best = max(best, (val, candidate), key=lambda pair: pair[0])
        first = runner.counts if cycle == 1 else first
    return Loop(best[1], population, runner.counts, runner.counts.minus(first))
