"""What the rule of shares does on tasks that want prompts, weights, both in turns, or neither.

    python benchmarks/quality/shares.py

Simulated: a task is a score by how far prompts and weights are, and what a cycle of each adds.
Validation draws one reward of 0 or 1 for each of 48 examples, from hard to easy. The rule
(``fst_dspy.loop.share``) sees nothing else, but for the candidates that trials accept: 4 in 10 of
equals, more of better ones. Its opening is interrupted by a validation once an iteration's child
does better than the parent on their minibatch by more than chance. Rollouts are those of the
defaults. Beside it the same tasks without the rule: an opening of prompts, then both in every
cycle. The table goes to ``benchmarks/results/shares.md``. It takes half a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import norm

from fst_dspy.fast import decide
from fst_dspy.fast.population import blocks_of
from fst_dspy.loop.share import Evidence, Share, next_share
from fst_dspy.measures.curves import area_under_curve

RESULTS = Path(__file__).parent.parent / "results" / "shares.md"
BUDGET, RUNS = 6000, 150
EXAMPLES = 48
OPENING, MINIBATCH = 8, 12
"""Iterations of the first phase, and of each the examples that parent and child are tried on."""
ALONE, STEPS, VALIDATION = 96, 384, 48
"""Rollouts of a later phase of prompts alone, of a cycle's steps, of validation."""
FOUND, TRIALS = 0.4, 0.2
"""What a phase of prompts alone adds, as a share of what is left to find, and a cycle's trials."""
FOUND_FIRST = 2 * FOUND
"""What the whole of the first phase adds, each of its iterations the same share."""


@dataclass(frozen=True)
class World:
    """A task.

    Attributes:
        name: What it wants.
        score: The score, 0 to 1, by how far prompts and weights are, each 0 to 1.
        pace: What a cycle adds to the weights, as a share of what is left.
        top: How far prompts can go under given weights.
        steady: What a cycle adds to the weights whatever is left.
    """

    name: str
    score: Callable[[float, float], float]
    pace: float = 0.15
    top: Callable[[float], float] = lambda weights: 1.0
    steady: float = 0.0


WORLDS = (
    World("prompts alone", lambda p, w: 0.05 + 0.9 * p),
    World("weights alone", lambda p, w: 0.05 + 0.9 * w),
    World("weights alone, slowly: a point a cycle", lambda p, w: 0.2 + 0.6 * w, 0.0, steady=1 / 60),
    World("both at once", lambda p, w: 0.05 + 0.45 * p + 0.45 * w),
    World("in turns", lambda p, w: 0.05 + 0.9 * p, 0.3, lambda w: 0.4 if w < 0.8 else 1.0),
    World("neither", lambda p, w: 0.4),
    World("neither, nearly solved", lambda p, w: 0.97),
)


@dataclass(frozen=True)
class Ran:
    """A simulated run: rollouts and true scores by cycle, shares, and why it ended, if early."""

    x: tuple[int, ...] = ()
    y: tuple[float, ...] = ()
    shares: tuple[str, ...] = ()
    ended: str | None = None


def simulate(world: World, seed: int, *, rule: bool, budget: int = BUDGET) -> Ran:
    """One run to the budget, or to its end."""
    rng = np.random.default_rng(seed)
    hard_V = rng.normal(0, 1.5, EXAMPLES)
    prompts = weights = 0.0
    rollouts, share, ran, left = 0, Share(True, False), Ran(), OPENING
    history: list[Evidence] = []
    while True:
        score, accepted, name = world.score(prompts, weights), 0, share.name if ran.x else ""
        if ran.x:
            steps = share.weights
            if left:
                before = left
                found, left = opening(world, prompts, weights, left, rng, interrupts=rule)
                rollouts += 2 * MINIBATCH * (before - left)
            else:
                found = TRIALS if steps else FOUND
                rollouts += STEPS if steps else ALONE
            if share.prompts:
                better = max(0.0, (world.top(weights) - prompts) * found)
                gain = world.score(prompts + better, weights) - score
                accepted = int(rng.binomial(2, norm.cdf(gain / 2 / 0.1 - 0.25)))
                prompts += better
            if steps:
                weights = min(1.0, weights + world.steady + (1 - weights) * world.pace)
            score = world.score(prompts, weights)
        rollouts += VALIDATION
        drawn_V = tuple(map(float, rng.random(EXAMPLES) < _by_example(score, hard_V)))
        history.append(Evidence(name, drawn_V, accepted, rollouts))
        ran = replace(ran, x=(*ran.x, rollouts), y=(*ran.y, score), shares=(*ran.shares, name))
        if rule:
            decision = next_share(
                history, share, turns=True, perfect_score=1.0, interrupted=bool(name and left)
            )
            if decision.over:
                return replace(ran, ended=decision.words)
            share = decision.share
            if share.weights:
                left = 0
        elif name:
            share = Share(True, True)
        if rollouts >= budget:
            return ran


