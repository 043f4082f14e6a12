"""Scores of candidates on fixed examples, and the quadrants that tell the two channels apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import dspy

from fst_dspy.rollouts.jobs import Channel, RolloutJob, Runner
from fst_dspy.types import Candidate, Rollout


@dataclass(frozen=True)
class Evaluation:
    """K candidates on V examples.

    Attributes:
        score_K_V: Mean score of each candidate on each example.
        rollouts_K: For each candidate its rollouts, V x samples of them, example by example.
    """

    score_K_V: tuple[tuple[float, ...], ...]
    rollouts_K: tuple[tuple[Rollout, ...], ...]

    @property
    def mean_K(self) -> tuple[float, ...]:
        """Mean score of each candidate over the examples."""
        return tuple(sum(row) / len(row) for row in self.score_K_V)


@dataclass(frozen=True)
class Quadrants:
    """Mean test scores of base or trained weights under the original or the evolved context.

    Attributes:
        base_original, base_evolved, trained_original, trained_evolved: Mean scores.
        examples: Test examples behind each figure.
    """

    base_original: float
    base_evolved: float
    trained_original: float
    trained_evolved: float
    examples: int


def evaluate(
    runner: Runner,
    candidates: Sequence[Candidate],
    examples: Sequence[dspy.Example],
    *,
    channel: Channel = "eval",
    salt: int = 0,
    samples: int = 1,
    version: str | None = None,
) -> Evaluation:
    """Score candidates at the sampling temperature (paper, section 4: mean@k).

    Args:
        runner: Runs the rollouts.
        candidates: Length K.
        examples: Length V.
        channel: Where the K x V x samples rollouts are counted.
        salt: Tells apart repeated evaluations.
        samples: Rollouts an example; the score is their mean.
        version: The weights to evaluate; ``None`` means the live ones.
    """
    jobs = evaluation_jobs(candidates, examples, samples)
    rollouts = runner.run(jobs, channel=channel, salt=salt, version=version)
    return evaluation_of(rollouts, len(candidates), samples)


def evaluation_jobs(
    candidates: Sequence[Candidate], examples: Sequence[dspy.Example], samples: int = 1
) -> list[RolloutJob]:
    """What is to be run to score candidates: K x V x samples rollouts."""
    return [
        RolloutJob(example, candidate, index)
        for candidate in candidates
        for example in examples
        for index in range(samples)
    ]


def evaluation_of(rollouts: Sequence[Rollout], num_candidates: int, samples: int = 1) -> Evaluation:
    """The scores in the rollouts of ``evaluation_jobs``."""
    width = len(rollouts) // num_candidates
    rows = [tuple(rollouts[k * width : (k + 1) * width]) for k in range(num_candidates)]
    return Evaluation(
        score_K_V=tuple(
            tuple(_mean_of(row[start : start + samples]) for start in range(0, width, samples))
            for row in rows
        ),
        rollouts_K=tuple(rows),
    )


def _mean_of(samples: Sequence[Rollout]) -> float:
    """The mean reward of an example's rollouts, but for lost ones; where all were, they failed."""
    kept = [rollout for rollout in samples if not rollout.is_lost] or samples
    return sum(rollout.reward for rollout in kept) / len(kept)


def quadrants(
    runner: Runner,
    original: Candidate,
    evolved: Candidate,
    testset: Sequence[dspy.Example],
    *,
    base_version: str,
    trained_version: str,
    samples: int = 1,
) -> Quadrants:
    """Evaluate both weights under both contexts, on the channel ``eval``.

    Args:
        runner: Runs 4 x len(testset) x samples rollouts.
        original: The student's own instructions and demos.
        evolved: The best candidate.
        testset: Examples that nothing was learned or chosen on.
        base_version: Version id of the weights before training.
        trained_version: Version id of the weights after it.
        samples: Rollouts an example.
    """
    scores = {
        name: evaluate(
            runner, [original, evolved], testset, samples=samples, version=version
        ).mean_K
        for name, version in (("base", base_version), ("trained", trained_version))
    }
    return Quadrants(
        base_original=scores["base"][0],
        base_evolved=scores["base"][1],
        trained_original=scores["trained"][0],
        trained_evolved=scores["trained"][1],
        examples=len(testset),
    )
