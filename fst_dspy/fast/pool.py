"""Rollouts used twice: what the slow phase's groups say about the candidates they ran under.

The slow phase runs K candidates on P problems a step, under almost the current weights. A pool
keeps those of the last steps. From it come the candidates' scores, with problems for columns, and
the traces and feedback to reflect on. Pure functions over frozen dataclasses.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_dspy.fast.decide import Block
from fst_dspy.fast.proposers.demos import shown_examples
from fst_dspy.fast.proposers.sentences import gaps
from fst_dspy.rollouts.evaluate import objectives_in, score_of
from fst_dspy.run.records import as_read_back, rollout_from_json, with_fields
from fst_dspy.run.rollout_log import unpack
from fst_dspy.types import Candidate, Rollout, Turn

SWEEPS = 50
"""Alternations of the two-way fit; a chain of candidates compared pairwise needs a few dozen."""
MAX_CHARACTERS = 4000
"""Characters of one field that a pooled rollout keeps: the pool is written at every checkpoint."""


@dataclass(frozen=True)
class RolloutPool:
    """Rollouts of training problems under recent weights, oldest first, without their tokens.

    Lost ones are not among them (``Rollout.is_lost``): they say nothing of a candidate.
    """

    rollouts: tuple[Rollout, ...] = ()

    def plus(self, rollouts: Sequence[Rollout]) -> RolloutPool:
        """With some more rollouts, but for lost ones."""
        more = [_without_tokens(rollout) for rollout in rollouts if not rollout.is_lost]
        return RolloutPool((*self.rollouts, *more))

    def since(self, policy_version: int) -> RolloutPool:
        """Those sampled from this version of the weights or a later one."""
        return RolloutPool(tuple(r for r in self.rollouts if r.policy_version >= policy_version))

    def latest(self, count: int) -> RolloutPool:
        """The last so many."""
        return RolloutPool(self.rollouts[-count:])

    def of(self, candidate_id: str) -> tuple[Rollout, ...]:
        """Those under one candidate."""
        return tuple(r for r in self.rollouts if r.candidate_id == candidate_id)


def pool_from_json(rows: Sequence[Mapping[str, Any]]) -> RolloutPool:
    """A pool from its rollouts as ``fst_dspy.run.rollout_log`` packs them, for JSON."""
    return RolloutPool(tuple(map(rollout_from_json, unpack(rows))))


@dataclass(frozen=True)
class ScoreTable:
    """Scores of candidates on problems, as ``population.choose`` takes them.

    Attributes:
        candidates: Those of which there is at least one score, in the order given.
        problem_ids: Length P, the columns.
        score_K_P: Mean reward; where a candidate has not run on a problem, the fitted value.
        seen_K_P: Mean reward on the problems that the best candidate has run on, with which the
            others are compared; where a candidate has not, ``None``.
        objective_K_P: As ``score_K_P``, for each of the metric's objectives; empty where it has
            none.
    """

    candidates: tuple[Candidate, ...]
    problem_ids: tuple[str, ...]
    score_K_P: tuple[tuple[float, ...], ...]
    seen_K_P: tuple[tuple[float | None, ...], ...]
    objective_K_P: tuple[tuple[Mapping[str, float], ...], ...] = ()


def score_table(pool: RolloutPool, candidates: Sequence[Candidate]) -> ScoreTable:
    """Scores of the candidates from the pool, gaps filled by :func:`fill`.

    A candidate's rollouts on problems that its own demos show do not count.
    """
    means = [problem_means(pool, candidate) for candidate in candidates]
    problems = tuple(sorted({problem for row in means for problem in row}))
    known = [(c, row) for c, row in zip(candidates, means, strict=True) if row]
    gaps_K_P = [[row.get(problem) for problem in problems] for _, row in known]
    there = tuple(candidate for candidate, _ in known)
    score_K_P = fill(gaps_K_P)
    best_k = max(range(len(known)), key=lambda k: sum(score_K_P[k]), default=None)
    best_P = gaps_K_P[best_k] if best_k is not None else []
    seen_K_P = tuple(
        tuple(s if best is not None else None for s, best in zip(row, best_P, strict=True))
        for row in gaps_K_P
    )
    return ScoreTable(there, problems, score_K_P, seen_K_P, _objectives(pool, there, problems))


def _objectives(
    pool: RolloutPool, candidates: Sequence[Candidate], problems: Sequence[str]
) -> tuple[tuple[Mapping[str, float], ...], ...]:
    names = objectives_in(pool.rollouts)
    filled = {}
    for name in names:
        rows = [problem_means(pool, candidate, name) for candidate in candidates]
        filled[name] = fill([[row.get(problem) for problem in problems] for row in rows])
    if not names:
        return ()
    return tuple(
        tuple({name: filled[name][k][p] for name in names} for p in range(len(problems)))
        for k in range(len(candidates))
    )


def problem_means(
    pool: RolloutPool, candidate: Candidate, objective: str | None = None
) -> dict[str, float]:
    """Mean reward of a candidate on each problem it has run on, but for those its demos show.

    Of the metric's objectives, where one is named, the mean score.
    """
    shown = shown_examples(candidate)
    rewards: dict[str, list[float]] = defaultdict(list)
    for rollout in pool.of(candidate.id):
        if rollout.example_id not in shown:
            rewards[rollout.example_id].append(score_of(rollout, objective))
    return {problem: sum(values) / len(values) for problem, values in rewards.items()}


def fill(score_K_P: Sequence[Sequence[float | None]]) -> tuple[tuple[float, ...], ...]:
    """The scores with each gap filled by candidate effect + problem effect.

    The effects are the least-squares fit to the scores there are. Without them, a candidate that
    happened to run on easy problems, or later, under better weights, would look better than it is.

    Args:
        score_K_P: ``None`` marks a gap. Each row and each column holds at least one score.
    """
    there = [
        (k, p, s) for k, row in enumerate(score_K_P) for p, s in enumerate(row) if s is not None
    ]
    if len(there) == sum(map(len, score_K_P)):
        return tuple(tuple(s for s in row if s is not None) for row in score_K_P)
    low, high = min(s for _, _, s in there), max(s for _, _, s in there)
    effect_K, effect_P = [0.0] * len(score_K_P), [0.0] * len(score_K_P[0])
    by_row: dict[int, list[tuple[int, float]]] = defaultdict(list)
    by_column: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for k, p, s in there:
        by_row[k].append((p, s))
        by_column[p].append((k, s))
    for _ in range(SWEEPS):
        for p, cells in by_column.items():
            effect_P[p] = sum(s - effect_K[k] for k, s in cells) / len(cells)
        for k, cells in by_row.items():
            effect_K[k] = sum(s - effect_P[p] for p, s in cells) / len(cells)
    return tuple(
        tuple(
            min(high, max(low, effect_K[k] + effect_P[p])) if s is None else s
            for p, s in enumerate(row)
        )
        for k, row in enumerate(score_K_P)
    )


def paired(
    pool: RolloutPool, child: Candidate, others: Sequence[Candidate]
) -> tuple[list[list[float]], list[float]]:
    """Means of the others, and of the child, on what all of them have run on at once.

    Returns:
        A row for each of ``others``, and the child's; a problem and version of the weights each.
    """
    rows = [_rewards(pool, candidate) for candidate in (child, *others)]
    common = [key for key in rows[0] if all(key in row for row in rows)]
    child_B, *others_B = [[sum(row[key]) / len(row[key]) for key in common] for row in rows]
    return others_B, child_B


def observed(pool: RolloutPool, one: Candidate, *others: Candidate) -> list[Block]:
    """What was observed of a candidate and of others, taken together, at once.

    Returns:
        A block for each problem and version of the weights that both have run on, oldest first.
    """
    own, *rest = [_rewards(pool, candidate) for candidate in (one, *others)]
    found: list[Block] = []
    for key in own:
        other = [reward for rewards in rest for reward in rewards.get(key, ())]
        if other:
            found.append((own[key], other))
    return found


def _rewards(pool: RolloutPool, candidate: Candidate) -> dict[tuple[int, str], list[float]]:
    """Rewards by version and problem, but for the problems that the candidate's demos show."""
    shown = shown_examples(candidate)
    rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
    for rollout in pool.of(candidate.id):
        if rollout.example_id not in shown:
            rewards[rollout.policy_version, rollout.example_id].append(rollout.reward)
    return rewards