def opening(
    world: World,
    prompts: float,
    weights: float,
    left: int,
    rng: np.random.Generator,
    *,
    interrupts: bool,
) -> tuple[float, int]:
    """The first phase, or the rest of it: the share of what is left that it finds.

    Returns:
        That share, and the iterations that are left where a child was proven to be better.
    """
    each = 1 - (1 - FOUND_FIRST) ** (1 / OPENING)
    parent = world.score(prompts, weights)
    for number in range(1, left + 1):
        found = 1 - (1 - each) ** number
        child = world.score(prompts + max(0.0, (world.top(weights) - prompts) * found), weights)
        theirs, own = (rng.random(MINIBATCH) < score for score in (parent, child))
        proven = decide.better(blocks_of(tuple(map(float, own)), tuple(map(float, theirs))))
        if interrupts and proven and number < left:
            return found, left - number
        parent = child
    return found, 0


def _by_example(score: float, hard_V: np.ndarray) -> np.ndarray:
    """Chances of examples from hard to easy with a mean, about, of the score."""
    shift = np.log(score / (1 - score)) * np.sqrt(1 + 1.5**2 / 2.89)
    return np.asarray(1 / (1 + np.exp(-(shift + hard_V))))


def reached(ran: Ran, score: float) -> float:
    """Rollouts to a true score; the budget where it was not reached."""
    return next((x for x, y in zip(ran.x, ran.y, strict=True) if y >= score), BUDGET)


def row(world: World) -> tuple[str, ...]:
    """A world's figures, before and with the rule."""
    both: list[Sequence[Ran]] = [
        [simulate(world, seed, rule=rule) for seed in range(RUNS)] for rule in (False, True)
    ]
    goal = 0.95 * float(np.median([ran.y[-1] for ran in both[0]]))
    before, after = (
        (
            np.mean([area_under_curve(r.x, r.y, BUDGET, running_best=True) for r in runs]),
            np.median([reached(r, goal) for r in runs]),
            np.mean([max(r.y) for r in runs]),
        )
        for runs in both
    )
    ended = [ran.x[-1] for ran in both[1] if ran.ended]
    return (
        world.name,
        f"{before[0]:.3f}, {after[0]:.3f}",
        f"{before[1]:,.0f}, {after[1]:,.0f}",
        f"{before[2]:.3f}, {after[2]:.3f}",
        f"{np.mean([min(ran.x[-1], BUDGET) for ran in both[1]]):,.0f}",
        f"{len(ended)} of {RUNS}",
    )


def main() -> None:
    """Simulate, print and write the table."""
    from fst_dspy.experiments.findings.tables import Table  # takes longer to import than all this

    table = Table(
        "Shares of the rollouts, simulated",
        ("the task wants", "area", "rollouts to 95 % of the best", "best", "used", "ended early"),
        tuple(map(row, WORLDS)),
        f"Without and with the rule, true scores; means (rollouts: median) of {RUNS} seeds, "
        f"budget {BUDGET:,} rollouts. `python benchmarks/quality/shares.py`",
    )
    text = table.markdown()
    RESULTS.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
