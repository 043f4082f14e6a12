"""Who is accepted, the count of that, and who descends from whom.

To be accepted is to join the population, which claims nothing and sends nobody away: gepa's
criterion, a higher sum than the parent's, is enough for that. Whether it was more than chance
(``fst_dspy.fast.decide``) is counted beside it. To ask it of who joins was tried: small gains, of
which a search lives, are not found then (``docs/decisions.md``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gepa.core.state import GEPAState
from gepa.proposer.base import CandidateProposal
from gepa.strategies.acceptance import AcceptanceCriterion

from fst_dspy.fast.acceptance import ProposalStats, criterion_for
from fst_dspy.fast.decide import Block, better
from fst_dspy.student.candidate import candidate_from_json, candidate_to_json
from fst_dspy.types import Candidate

ANCESTORS = 64
"""Accepted candidates remembered, the latest, so that merges can tell who descends from whom."""


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
            blocks: What was observed of the child and its parents at once.
        """
        criterion = criterion_for(child, parents[0], self.acceptance)
        accepted = criterion.should_accept(proposal, state)
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
        own = getattr(self.acceptance, "reject_reason", None)
        if own is not None:
            return str(own(proposal, state))
        before, after = proposal.subsample_scores_before, proposal.subsample_scores_after
        return f"scores {sum(after or []):g} on the minibatch, its parent {sum(before or []):g}"

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