def minibatch(rollouts: Sequence[Rollout], size: int, rng: random.Random) -> list[Rollout]:
    """Rollouts to reflect on: three quarters the least rewarded, the rest the most, drawn.

    Different problems first: several rollouts of one problem say much the same.
    """
    pool = list(rollouts)
    rng.shuffle(pool)
    rank: dict[str, int] = defaultdict(int)
    keyed = []
    for rollout in sorted(pool, key=lambda r: r.reward):
        keyed.append((rank[rollout.example_id], rollout))
        rank[rollout.example_id] += 1
    by_need = [rollout for _, rollout in sorted(keyed, key=lambda pair: pair[0])]
    bad = by_need[: size - size // 4]
    rest = sorted(by_need[len(bad) :], key=lambda r: -r.reward)
    return [*bad, *rest[: size - len(bad)]]


def _without_tokens(rollout: Rollout) -> Rollout:
    """What a checkpoint can hold of a rollout, so that a resumed run sees the same."""
    rollout = as_read_back(rollout)
    traces = tuple(
        dataclasses.replace(with_fields(trace, _short), text=trace.text[:MAX_CHARACTERS])
        for trace in rollout.traces
    )
    failure = rollout.failure
    return dataclasses.replace(
        rollout,
        calls=(),
        traces=traces,
        feedback=_said(rollout.feedback),
        feedback_by_predictor={
            name: _said(text) for name, text in rollout.feedback_by_predictor.items()
        },
        failure=failure and dataclasses.replace(failure, message=_said(failure.message)),
        turns=tuple(map(_short_turn, rollout.turns)),
    )


def _said(text: str) -> str:
    """Feedback, without its middle where it is long.

    Lessons are read off it again. So it is cut where sentences end, and what stands for the rest is
    a paragraph of one word: half a sentence, or an account of what was left out, would be learned.
    """
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    head, tail = text[:half], text[-half:]
    last, first = max(_ends(head), default=half), min(_ends(tail), default=0)
    return f"{head[:last].rstrip()}\n\n[...]\n\n{tail[first:].lstrip()}"


def _ends(text: str) -> list[int]:
    """Where its lines and sentences end."""
    return [*(found.end() for found in re.finditer("\n", text)), *(end for _, end in gaps(text))]


def _short_turn(turn: Turn) -> Turn:
    names = ("observation", "action", "result")
    texts = {name: getattr(turn, name)[:MAX_CHARACTERS] for name in names}
    return dataclasses.replace(turn, **texts, said=_short(turn.said))


def _short(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if len(text := str(value)) <= MAX_CHARACTERS else text[:MAX_CHARACTERS]
        for name, value in fields.items()
    }
