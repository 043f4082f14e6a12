"""The population as explorer: two ways of choosing what is rolled out, against the package's own.

    python benchmarks/quality/explorers.py                   # an hour on one core; resumable
    python benchmarks/quality/explorers.py --draw-only

``bandit``: each of a group's rollouts is under the candidate that Thompson sampling draws from what
the candidates have scored, in place of equal shares (after E-SPL's choice of system prompts).
``unsolved``: minibatches of the fast channel are drawn from problems that its last rollouts have
not solved, or that have had none, before all others (after P2O). Neither is part of the package:
the first takes the place of two of its functions here, the second is a ``batch_sampler`` as anybody
may give one. Runs are kept in ``benchmarks/results/explorers.jsonl``, a line each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from fst_dspy import FST, LocalLM
from fst_dspy.config import FastConfig
from fst_dspy.experiments.findings.tables import Table, interval_text
from fst_dspy.experiments.runner import revision
from fst_dspy.fast import population as populations
from fst_dspy.fast import trials
from fst_dspy.fast.lineup import Trial
from fst_dspy.fast.population import mean
from fst_dspy.measures import mean_interval, paired_difference
from fst_dspy.measures.curves import area_under_curve, score_curve
from fst_dspy.tasks import load_task
from fst_dspy.types import Candidate, Population

RUNS = Path(__file__).parent.parent / "results" / "explorers.jsonl"
WAYS = ("even", "bandit", "unsolved")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "triage": ("triage", {"max_rollouts": 1500}),
    "multihop": ("multihop", {"max_rollouts": 1500}),
    "long_policy": (
        "triage:topics=36,skew=1.0",
        {"max_rollouts": 3000, "instruction_tokens": 160},
    ),
}
"""Programs and settings; the last has more rules than its instruction may hold."""
TEST, SAMPLES = 100, 2


class UnsolvedFirst:
    """gepa's ``BatchSampler``, and a callback of its own that hears what rollouts have scored.

    Args:
        size: Problems in a minibatch.
        seed: Of the draws.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng = size, random.Random(seed)
        self.solved: dict[Any, bool] = {}
        self._last: list[Any] = []

    def next_minibatch_ids(self, loader: Any, state: Any) -> list[Any]:
        """Problems that are unsolved or new, in random order; then as many others as it takes."""
        ids = list(loader.all_ids())
        self.rng.shuffle(ids)
        self._last = sorted(ids, key=lambda number: self.solved.get(number, False))[: self.size]
        return self._last

    def on_evaluation_end(self, event: Any) -> None:
        """Note what the minibatch has scored."""
        if event["has_trajectories"]:
            self.solved |= {
                number: score >= 1
                for number, score in zip(self._last, event["scores"], strict=False)
            }


def drawn(population: Population, group_size: int, k: int) -> tuple[Candidate, ...]:
    """In place of ``population.assign``: each of the slots as the bandit draws it."""
    return _drawn(population, _assigned(population, group_size, k))


def drawn_beside(
    population: Population, trial: Trial, group_size: int, k: int
) -> tuple[Candidate, ...]:
    """In place of ``lineup``: the candidate on trial keeps its slots, the others are drawn."""
    return _drawn(population, _lined_up(population, trial, group_size, k), trial.child.id)


def _drawn(
    population: Population, slots: Sequence[Candidate], kept: str = ""
) -> tuple[Candidate, ...]:
    """Thompson sampling: under each candidate's posterior, of scores of 0 or 1 on its problems."""
    scored = zip((c.id for c in population.candidates), population.score_K_V, strict=False)
    scores_K = dict(scored)
    order = [c for c in dict.fromkeys(c.id for c in slots) if c != kept and c in scores_K]
    by_id = {c.id: c for c in slots}
    rng = random.Random(f"{population.policy_version}|{order}|{_calls.pop()}")
    _calls.append(rng.random())

    def chance(candidate: str) -> float:
        row = scores_K[candidate]
        right = mean(row) * len(row)
        return rng.betavariate(1 + right, 1 + len(row) - right)

    return tuple(
        by_id[max(order, key=chance)] if order and slot.id != kept else slot for slot in slots
    )


_assigned, _lined_up = populations.assign, trials.lineup
_calls = [0.0]
"""By what two draws for the same population differ: the draw before, from the first of a run on."""


def ran(family: str, way: str, seed: int) -> dict[str, Any]:
    """Compile a family's program, and test it."""
    program, settings = FAMILIES[family]
    task = load_task(program, seed)
    own: dict[str, Any] = {}
    if way == "unsolved":
        sampler = UnsolvedFirst(FastConfig().minibatch_size, seed)
        own = {"batch_sampler": sampler, "callbacks": [sampler]}
    _calls[:] = [float(seed)]
    student = task.program
    student.set_lm(LocalLM("embedded"))
    fst = FST(task.metric, seed=seed, track_stats=True, max_tokens=64, **settings, **own)
    bandit = way == "bandit"
    with (
        patch.object(populations, "assign", drawn if bandit else _assigned),
        patch.object(trials, "lineup", drawn_beside if bandit else _lined_up),
    ):
        compiled = fst.compile(student, trainset=task.trainset, valset=task.valset)
    result = compiled.detailed_results
    quadrants = result.quadrants(task.testset[:TEST], samples=SAMPLES)
    curve = score_curve(result.records)
    return {
        "family": family,
        "way": way,
        "seed": seed,
        "test": quadrants.trained_evolved,
        "area": area_under_curve(curve.x, curve.y, settings["max_rollouts"], running_best=True),
        "rollouts": result.rollouts.total,
        "candidates": max(len(record.candidate_ids) for record in result.records),
        "kl": result.records[result.best.cycle].kl_to_base,
        "revision": revision(),
    }


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line a family and way, with differences from the package's own way, paired by seed."""
    cells = []
    for family, way in product(FAMILIES, WAYS):
        own, even = (
            {row["seed"]: row for row in rows if (row["family"], row["way"]) == (family, name)}
            for name in (way, "even")
        )
        if own:
            figures = [
                _cells(own, even if way != "even" else {}, name) for name in ("test", "area")
            ]
            most = max(row["candidates"] for row in own.values())
            cells.append((family, way, str(len(own)), *figures[0], *figures[1], str(most)))
    heads = ("family", "way", "seeds", "test", "minus even", "area", "minus even", "candidates")
    note = (
        "Area: under the best validation score so far, over the budget. Candidates: the most that "
        "a population had at the end of a cycle. 95 % intervals over seeds."
    )
    return Table("The population as explorer", heads, tuple(cells), note)


def _cells(
    own: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], name: str
) -> tuple[str, str]:
    """The mean of a figure, and its difference from the base's, if there is one."""
    mine, theirs = ({seed: row[name] for seed, row in part.items()} for part in (own, base))
    mean_text = interval_text(mean_interval(list(mine.values())))
    return mean_text, interval_text(paired_difference(mine, theirs).difference) if base else ""


def main(
    families: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(FAMILIES),
    seeds: int = 3,
    draw_only: bool = False,
) -> None:
    """Run what has not run yet, and print the table."""
    lines = RUNS.read_text(encoding="utf-8").splitlines() if RUNS.is_file() else []
    rows = [json.loads(line) for line in lines]
    known = {(row["family"], row["way"], row["seed"]) for row in rows}
    for seed, family, way in product(range(seeds), families.split(","), WAYS):
        if draw_only or (family, way, seed) in known:
            continue
        rows.append(ran(family, way, seed))
        with RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    typer.echo(table(rows).markdown())


if __name__ == "__main__":
    typer.run(main)
