"""Measures that ask the model: drift and entropy on held-out prompts, and forgetting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import dspy
from rich.console import Console
from rich.progress import track

from fst_dspy.bundle.manifest import is_bundle, read_manifest
from fst_dspy.bundle.weights import made_live, read_run, read_weights
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ConfigError, DataError
from fst_dspy.files import path_given
from fst_dspy.lm.local_lm import LocalLM
from fst_dspy.measures.statistics import (
    Interval,
    MeanAtK,
    mean_at_k,
    mean_interval,
    scores_by_example,
)
from fst_dspy.model.divergence import kl_to_base, token_entropy
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import calls_of
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import INSTRUCTIONS, component_name, make_candidate, predictor_names
from fst_dspy.student.modules import every_predictor
from fst_dspy.types import Candidate, Task

Weights = LocalLM | str | os.PathLike[str]
"""A ``LocalLM`` at the version it names, or the folder of a bundle or of a finished run."""


@dataclass(frozen=True)
class Drift:
    """What a policy does on held-out prompts, exact over the vocabulary at every sampled token.

    Attributes:
        kl_to_base: KL(policy || base), nats a token.
        entropy: Entropy of the policy, nats a token.
        tokens: Completion tokens that both are means over.
    """

    kl_to_base: float
    entropy: float
    tokens: int


@dataclass(frozen=True)
class Forgetting:
    """What training did to a task that it was not about.

    Attributes:
        task: Its name.
        before, after: mean@k on its test set, under its ideal instructions.
        change: After minus before, paired by example; below 0 means forgetting.
    """

    task: str
    before: MeanAtK
    after: MeanAtK
    change: Interval


def held_out_drift(
    runner: RolloutRunner,
    candidate: Candidate,
    examples: Sequence[dspy.Example],
    *,
    version: str | None = None,
    samples: int = 1,
) -> Drift:
    """KL to the base and entropy on held-out prompts (paper, section 4: token-level drift).

    Completions are sampled from the policy on channel ``eval``; at each of their tokens the sums
    over the vocabulary are exact. The base is the runner's policy as it was loaded: a bundle with
    all weights in it is its own base, so measure a run's folder or a live policy instead. Not while
    a trainer holds the policy, whose weights are swapped.

    Args:
        runner: Runs ``len(examples) * samples`` rollouts.
        candidate: The texts of the prompts.
        examples: Held out: nothing was learned on them.
        version: The weights to measure; ``None`` means the live ones.
        samples: Rollouts an example.

    Raises:
        DataError: There are no examples, or no completion was sampled.
        ModelError: The version is not at hand.
    """
    if not examples or samples < 1:
        raise DataError("drift needs at least one held-out example, sampled at least once")
    policy = runner.policy
    scored = evaluate(runner, [candidate], examples, samples=samples, version=version)
    calls = calls_of(scored.rollouts_K[0])
    # Only now: rollouts generate in threads of their own, which would wait for this one's lock.
    with policy.lock, made_live(policy, version or policy.version()):
        return Drift(
            kl_to_base=kl_to_base(policy, calls),
            entropy=token_entropy(policy, calls),
            tokens=sum(len(call.completion_ids_T) for call in calls),
        )


def forgetting(
    tasks: Sequence[Task],
    before: Weights,
    after: Weights,
    *,
    base: str | os.PathLike[str] | None = None,
    samples: int = 4,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> tuple[Forgetting, ...]:
    """Scores on other tasks under their ideal instructions, before and after training.

    Under the ideal instruction there is nothing left to learn about the task: what is lost is the
    model's skill at following it. Both weights draw the same random numbers.

    Args:
        tasks: Tasks that were not trained on, with ``ideal_instructions`` and a test set. Their
            predictors with a ``LocalLM`` are run on the weights; another LM is left as it is.
        before, after: The weights compared: a ``LocalLM``, or the folder of a bundle or a finished
            run, whose best weights are taken.
        base: For folders that need it, the model that was trained, as for ``fst_dspy.load``.
        samples: k of mean@k.
        sampling: Temperature and limits; the defaults are the training's.
        seed: Of the sampling.

    Returns:
        One result a task, in order; ``2 * samples * len(testset)`` rollouts each.

    Raises:
        DataError: A task without ideal instructions or test set, or ``samples`` below 1.
        ConfigError: Ideal instructions that do not name the program's predictors.
        StoreError, ModelError: A folder that cannot be read, or whose base model is missing.
    """
    if samples < 1:
        raise DataError(f"samples must be at least 1, got {samples}")
    candidates = [ideal_candidate(task) for task in tasks]
    for task in tasks:
        if not task.testset:
            raise DataError(f"the task {task.name!r} has no test set to measure forgetting on")
    lms = [_lm_of(weights, base) for weights in (before, after)]
    console = Console(stderr=True)
    shown = console.is_terminal or console.is_jupyter
    found = []
    for task, candidate in track(
        list(zip(tasks, candidates, strict=True)),
        description="forgetting",
        console=console,
        transient=True,
        disable=not shown,
    ):
        program = _without_local_lms(task.program)
        scored = [
            evaluate(
                RolloutRunner(program, task.metric, lm, sampling or SamplingConfig(), seed),
                [candidate],
                task.testset,
                samples=samples,
                version=lm.version,
            )
            for lm in lms
        ]
        first_V, last_V = (evaluation.score_K_V[0] for evaluation in scored)
        first, last = (
            mean_at_k([scores_by_example(evaluation.rollouts_K[0])]) for evaluation in scored
        )
        change = mean_interval(b - a for a, b in zip(first_V, last_V, strict=True))
        found.append(Forgetting(task=task.name, before=first, after=last, change=change))
    return tuple(found)


def ideal_candidate(task: Task) -> Candidate:
    """The fast weights that state all there is to know about a task; demos stay the program's own.

    Raises:
        DataError: The task has no ideal instructions.
        ConfigError: They do not name the program's predictors.
    """
    if not task.ideal_instructions:
        raise DataError(f"the task {task.name!r} states no ideal_instructions")
    unknown = sorted(set(task.ideal_instructions) - set(predictor_names(task.program)))
    if unknown:
        raise ConfigError(
            f"ideal_instructions of {task.name!r} name {unknown}, but its predictors are "
            f"{list(predictor_names(task.program))}"
        )
    return make_candidate(
        {component_name(name, INSTRUCTIONS): text for name, text in task.ideal_instructions.items()}
    )


def _lm_of(weights: Weights, base: str | os.PathLike[str] | None) -> LocalLM:
    if isinstance(weights, LocalLM):
        return weights
    path, where = path_given(weights), os.fspath(base) if base is not None else None
    if is_bundle(path):
        return LocalLM(read_weights(path, read_manifest(path), where))
    return LocalLM(read_run(path, where))


def _without_local_lms(program: dspy.Module) -> dspy.Module:
    bare = program.deepcopy()
    for predictor in every_predictor(bare).values():
        if isinstance(predictor.lm, LocalLM):
            predictor.lm = None
    return bare
