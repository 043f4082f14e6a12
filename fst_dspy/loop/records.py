"""Records of what the joint loop did: of a step, of a cycle, of the whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from fst_dspy.fast.population import best, mean
from fst_dspy.loop.parts import Parts
from fst_dspy.loop.share import Decision
from fst_dspy.loop.state import LoopState
from fst_dspy.loop.validation import Validation
from fst_dspy.model.hardware import peak_memory
from fst_dspy.results.result import FSTResult
from fst_dspy.slow.advantage import constant_group_share
from fst_dspy.types import CycleRecord, Group, Rollout, StepRecord, StepStats


def step_record(cycle: int, step: int, groups_P: Sequence[Group], stats: StepStats) -> StepRecord:
    """The record of an optimizer step on the groups of P problems."""
    rollouts = rollouts_of(groups_P)
    return StepRecord(
        cycle=cycle,
        step=step,
        reward=mean([rollout.reward for rollout in rollouts]),
        constant_group_share=constant_group_share(groups_P),
        failures=dict(Counter(r.failure.kind for r in rollouts if r.failure is not None)),
        rollouts=len(rollouts),
        stats=stats,
    )


def cycle_record(
    parts: Parts,
    state: LoopState,
    cycle: int,
    found: Validation,
    seconds: Mapping[str, float],
    decision: Decision,
) -> CycleRecord:
    """The record of a cycle, once it is validated.

    Args:
        parts, state: The state is that of before the validation.
        cycle: The number of the cycle, 0 for the student as it came.
        found: What the validation found.
        seconds: Wall time so far, by channel.
        decision: On the next cycle.
    """
    steps, population, counts = state.steps, found.population, parts.runner.counts
    last = state.records[-1] if state.records else None
    tally = parts.runner.tally
    return CycleRecord(
        cycle=cycle,
        step=state.step,
        candidate_ids=tuple(c.id for c in population.candidates),
        best_candidate_id=population.candidates[best(population)].id,
        train_reward=mean([step.reward for step in steps]) if steps else None,
        val_score=found.val_score,
        val_scores=tuple(mean(score_V) for score_V in population.score_K_V),
        kl_to_base=found.kl_to_base,
        entropy=mean([step.stats.entropy for step in steps]) if steps else None,
        constant_group_share=mean([step.constant_group_share for step in steps]),
        failure_shares=tally.shares,
        rollouts=counts.minus(last.total_rollouts) if last else counts,
        total_rollouts=counts,
        tokens=dict(parts.runner.tokens),
        seconds=dict(seconds),
        weights_version=parts.policy.version(),
        proposals=parts.fast.report(),
        failure_messages=dict(tally.messages),
        early_batches=parts.runner.early_batches,
        format_share=found.format_share,
        cold_start=state.cold_start,
        turns=parts.runner.turns,
        share=state.evidence[-1].channels,
        decided=decision.words,
        ended=decision.over,
        peak_memory=peak_memory(parts.policy.device),
        early_scores=state.early_scores,
        lessons=_lessons(steps),
        reward_range=None if tally.low is None or tally.high is None else (tally.low, tally.high),
    )


def _lessons(steps: Sequence[StepRecord]) -> dict[str, int]:
    """The calls of some steps by what they taught; see ``CycleRecord.lessons``."""
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.stats.untaught)
        total["taught"] += step.stats.taught
    return {what: count for what, count in total.items() if count}


def result_of(parts: Parts, state: LoopState) -> FSTResult:
    """What the run did and found, once its loop has ended."""
    assert state.best is not None
    return FSTResult(
        arm=parts.spec.arm,
        seed=parts.spec.seed,
        config=parts.config,
        records=state.records,
        population=state.population,
        best=state.best,
        seed_candidate=parts.seed_candidate,
        base_version=parts.policy.base_version,
        weights_version=parts.policy.version(),
        log_dir=str(parts.folder.path) if parts.folder is not None else None,
        structured=parts.runner.structured,
    )


def rollouts_of(groups_P: Sequence[Group]) -> list[Rollout]:
    """All rollouts of some groups, in order."""
    return [rollout for group in groups_P for rollout in group.rollouts_G]
