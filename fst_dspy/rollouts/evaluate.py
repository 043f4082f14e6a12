"""Scores of candidates on fixed examples, and the quadrants that tell the two channels apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import dspy

from fst_dspy.rollouts.inputs import checked_examples
from fst_dspy.rollouts.jobs import Channel, RolloutJob, Runner
from fst_dspy.types import Candidate, Rollout


@dataclass(frozen=True)
class Evaluation:
    """K candidates on V examples.

    Attributes:
        score_K_V: Mean score of each candidate on each example.
        rollouts_K: For each candidate its rollouts, V x samples of them, example by example.
        objective_K_V: Means by objective, likewise; empty where the metric gives none.
    """

    score_K_V: tuple[tuple[float, ...], ...]
    rollouts_K: tuple[tuple[Rollout, ...], ...]
    objective_K_V: tuple[tuple[Mapping[str, float], ...], ...] = ()

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
        scores: The score of each example, in the order of the test set, by the names above.
    """

    base_original: float
    base_evolved: float
    trained_original: float
    trained_evolved: float
    examples: int
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)


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

    Raises:
        DataError: There are no examples, or things that are none, or without inputs set.
    """
    examples = checked_examples("set of examples", examples)
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
    names = objectives_in(rollouts)
    cells_K_V = [
        [_kept(row[start : start + samples]) for start in range(0, width, samples)] for row in rows
    ]
    return Evaluation(
        score_K_V=tuple(tuple(_mean(cell) for cell in row) for row in cells_K_V),
        rollouts_K=tuple(rows),
        objective_K_V=tuple(
            tuple({name: _mean(cell, name) for name in names} for cell in row) for row in cells_K_V
        )
        if names
        else (),
    )


def objectives_in(rollouts: Iterable[Rollout]) -> list[str]:
    """Names of the objectives that the metric has scored in some of the rollouts, sorted."""
    return sorted({name for rollout in rollouts for name in rollout.objective_scores})


def score_of(rollout: Rollout, objective: str | None = None) -> float:
    """A rollout's reward, or its score for an objective.

    One that the metric could not score has its reward, the failure score, for every objective.
    """
    if objective is None:
        return rollout.reward
    return rollout.objective_scores.get(objective, rollout.reward)


def _kept(samples: Sequence[Rollout]) -> Sequence[Rollout]:
    """An example's rollouts, but for lost ones; where all were, they failed."""
    return [rollout for rollout in samples if not rollout.is_lost] or samples


def _mean(rollouts: Sequence[Rollout], objective: str | None = None) -> float:
    return sum(score_of(rollout, objective) for rollout in rollouts) / len(rollouts)


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

    Raises:
        DataError: There are no examples, or things that are none, or without inputs set.
    """
    testset = checked_examples("testset", testset)
    scores: dict[str, tuple[float, ...]] = {}
    for name, version in (("base", base_version), ("trained", trained_version)):
        found = evaluate(runner, [original, evolved], testset, samples=samples, version=version)
        scores[f"{name}_original"], scores[f"{name}_evolved"] = found.score_K_V
    means = {name: sum(score_V) / len(score_V) for name, score_V in scores.items()}
    return Quadrants(**means, examples=len(testset), scores=scores)
