"""Who gets the rollouts of the next cycle: prompts, weights, both, or neither.

Nobody knows beforehand what a task wants, so the run finds out, from what it has observed anyway:
the scores of the same validation examples at the end of every cycle, and the trials of candidates.

1. **Prompts first, and alone**, while that pays: a phase that was better than before it by more
   than chance is followed by another, half as long as the first. Rollouts are best spent so: a
   phase costs a third of a cycle with optimizer steps. The first one is interrupted by a validation
   once a candidate is better than its parent by more than chance: so a much better program is
   known, and kept, after half of the rollouts.
2. **Then weights**, with candidates on trial in their rollouts, which cost none of their own. So
   trials rest only where those of ``TRIED`` cycles held none that did better than its parent (or
   nothing more is proposed), and are taken up for a cycle after ``RESTED`` of rest. To ask that it
   was more than chance was simulated: prompts that can go on once weights have moved are missed.
3. **Weights rest**, since to move them costs KL, once they have stopped paying: the mean of the
   later half of their latest scores is no higher than that of the earlier half. Then prompts have a
   phase alone again, and on as in 1.
4. **The run ends** where that phase did not pay either: neither channel does. And where every one
   of the last ``PERFECT`` scores is the best there is.

"More than chance" in 1 is at the rate ``decide.LIKELY``, one in four: to go on once more for
nothing costs a phase. That weights are given up on a mean alone, once enough was seen, is since
they learn slowly: of a point a cycle, a test would miss most. How much must be seen is in scores,
not in cycles: with few validation examples chance alone is large, and a run goes on rather than end
on ignorance. Rewards of optimizer steps are no evidence here: problems that are solved come back
less often, so that their mean stands still while weights learn.

With one channel alone (``gepa_only``, ``rl_only``), and with ``reuse=False``, where both have their
share in every cycle as in the paper, there is the end alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

from fst_dspy.fast.decide import LIKELY, better
from fst_dspy.fast.population import blocks_of, mean

LOOKS = 5
"""Validations, at least, in each half of the window that shows whether weights pay: with the one
before them, nine cycles. Cycles of prompts alone are short, and get twice as many."""
SCORES = 150
"""Validation scores, at least, in each half: their mean then has a standard error of 4 points."""
TRIED, RESTED = 3, 3
"""Cycles with trials none of which was accepted before these rest, and cycles that they rest."""
PERFECT = 90
"""Perfect scores in a row that end a run: a true score of 95 % has as many in one case of 100."""
KEPT = 64
"""Cycles that evidence is kept of."""


@dataclass(frozen=True)
class Share:
    """Which channels have rollouts in a cycle; a run whose share is neither is over."""

    prompts: bool
    weights: bool

    @property
    def name(self) -> str:
        """``"prompts"``, ``"weights"``, ``"both"``, or ``""`` for neither."""
        if self.prompts and self.weights:
            return "both"
        return "prompts" if self.prompts else "weights" if self.weights else ""


@dataclass(frozen=True)
class Evidence:
    """What the end of a cycle has shown.

    Attributes:
        channels: The name of its share; ``""`` for the student as it came.
        score_V: Scores of the best candidate on the V validation examples.
        accepted: Candidates of the cycle that did better than their parents.
        rollouts: Rollouts so far.
        fresh: Whether that pair of weights and candidate was not scored in the cycle before.
    """

    channels: str
    score_V: tuple[float, ...]
    accepted: int
    rollouts: int
    fresh: bool = True

    @property
    def alone(self) -> bool:
        """Whether the weights stood still."""
        return self.channels in ("", "prompts")

    @property
    def prompts(self) -> bool:
        """Whether candidates were tried."""
        return self.channels in ("prompts", "both")


@dataclass(frozen=True)
class Decision:
    """The share of the next cycle.

    Attributes:
        share: Neither where the run is over.
        words: What has changed and why, for people; ``None`` where nothing has.
    """

    share: Share
    words: str | None = None

    @property
    def over(self) -> bool:
        """Whether the run has nothing left to gain."""
        return not self.share.name


def next_share(
    history: Sequence[Evidence],
    now: Share,
    *,
    turns: bool,
    perfect_score: float,
    interrupted: bool = False,
) -> Decision:
    """Who gets the rollouts of the next cycle; the rule is the module's.

    Args:
        history: The student's own evidence, then that of each cycle, all on the same examples.
        now: The share of the cycle that has just ended.
        turns: Whether the channels may have their turns; else there is the end alone.
        perfect_score: The best score there is.
        interrupted: Whether the first phase of prompts was, and is to go on.
    """
    last = history[-1]
    if not last.channels:
        return Decision(now)
    perfect = _perfect(history, perfect_score)
    if perfect:
        words = f"the last {perfect} validation scores are all {perfect_score:g}: nothing is left"
        return Decision(Share(False, False), f"{words} to gain; the run ends")
    if not turns:
        if not _stalled(history):
            return Decision(now)
        words = f"{_named(now)} settled after {_since(history):,} rollouts; the run ends"
        return Decision(Share(False, False), words)
    if last.alone:
        return _after_prompts(history, perfect_score, interrupted)
    if _stalled(history):
        words = f"weights settled after {_since(history):,} rollouts; prompts since"
        return Decision(Share(True, False), words)
    return _with_weights(history, now)


def _after_prompts(
    history: Sequence[Evidence], perfect_score: float, interrupted: bool
) -> Decision:
    """Prompts had a phase alone: another one, or the weights' turn, or the end."""
    if len(history) < 2:  # a run of before there were turns goes on
        return Decision(Share(True, True))
    before, last = history[-2:]
    open_V = [score for score in last.score_V if abs(score - perfect_score) > 1e-9]
    if open_V and (interrupted or _paid(before, last)):
        return Decision(Share(True, False), "prompts pay; the next rollouts are theirs alone")
    if not before.alone:  # they were tried since the weights had stopped
        words = f"neither prompts nor weights pay after {last.rollouts:,} rollouts; the run ends"
        return Decision(Share(False, False), words)
    if not open_V:
        words = "prompts have nothing left to gain on validation; weights since"
    elif before.channels:
        words = f"prompts settled after {before.rollouts:,} rollouts; weights since"
    else:
        words = f"{last.rollouts - before.rollouts:,} rollouts for prompts alone did not pay"
        words += "; weights since"
    return Decision(Share(True, True), words)


