"""What a new candidate must show to be accepted, and the count of what became of proposals."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gepa.core.state import GEPAState
from gepa.proposer.base import CandidateProposal, SubsampleEvaluation
from gepa.strategies.acceptance import AcceptanceCriterion, ImprovementOrEqualAcceptance

from fst_dspy.fast.proposers.demos import only_fewer
from fst_dspy.student.candidate import DEMOS, split_component
from fst_dspy.types import Candidate

T = TypeVar("T")

ROUNDING = 1e-9
"""By how much two sums of scores may differ, relative to them where they are large, and be equal:
the same tenths give different sums in different orders."""


@dataclass(frozen=True)
class ProposalStats:
    """What became of the iterations so far.

    Attributes:
        iterations: Iterations run, merges included.
        proposals: Children that were tried.
        accepted: Children that did better, and joined the candidates.
        proven: Those of them that did better by more than chance (``fst_dspy.fast.decide``).
        rejected: Children that did not.
        merges: Accepted children that merge two candidates.
        empty: Iterations whose proposer changed nothing, or that found nothing to merge.
        duplicate: Iterations whose proposal there was already.
        errors: Failures of the proposers by kind, those included that a retry or the fallback
            made good.
    """

    iterations: int = 0
    proposals: int = 0
    accepted: int = 0
    proven: int = 0
    rejected: int = 0
    merges: int = 0
    empty: int = 0
    duplicate: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, for JSON."""
        return dataclasses.asdict(self)

    def plus(self, other: ProposalStats) -> ProposalStats:
        """The sum of two counts."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "errors"]
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return ProposalStats(**sums, errors=dict(Counter(self.errors) + Counter(other.errors)))


@dataclass(frozen=True)
class BySums:
    """One of gepa's criteria that compare sums, to which sums that differ by rounding are equal.

    Attributes:
        rule: The criterion.
    """

    rule: AcceptanceCriterion

    def should_accept(self, proposal: CandidateProposal, state: GEPAState) -> bool:
        """Whether the rule accepts a child by its scores and its parent's."""
        before, after = proposal.subsample_scores_before, proposal.subsample_scores_after or []
        if math.isclose(sum(before or ()), sum(after), rel_tol=ROUNDING, abs_tol=ROUNDING):
            proposal = dataclasses.replace(proposal, subsample_scores_before=list(after))
        return self.rule.should_accept(proposal, state)


def criterion_for(
    child: Candidate, parent: Candidate, strict: AcceptanceCriterion
) -> AcceptanceCriterion:
    """gepa's criterion for a child.

    A merge, and a child that only shows fewer demos, need not do better than its parent, but as
    well: gepa's rule for the one, and for the other the shorter prompt is gain enough.
    """
    as_well = child.source == "merge" or shows_fewer(child, parent)
    return BySums(ImprovementOrEqualAcceptance()) if as_well else strict


def proposal_of(
    child: Candidate,
    before: Sequence[Sequence[float]],
    after: Sequence[float],
    parents: Sequence[int] = (),
) -> CandidateProposal:
    """A child and its scores as gepa's criteria take them, against the best of its parents.

    Args:
        child: The candidate that was tried.
        before: The scores of each parent, on the same examples as the child's.
        after: The child's.
        parents: Their indices in gepa's state.
    """
    best = list(max(before, key=sum))
    return CandidateProposal(
        candidate=dict(child.components),
        parent_program_ids=list(parents),
        subsample_scores_before=best,
        subsample_scores_after=list(after),
        eval_before=SubsampleEvaluation(best),
        eval_after=SubsampleEvaluation(list(after)),
        tag=child.source,
    )


def lost_in(proposal: CandidateProposal) -> set[int]:
    """Places in a minibatch where the rollout of the child, or of its parent, was lost.

    None where the proposal comes without rollouts, as from :func:`proposal_of`.
    """
    sides = (side for side in (proposal.eval_before, proposal.eval_after) if side is not None)
    return {i for side in sides for i, rollout in enumerate(side.outputs) if rollout.is_lost}


def without_lost(proposal: CandidateProposal) -> CandidateProposal:
    """The proposal as if its minibatch had been the other examples alone: see :func:`lost_in`."""
    lost = lost_in(proposal)
    if not lost:
        return proposal
    return dataclasses.replace(
        proposal,
        subsample_indices=others(proposal.subsample_indices, lost),
        subsample_scores_before=others(proposal.subsample_scores_before, lost),
        subsample_scores_after=others(proposal.subsample_scores_after, lost),
        eval_before=_without(proposal.eval_before, lost),
        eval_after=_without(proposal.eval_after, lost),
    )


def _without(side: SubsampleEvaluation | None, lost: Collection[int]) -> SubsampleEvaluation | None:
    return side and SubsampleEvaluation(
        scores=others(side.scores, lost),
        outputs=others(side.outputs, lost),
        objective_scores=side.objective_scores and others(side.objective_scores, lost),
        trajectories=side.trajectories and others(side.trajectories, lost),
    )


def others(values: Sequence[T] | None, places: Collection[int]) -> list[T]:
    """The values at all places but these."""
    return [value for i, value in enumerate(values or ()) if i not in places]


def shows_fewer(child: Candidate, parent: Candidate) -> bool:
    """Whether all that changed is that demos were taken away."""
    changed = [n for n, text in child.components.items() if text != parent.components.get(n)]
    return bool(changed) and all(
        split_component(name)[1] == DEMOS
        and only_fewer(child.components[name], parent.components[name])
        for name in changed
    )
