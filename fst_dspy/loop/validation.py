"""Validation: the fast weights scored under the slow ones, and the best pair of both.

With ``val_samples`` above 1 an example is sampled again as long as it is open how the pair compares
with the highest so far; that is looked at once all examples have one sample more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fst_dspy.fast import population as populations
from fst_dspy.fast.decide import LIKELY, better, share, worse
from fst_dspy.fast.population import blocks_of, mean
from fst_dspy.loop.parts import Parts
from fst_dspy.loop.state import LoopState
from fst_dspy.model.divergence import format_share, kl_to_base, spread_calls
from fst_dspy.results.result import Best
from fst_dspy.rollouts.evaluate import Evaluation, evaluate, evaluation_jobs, evaluation_of
from fst_dspy.rollouts.health import check_first_rollouts, check_objectives
from fst_dspy.rollouts.jobs import Channel
from fst_dspy.types import Candidate, Population, Rollout

KL_TOKENS = 32_768
"""Prompt and completion tokens of the validation calls that the KL to the base model is measured
on. Their hidden states are held while the base is in the model, which is swapped in once."""

FORMAT_TOKENS = 8_192
"""Likewise, of those that the share of the format is measured on."""


@dataclass(frozen=True)
class Validation:
    """The population with its scores of now, and those of its best candidate.

    Attributes:
        score_V, val_score: Of the best candidate, by example and their mean.
        kl_to_base: Of the weights, on the best candidate's calls, nats a token.
        rollouts: Of the best candidate, where it was scored just now.
        format_share: See ``CycleRecord.format_share``.
    """

    population: Population
    score_V: tuple[float, ...]
    val_score: float
    kl_to_base: float
    rollouts: tuple[Rollout, ...] = ()
    format_share: float | None = None


def score(parts: Parts, state: LoopState) -> Validation:
    """Score the population on the validation examples, where its scores are not of now.

    Where slow rollouts are reused, they have scored the population; what is left to validate is
    its best candidate. Else all are scored, and the next front is made of it.

    Raises:
        MetricError, ProgramError: The first validation shows that nothing can be learned.
    """
    population, step = state.population, parts.policy.step
    last = state.records[-1] if state.records else None
    kl, kept = (last.kl_to_base, last.format_share) if last else (0.0, None)
    first, best_only = not state.records, bool(state.records) and parts.fast.reuses
    best_k = 0 if first else populations.best(population)
    if not (first or best_only or population.policy_version != step):
        score_V = population.score_K_V[best_k]
        return Validation(population, score_V, mean(score_V), kl, format_share=kept)
    if best_only and is_scored(parts, state, population):
        score_V = state.evidence[-1].score_V
        return Validation(population, score_V, mean(score_V), kl, format_share=kept)
    if best_only:
        candidate = population.candidates[best_k]
        scored = _until_clear(parts, candidate, state.peak_V, _channel(parts), step)
    else:
        scored = scored_now(parts, population.candidates)
        population = replace(
            population,
            score_K_V=scored.score_K_V,
            policy_version=step,
            objective_K_V=scored.objective_K_V,
        )
    k = 0 if best_only else populations.best(population)
    if first:
        check_first_rollouts(scored.rollouts_K[k], parts.runner.program)
        if parts.fast_on and parts.config.fast.frontier_type != "instance":
            check_objectives(scored.rollouts_K[k], parts.config.fast.frontier_type)
        if not parts.fast_on:  # weights learn under one prompt, and the others are not scored again
            rows, ids = population.score_K_V, population.val_ids
            population = populations.choose(population.candidates, rows, ids, 1, step)
    return _measured(parts, population, scored, k)


def scored_now(parts: Parts, candidates: Sequence[Candidate]) -> Evaluation:
    """Some candidates scored on the validation examples, under the weights as they are."""
    return evaluate(
        parts.runner,
        candidates,
        parts.valset,
        channel=_channel(parts),
        salt=parts.policy.step,
        samples=parts.config.sampling.val_samples,
    )


def with_better(
    parts: Parts, found: Validation, candidate: Candidate, own: Evaluation
) -> Validation:
    """A validation with one more candidate, which was scored by itself and is the best.

    Args:
        own: Its scores alone.
    """
    before = found.population
    population = replace(
        before,
        candidates=(*before.candidates, candidate),
        score_K_V=(*before.score_K_V, *own.score_K_V),
        objective_K_V=(*before.objective_K_V, *own.objective_K_V),
    )
    return _measured(parts, population, own, 0)


def _channel(parts: Parts) -> Channel:
    return "fast" if parts.fast_on and not parts.fast.reuses else "eval"


def _measured(parts: Parts, population: Population, scored: Evaluation, k: int) -> Validation:
    """A validation by its best candidate, the ``k``-th of those that were scored."""
    policy, seed, rollouts = parts.policy, parts.spec.seed, scored.rollouts_K[k]
    kl = 0.0
    if policy.step > 0 or parts.lm.version != policy.base_version:
        kl = kl_to_base(policy, spread_calls(rollouts, KL_TOKENS, seed))
    share = format_share(policy, spread_calls(rollouts, FORMAT_TOKENS, seed))
    return Validation(population, scored.score_K_V[k], scored.mean_K[k], kl, rollouts, share)


def is_scored(parts: Parts, state: LoopState, population: Population) -> bool:
    """Whether the last cycle has validated the best candidate under the weights as they are.

    The same rollouts would be run again: their seeds are of the candidate and the step.
    """
    if not state.evidence:
        return False
    last, best = state.records[-1], population.candidates[populations.best(population)]
    # Not by steps: some move nothing, and the policy counts those that did.
    return last.best_candidate_id == best.id and last.weights_version == parts.policy.version()


def _until_clear(
    parts: Parts, candidate: Candidate, peak_V: Sequence[float], channel: Channel, salt: int
) -> Evaluation:
    """Score a candidate with one sample an example after another; those that ``evaluate`` takes.

    It ends where the scores are clearly above or below ``peak_V``, at a rate of ``decide.LEVEL``
    for all looks together, or after ``val_samples`` of them.
    """
    samples, passes = parts.config.sampling.val_samples, list[Sequence[Rollout]]()
    jobs = evaluation_jobs([candidate], parts.valset, samples)
    for index in range(samples):
        passes.append(parts.runner.run(jobs[index::samples], channel=channel, salt=salt))
        rollouts = [rollout for own in zip(*passes, strict=True) for rollout in own]
        scored = evaluation_of(rollouts, 1, len(passes))
        blocks, level = blocks_of(scored.score_K_V[0], peak_V), share(2 * samples)
        if better(blocks, level) or worse(blocks, level):
            break
    return scored


def better_of(parts: Parts, state: LoopState, found: Validation, cycle: int) -> Best:
    """The latest (weights, candidate) that is not likely worse than the highest score.

    The highest of many noisy scores is luck as often as skill, and the later pair has learned
    more: of two equals the later is kept, but for ``decide.LIKELY`` of cases. The weights of the
    pair are kept, those of the one before are let go.
    """
    best, policy = state.best, parts.policy
    if best is not None and worse(blocks_of(found.score_V, state.peak_V), LIKELY):
        return best
    candidate = found.population.candidates[populations.best(found.population)]
    version = policy.keep()
    if best is not None and best.version not in (version, parts.lm.version):
        policy.forget(best.version)
    return Best(version, candidate, found.val_score, cycle)