def _with_weights(history: Sequence[Evidence], now: Share) -> Decision:
    """Weights go on; whether candidates are tried in their rollouts."""
    spell = [row for row in _spell(history) if not row.alone]
    if spell[-1].accepted:
        return Decision(Share(True, True), None if now.prompts else "prompts are tried again")
    if not now.prompts:
        again = all(not row.prompts for row in spell[-RESTED:]) and len(spell) >= RESTED
        return Decision(Share(again, True), "prompts are tried again" if again else None)
    # Where they were only taken up again, one cycle without any is enough.
    tried = list(takewhile(lambda row: row.prompts, reversed(spell)))
    patience = TRIED if len(tried) == len(spell) or any(row.accepted for row in tried) else 1
    if len(tried) >= patience and not any(row.accepted for row in tried[:patience]):
        words = f"no candidate of {_cycles(patience)} did better; prompts rest"
        return Decision(Share(False, True), words)
    return Decision(now)


def _spell(history: Sequence[Evidence]) -> list[Evidence]:
    """The latest cycles with, or without, the weights moving, and what was before them."""
    alone = history[-1].alone
    rows = [row for row in takewhile(lambda row: row.alone == alone, reversed(history))][::-1]
    before = len(history) - len(rows)
    return [*history[max(0, before - 1) : before], *rows]


def _stalled(history: Sequence[Evidence]) -> bool:
    """Whether the later half of the latest scores is no better than the earlier half.

    What is looked at grows with the spell: slow gains show over long stretches alone.
    """
    scores = [row.score_V for row in _spell(history)]
    looks = 2 * LOOKS if history[-1].alone else LOOKS
    half = max(looks, math.ceil(SCORES / len(scores[-1])), len(scores) // 4)
    if len(scores) < 2 * half:
        return False
    later, earlier = scores[-half:], scores[-2 * half : -half]
    return mean([*chain(*later)]) <= mean([*chain(*earlier)]) + 1e-9


def _paid(before: Evidence, after: Evidence) -> bool:
    return better(blocks_of(after.score_V, before.score_V), LIKELY)


def _perfect(history: Sequence[Evidence], perfect_score: float) -> int:
    """The perfect scores in a row that the last cycles had, if these are enough, else 0.

    They are equal to it: a metric of a wider range has no perfect score that we know of.
    """
    count = 0
    for row in reversed([row for row in history if row.channels]):
        if any(abs(score - perfect_score) > 1e-9 for score in row.score_V):
            break
        count += row.fresh * len(row.score_V)
    return count if count >= PERFECT else 0


def _since(history: Sequence[Evidence]) -> int:
    """Rollouts up to the middle of the window: where it has stopped to pay, about."""
    half = max(LOOKS, math.ceil(SCORES / len(history[-1].score_V)))
    return history[-min(half, len(history))].rollouts


def _cycles(count: int) -> str:
    return "a cycle" if count == 1 else f"{count} cycles"


def _named(share: Share) -> str:
    return "prompts and weights" if share.name == "both" else share.name
