"""Who is accepted, the count of that, and who descends from whom.

To be accepted is to join the population, which claims nothing and sends nobody away: gepa's
criterion, a higher sum than the parent's, is enough for that. Whether it was more than chance
(``fst_dspy.fast.decide``) is counted beside it. To ask it of who joins was tried: small gains, of
which a search lives, are not found then (``docs/decisions.md``). But a child that has not run on
anything beside its parent does not join, whatever the criterion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gepa.core.state import GEPAState
from gepa.proposer.base import CandidateProposal
from gepa.strategies.acceptance import AcceptanceCriterion

from fst_dspy.fast.acceptance import (
    ProposalStats,
    criterion_for,
    lost_in,
    others,
    without_lost,
)
from fst_dspy.fast.decide import Block, better
from fst_dspy.student.candidate import candidate_from_json, candidate_to_json
from fst_dspy.types import Candidate, Rollout

ANCESTORS = 64
"""Accepted candidates remembered, the latest, so that merges can tell who descends from whom."""


@dataclass(frozen=True)
class Verdict:
    """What became of a child that was tried.

    Attributes:
        child: Its texts, parents and cycle.
        iteration: Of all iterations so far, counted from 1, the one that proposed it.
        accepted: Whether it joined the candidates.
        reason: Why, or why not, in a few words.
        before, after: Scores of the better parent and the child, on the same examples.
        changed: The texts that are not its first parent's, by component.
        answers: Its rollouts on the validation examples, where it was scored on them at once.
        known: Then, the rollouts of all channels by then, and the highest mean score of a candidate
            on these examples by then.
    """

    child: Candidate
    iteration: int
    accepted: bool
    reason: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    changed: Mapping[str, str]
    answers: tuple[Rollout, ...] = ()
    known: tuple[int, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the run folder: plain values, with the texts that changed alone."""
        return {
            "cycle": self.child.cycle,
            "iteration": self.iteration,
            "id": self.child.id,
            "parent_ids": list(self.child.parent_ids),
            "source": self.child.source,
            "components": dict(self.changed),
            "accepted": self.accepted,
            "reason": self.reason,
            "before": list(self.before),
            "after": list(self.after),
        }


class Judge:
    """Accepts children or not, and remembers those it accepted.

    Args:
        acceptance: gepa's criterion for a child, by its scores and its parent's on a minibatch.

    Attributes:
        stats: What became of all iterations so far.
        ancestors: The candidates it was told of and those it accepted, the latest, by id.
    """

    def __init__(self, acceptance: AcceptanceCriterion) -> None:
        self.acceptance = acceptance
        self.stats = ProposalStats()
        self.ancestors: dict[str, Candidate] = {}
        self._verdicts: list[Verdict] = []

    def accepts(
        self,
        child: Candidate,
        parents: Sequence[Candidate],
        proposal: CandidateProposal,
        state: GEPAState,
        blocks: Sequence[Block],
    ) -> bool:
        """Whether the criterion accepts the child; it is counted, and remembered if so.

        Args:
            child: The candidate that was tried.
            parents: What it was made from, at least one.
            proposal: Its scores and its parents', as gepa's criteria take them.
            state: gepa's, with the parents among its candidates.
            blocks: What was observed of the child and its parents at once; of a minibatch, an
                example each.
        """
        blocks, proposal = others(blocks, lost_in(proposal)), without_lost(proposal)
        criterion = criterion_for(child, parents[0], self.acceptance)
        seen = bool(proposal.subsample_scores_after)
        accepted = seen and criterion.should_accept(proposal, state)
        texts, first = child.components, parents[0].components
        verdict = Verdict(
            child,
            self.stats.iterations,
            accepted,
            _why(proposal, criterion is self.acceptance)
            if accepted
            else self.reason(proposal, state),
            tuple(proposal.subsample_scores_before or ()),
            tuple(proposal.subsample_scores_after or ()),
            {name: text for name, text in texts.items() if text != first.get(name)},
        )
        self._verdicts.append(verdict)
        self.count(
            proposals=1,
            accepted=int(accepted),
            proven=int(accepted and better(blocks)),
            rejected=int(not accepted),
            merges=int(accepted and child.source == "merge"),
        )
        if accepted:
            self.remember([child])
        return accepted

    def reason(self, proposal: CandidateProposal, state: GEPAState) -> str:
        """Why a child was not accepted: what the criterion says, or its scores."""
        proposal = without_lost(proposal)
        if not proposal.subsample_scores_after:
            return "no example on which both it and its parent have run"
        own = getattr(self.acceptance, "reject_reason", None)
        if own is not None:
            return str(own(proposal, state))
        return _scores(proposal)

    def scored(self, rollouts: Sequence[Rollout], known: tuple[int, float]) -> None:
        """Keep the latest child's rollouts on the validation examples with its verdict.

        Arguments are the verdict's ``answers`` and ``known``.
        """
        self._verdicts[-1] = replace(self._verdicts[-1], answers=tuple(rollouts), known=known)

    def take_verdicts(self) -> list[Verdict]:
        """The verdicts since the last call, oldest first."""
        taken, self._verdicts = self._verdicts, []
        return taken

    def count(self, **counts: Any) -> None:
        """Add to the fields of ``stats``."""
        self.stats = self.stats.plus(ProposalStats(**counts))

    def remember(self, candidates: Iterable[Candidate]) -> None:
        """Keep candidates as ancestors."""
        for candidate in candidates:
            self.ancestors.setdefault(candidate.id, candidate)
        while len(self.ancestors) > ANCESTORS:
            del self.ancestors[next(iter(self.ancestors))]

    def state(self) -> dict[str, Any]:
        """The counts and ancestors, for JSON."""
        return {
            "stats": self.stats.to_dict(),
            "ancestors": [candidate_to_json(c) for c in self.ancestors.values()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`state` gave."""
        self.stats = ProposalStats(**state["stats"])
        self.remember(map(candidate_from_json, state["ancestors"]))


def _scores(proposal: CandidateProposal) -> str:
    before, after = proposal.subsample_scores_before or [], proposal.subsample_scores_after or []
    return f"scores {sum(after):g} on {len(after)} examples, its parent {sum(before):g}"


def _why(proposal: CandidateProposal, by_rule: bool) -> str:
    """Why a child was accepted: by the criterion, or as one that need only do as well."""
    also = "" if by_rule else "; as well is enough for a merge, and for fewer demos"
    return _scores(proposal) + also
