"""How often the rule of decisions is wrong, and what it finds: simulated, and on a real model.

    python benchmarks/quality/decisions.py

*Simulated*: rewards of 0 or 1 on problems from hard to easy, of two pairs of prompt and weights
that are equal, or 5, 10 or 20 points apart. *Real*: the embedded model on ``triage``, under one
prompt twice, once with another id; every trial has rollouts of its own. The table goes to
``benchmarks/results/decisions.md``. It takes a few minutes on two cores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.stats import binomtest

from fst_dspy import LocalLM
from fst_dspy.config import SamplingConfig
from fst_dspy.experiments.findings.tables import Table
from fst_dspy.fast.decide import LEVEL, LIKELY, Block, better, share, worse
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import make_candidate, seed_candidate
from fst_dspy.tasks import load_task
from fst_dspy.types import Candidate
from programs.triage import TOPICS, draw_policy

RESULTS = Path(__file__).parent.parent / "results" / "decisions.md"
GAPS = (0.0, 0.05, 0.1, 0.2)
SPREAD = 1.5
"""Of the problems' difficulty, in logits."""
TRIAL = 24
"""Problems of a trial at the defaults: three steps of eight."""


def simulated(
    count: int, own: int, others: int, gap: float, rng: np.random.Generator
) -> list[Block]:
    """Rewards of the better one, and of the other, on problems of mean score 0.6 and 0.6 - gap."""
    hard_V = rng.normal(0, SPREAD, count)
    sides = []
    for score, samples in ((0.6, own), (0.6 - gap, others)):
        right_V = 1 / (1 + np.exp(-(_shift(score) + hard_V)))
        sides.append(rng.binomial(1, right_V[:, None], (count, samples)).tolist())
    return list(zip(*sides, strict=True))


def _shift(score: float) -> float:
    """The logit by which problems have a mean score."""
    hard = np.random.default_rng(0).normal(0, SPREAD, 4000)
    low, high = -6.0, 6.0
    for _ in range(30):
        middle = (low + high) / 2
        if float((1 / (1 + np.exp(-(middle + hard)))).mean()) < score:
            low = middle
        else:
            high = middle
    return middle


def pairs_table(times: int) -> Table:
    """Of two pairs of weights and prompt, how often the later, worse one is called so."""
    rows, rng = [], np.random.default_rng(1)
    for count in (20, 50, 100):
        for samples in (1, 2, 4):
            cells = []
            for gap in GAPS:
                draws = (simulated(count, samples, samples, gap, rng) for _ in range(times))
                means = [[([np.mean(a)], [np.mean(b)]) for a, b in draw] for draw in draws]
                cells.append(f"{np.mean([better(b, LIKELY) for b in means]):.0%}")
            rows.append((str(count), str(samples), *cells))
    names = ("val_size", "val_samples", "equal", *(f"{gap * 100:.0f} points" for gap in GAPS[1:]))
    note = f"Stated rate for equals: {LIKELY:.0%}. {times} simulated validations a cell."
    return Table("A later pair that is worse: how often it is not kept", names, tuple(rows), note)


def members_table(times: int) -> Table:
    """How often a child joins, and a member leaves within a window of rollouts."""
    rows, rng = [], np.random.default_rng(2)
    for own, others in ((4, 4), (2, 2)):
        joins, proven, leaves, lost = [], [], [], []
        for gap in GAPS:
            trials = [simulated(TRIAL, own, others, gap, rng) for _ in range(times)]
            joins.append([sum(np.mean(a) - np.mean(b) for a, b in t) > 0 for t in trials])
            proven.append([better(blocks) for blocks in trials])
            windows = [simulated(2 * TRIAL, own, others, gap, rng) for _ in range(times)]
            leaves.append([_leaves([(b, a) for a, b in window]) for window in windows])
            lost.append([_leaves(window) for window in windows])
        slots = f"{own} and {others}"
        for what, stated, said in (
            ("a better child joins", "none", joins),
            ("and counts as proven", f"{LEVEL:.0%}", proven),
            ("a worse member leaves", f"{LIKELY:.0%}", leaves),
            ("a better member that ranks lower leaves", f"{LIKELY:.0%}", lost),
        ):
            rows.append((what, slots, stated, *(f"{np.mean(each):.0%}" for each in said)))
    names = ("decision", "rollouts a problem", "stated", "equal")
    names += tuple(f"{gap * 100:.0f} points" for gap in GAPS[1:])
    note = f"{TRIAL} problems a trial, {2 * TRIAL} a window, looked at twice; {times} a cell."
    return Table("Candidates in the slow channel's rollouts", names, tuple(rows), note)


