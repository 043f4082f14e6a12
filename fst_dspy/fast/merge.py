"""Merge: a child with the best of two candidates that improved different components (GEPA).

The crossover itself is gepa's (``gepa.proposer.merge``): two candidates, neither an ancestor of
the other, with a common ancestor that neither falls behind. Each component is taken from the one
that changed it. gepa's ``MergeProposer`` is not used whole: it needs the ancestor's score under
the current weights, and it runs rollouts of its own, which trials do without.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

from gepa.proposer.merge import sample_and_attempt_merge_programs_by_common_predictors

from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Candidate


def merge(
    candidates: Sequence[Candidate],
    mean_K: Sequence[float],
    ancestors: Mapping[str, Candidate],
    known_ids: Collection[str],
    cycle: int,
    rng: random.Random,
) -> Candidate | None:
    """A merged child of two of the candidates, or ``None`` where none is complementary.

    Args:
        candidates: Length K.
        mean_K: Their mean scores; only the order counts.
        ancestors: Candidates of the run so far by id. One whose scores are no longer known counts
            as worse than its descendants: they were accepted over it.
        known_ids: Ids of candidates not to make again.
        cycle: For the child's record.
        rng: Draws the pair.
    """
    programs = _with_ancestors(candidates, ancestors)
    if len(programs) < 3 or len({frozenset(c.components) for c in programs}) > 1:
        return None
    index = {candidate.id: i for i, candidate in enumerate(programs)}
    # Distinct and positive: gepa draws ancestors with the scores for weights, and breaks ties at
    # random in the order of a set, which differs between processes.
    order = sorted(range(len(candidates)), key=lambda k: (mean_K[k], candidates[k].id))
    scores = [0.5] * len(programs)
    for rank, k in enumerate(order):
        scores[k] = 1.0 + rank
    for _ in range(len(candidates)):
        found = sample_and_attempt_merge_programs_by_common_predictors(
            agg_scores=scores,
            rng=rng,
            merge_candidates=range(len(candidates)),
            merges_performed=([], []),
            program_candidates=[dict(candidate.components) for candidate in programs],
            parent_program_for_candidate=[
                [index[i] for i in candidate.parent_ids if i in index] for candidate in programs
            ],
        )
        if found is None:
            return None
        components, first, second, _ = found
        parents = [programs[first].id, programs[second].id]
        child = make_candidate(components, parents, cycle, "merge")
        if child.id not in known_ids:
            return child
    return None


def _with_ancestors(
    candidates: Sequence[Candidate], ancestors: Mapping[str, Candidate]
) -> list[Candidate]:
    programs = {candidate.id: candidate for candidate in candidates}
    waiting = list(candidates)
    while waiting:
        for parent_id in waiting.pop().parent_ids:
            if parent_id not in programs and parent_id in ancestors:
                programs[parent_id] = ancestors[parent_id]
                waiting.append(ancestors[parent_id])
    return list(programs.values())