def _leaves(window: Sequence[Block]) -> bool:
    """Whether the first of the two leaves at one of a window's two looks."""
    return any(worse(window[:n], share(2, LIKELY)) for n in (TRIAL, 2 * TRIAL))


def real_trials(trials: int, seed: int) -> Iterator[list[Block]]:
    """Trials of a prompt against itself, on rollouts of the embedded model.

    The prompt states half of the policy, so that about half of the answers are right: most noise.
    """
    task, lm = load_task("triage", seed=seed), LocalLM("embedded")
    program = task.program.deepcopy()
    program.set_lm(lm)
    (name,) = (n for n in seed_candidate(program).components if n.endswith(".instructions"))
    policy = draw_policy(seed)
    lines = [f"{topic} tickets go to {policy[topic]}." for topic in TOPICS[::2]]
    first = make_candidate({**seed_candidate(program).components, name: "\n".join(lines)})
    copy = Candidate(f"{first.id}-copy", first.components)
    runner = RolloutRunner(program, task.metric, lm, SamplingConfig(max_tokens=16), seed)
    rng = random.Random(seed)
    for number in range(trials):
        batch = rng.sample(list(task.trainset), min(TRIAL, len(task.trainset)))
        jobs = [RolloutJob(e, c, i) for e in batch for c in (first, copy) for i in range(2)]
        rollouts = runner.run(jobs, channel="eval", salt=number)
        rows = [[r.reward for r in rollouts[n : n + 4]] for n in range(0, len(rollouts), 4)]
        yield [(row[:2], row[2:]) for row in rows]


def real_table(trials: int, seed: int) -> Table:
    """False decisions of real trials, and of windows of two trials each."""
    found = list(real_trials(trials, seed))
    windows = [one + other for one, other in zip(found[::2], found[1::2], strict=False)]
    cells = [b for blocks in found for pair in blocks for b in (*pair[0], *pair[1])]
    higher = [sum(sum(a) - sum(b) for a, b in blocks) > 0 for blocks in found]
    proven = [better(blocks) for blocks in found]
    leaves = [_leaves(window) for window in windows]
    rows = [
        _rate("joins", "none", higher),
        _rate("counts as proven", f"{LEVEL:.0%}", proven),
        _rate("leaves within a window", f"{LIKELY:.0%}", leaves),
    ]
    note = f"{len(cells)} rollouts of triage, seed {seed}, mean reward {np.mean(cells):.2f}."
    names = ("an equal candidate", "stated", "measured", "95 % interval", "trials")
    return Table("The embedded model, a prompt against itself", names, tuple(rows), note)


def _rate(what: str, stated: str, said: Sequence[bool]) -> tuple[str, ...]:
    interval = binomtest(sum(said), len(said)).proportion_ci(method="wilson")
    between = f"{interval.low:.0%} to {interval.high:.0%}"
    return (what, stated, f"{np.mean(said):.0%}", between, str(len(said)))


def main(
    times: Annotated[int, typer.Option(help="Simulated decisions a cell.")] = 1000,
    trials: Annotated[int, typer.Option(help="Of the embedded model.")] = 120,
    seed: int = 0,
) -> None:
    """Simulate, run, and write the tables."""
    tables = [pairs_table(times), members_table(times), real_table(trials, seed)]
    text = "\n\n".join(table.markdown().strip() for table in tables)
    RESULTS.write_text(f"# Decisions\n\n`benchmarks/quality/decisions.py`\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
