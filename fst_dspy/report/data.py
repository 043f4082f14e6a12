"""From a run folder to the plain values that a report shows. Pure functions; nothing is written.

A run that is still going on can be read at any time: a line that is half written is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fst_dspy.errors import StoreError
from fst_dspy.fast.population import pareto_front
from fst_dspy.report import schema
from fst_dspy.student.candidate import make_candidate
from fst_dspy.types import Candidate

CHANNELS = ("fast", "slow", "eval")
FAILURE_SCORE = 0.0
"""What a failure scores where the settings do not say."""
MOST_GENERATIONS = 200
"""A line of candidates that is longer is shown in parts: the tree is drawn by recursion."""


@dataclass(frozen=True)
class Run:
    """All that a run folder says, but for its rollouts and weights.

    Attributes:
        label: A short name, different from those of the runs it is shown with.
        folder: Where it lies.
        config: ``config.json``.
        cycles: Rows of ``cycles.jsonl``, oldest first.
        steps: Rows of ``steps.jsonl``.
        populations: Rows of ``population.jsonl``: one a cycle.
        result: ``result.json``, or ``None`` while the run has not ended, or goes on again.
        quadrants: ``quadrants.json``, or ``None`` where the chosen pair was not tested.
        age: Seconds since anything was written to the logs.
        proposals: Rows of ``proposals.jsonl``, in the order in which they were judged.
        answers: Rows of ``answers.jsonl``, oldest first; none of a run of an earlier version.
    """

    label: str
    folder: Path
    config: Mapping[str, Any]
    cycles: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    populations: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    quadrants: Mapping[str, Any] | None
    age: float
    proposals: Sequence[Mapping[str, Any]] = ()
    answers: Sequence[Mapping[str, Any]] = ()

    @property
    def finished(self) -> bool:
        """Whether the run has written its outcome."""
        return self.result is not None


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a run folder.

    Raises:
        StoreError: It is not one: it has no ``config.json``; or a file is damaged.
    """
    if not (folder / "config.json").exists():
        raise StoreError(
            f"{folder} is not a run folder: it has no config.json. Give the log_dir of a compile "
            "(fst compile --out)"
        )
    logs = [path.stat().st_mtime for path in (folder / "config.json", *folder.glob("*.jsonl"))]
    run = Run(
        label=label or folder.resolve().name,
        folder=folder,
        config=schema.read_checked(folder / "config.json", schema.CONFIG),
        cycles=list(schema.read_checked_rows(folder / "cycles.jsonl", schema.CYCLE)),
        steps=list(schema.read_checked_rows(folder / "steps.jsonl", schema.STEP)),
        populations=list(schema.read_checked_rows(folder / "population.jsonl", schema.POPULATION)),
        result=_optional(folder / "result.json", schema.RESULT),
        quadrants=_optional(folder / "quadrants.json", schema.QUADRANTS),
        age=max(0.0, time.time() - max(logs)),
        proposals=list(schema.read_checked_rows(folder / "proposals.jsonl", schema.PROPOSAL)),
        answers=list(schema.read_checked_rows(folder / "answers.jsonl", schema.ANSWER)),
    )
    return _without_outdated(run)


def _without_outdated(run: Run) -> Run:
    """A run without the outcome, and the test of a pair, of before it was gone on with."""
    records = run.result.get("records") if run.result else None
    if records is not None and len(records) < len(run.cycles):
        run = replace(run, result=None)
    pair, best = (run.quadrants or {}).get("pair"), best_cycle(run)
    if pair is None or best is None:
        return run
    chosen = {"version": best["weights_version"], "candidate_id": chosen_id(run)}
    return run if pair == chosen else replace(run, quadrants=None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, under labels that tell them apart.

    Raises:
        StoreError: One of them is not a run folder, or none was given.
    """
    if not folders:
        raise StoreError("no run folder was given")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def total(counts: Mapping[str, int]) -> int:
    """Rollouts over all channels; reused ones cost nothing and do not count."""
    return sum(counts[channel] for channel in CHANNELS)


def failure_score(run: Run) -> float:
    """What a rollout that could not be scored was given at most.

    That is the setting, but the lowest score that the metric has given, where it is lower.
    """
    sampling = run.config.get("settings", {}).get("sampling", {})
    seen = [bounds[0] for cycle in run.cycles if (bounds := cycle.get("reward_range"))]
    return float(min([sampling.get("failure_score", FAILURE_SCORE), *seen]))


def first_score(run: Run) -> float:
    """The validation score of the student as it came, before a cold start changed anything.

    Where its answers are not kept, that of the first cycle's record.
    """
    first, student, rewards = run.cycles[0], seed_id(run), dict[str, list[float]]()
    for row in run.answers:
        if "inputs" in row and row["candidate_id"] == student:
            rewards.setdefault(row["example_id"], []).append(row["reward"])
    if means := [sum(own) / len(own) for own in rewards.values()]:
        return sum(means) / len(means)
    scores = dict(zip(first["candidate_ids"], first["val_scores"], strict=True))
    return float(scores.get(student, first["val_score"]))


def steps_of(run: Run, cycle: Mapping[str, Any]) -> set[int]:
    """The counts of optimizer steps at which the weights were those of a cycle.

    A step that moves nothing counts, and leaves them as they are.
    """
    version = cycle["weights_version"]
    return {one["step"] for one in run.cycles if one["weights_version"] == version}


def best_cycle(run: Run) -> Mapping[str, Any] | None:
    """The cycle whose weights and candidate the run has chosen.

    Of one that has not ended, that with the best validation score, of equals the later: the best so
    far.
    """
    chosen = run.result.get("best", {}).get("cycle") if run.result else None
    best: Mapping[str, Any] | None = None
    for cycle in run.cycles:
        if cycle["cycle"] == chosen:
            return cycle
        if best is None or cycle["val_score"] >= best["val_score"]:
            best = cycle
    return best


def seed_id(run: Run) -> str | None:
    """Of the student's own texts; ``None`` in a folder that does not say them."""
    return make_candidate(run.config["student"]).id if "student" in run.config else None


def chosen_id(run: Run) -> str | None:
    """Of the candidate that the run has chosen, or the best so far; ``None`` before there is one.

    Where the outcome and the log of cycles disagree, the outcome holds.
    """
    if run.result and "best" in run.result:
        return str(run.result["best"]["candidate"]["id"])
    best = best_cycle(run)
    return None if best is None else str(best["best_candidate_id"])


def best_scores(run: Run) -> Sequence[float]:
    """The per-example scores behind the best validation score; empty where they are not kept."""
    best = best_cycle(run)
    if best is None:
        return ()
    chosen = chosen_id(run)
    found = (
        _of_populations(run, chosen, steps_of(run, best)),
        scores_of(run, chosen, best, best["cycle"]),
    )
    return next((own for own in found if own and is_mean(best["val_score"], own)), ())


def scores_of(
    run: Run,
    candidate: str | None,
    weights: Mapping[str, Any],
    until: int,
    *,
    asked_first: bool = False,
) -> tuple[float, ...]:
    """A candidate's scores on all validation examples, in their order, from answers or populations.

    Args:
        run: Whose.
        candidate: Its id.
        weights: A cycle with the weights that it was scored under.
        until: The last cycle whose answers count.
        asked_first: Of the student as it came only.

    Returns:
        The scores; none where they are not kept. With ``val_samples`` above 1 each is a mean.
    """
    steps, answers = steps_of(run, weights), dict[str, list[float]]()
    for row in run.answers:
        if (
            row["candidate_id"] == candidate
            and row["step"] in steps
            and row["cycle"] <= until
            and ("inputs" in row or not asked_first)
        ):
            answers.setdefault(row["example_id"], []).append(row["reward"])
    means = {example: sum(rewards) / len(rewards) for example, rewards in answers.items()}
    return _in_order(run, means) or _of_populations(run, candidate, steps)


def is_mean(mean: float, scores: Sequence[float]) -> bool:
    """Whether a mean is that of some scores, at least one."""
    return abs(sum(scores) / len(scores) - mean) < 1e-9


def _of_populations(run: Run, candidate: str | None, steps: set[int]) -> tuple[float, ...]:
    """The latest scores of a candidate where the population was validated at such a step."""
    cycles = {cycle["cycle"] for cycle in run.cycles if cycle["step"] in steps}
    for row in reversed(run.populations):
        ids = [one["id"] for one in row["candidates"]]
        if row["cycle"] in cycles and candidate in ids and row["score_K_V"]:
            score_V = row["score_K_V"][ids.index(candidate)]
            if found := _in_order(run, dict(zip(row["val_ids"], score_V, strict=True))):
                return found
    return ()


def _in_order(run: Run, score_by_id: Mapping[str, float]) -> tuple[float, ...]:
    """Scores of all validation examples; none where one is missing, as of training problems."""
    ids = run.config["val_ids"]
    return tuple(score_by_id[name] for name in ids) if score_by_id.keys() >= set(ids) else ()


def is_validated(run: Run, row: Mapping[str, Any]) -> bool:
    """Whether a row of ``population.jsonl`` has scores on validation examples.

    Where slow rollouts are reused, they are on recent training problems instead.
    """
    return set(row["val_ids"]) <= set(run.config["val_ids"])


def spent(run: Run) -> dict[str, float]:
    """Seconds by channel, from the start of the run: the records' seconds only ever grow."""
    return {key: float(s) for key, s in run.cycles[-1]["seconds"].items()} if run.cycles else {}


def candidates(run: Run) -> dict[str, Candidate]:
    """Every candidate whose texts the folder holds, by id: the student's own, then by cycle.

    Those that were tried and rejected are among them; earlier versions did not keep these.
    """
    found: dict[str, Candidate] = {}
    if "student" in run.config:
        seed = make_candidate(run.config["student"])
        found[seed.id] = seed
    rows = [one for row in run.populations for one in row["candidates"]]
    if run.result and "best" in run.result:
        rows.append(run.result["best"]["candidate"])
    for row in rows:
        found.setdefault(row["id"], _candidate(row, row["components"]))
    for row in run.proposals:
        parent = found.get(row["parent_ids"][0]) if row["parent_ids"] else None
        texts = {**parent.components, **row["components"]} if parent else row["components"]
        found.setdefault(row["id"], _candidate(row, texts))
    return dict(sorted(found.items(), key=lambda item: item[1].cycle))


def _candidate(row: Mapping[str, Any], components: Mapping[str, str]) -> Candidate:
    return Candidate(row["id"], components, tuple(row["parent_ids"]), row["cycle"], row["source"])


@dataclass(frozen=True)
class Node:
    """A candidate in the lineage tree.

    Attributes:
        candidate: Its texts and origin.
        parent: The first parent that is known, or ``None``.
        scores: ``(cycle, mean score)`` for each cycle it lived through, on what the population
            was scored on at its end.
        alive: Whether it is in the newest population.
        chosen: Whether it is the one that the run has chosen, or the best so far.
        children: Its children, in the order in which they were proposed.
    """

    candidate: Candidate
    parent: Candidate | None
    scores: tuple[tuple[int, float], ...]
    alive: bool
    chosen: bool
    children: tuple[Node, ...]


def lineage(run: Run) -> list[Node]:
    """The candidates as trees: the student first, then those whose parents were not kept."""
    known = candidates(run)
    scores: dict[str, list[tuple[int, float]]] = {}
    for cycle in run.cycles:
        for name, score in zip(cycle["candidate_ids"], cycle["val_scores"], strict=True):
            scores.setdefault(name, []).append((cycle["cycle"], score))
    alive = run.cycles[-1]["candidate_ids"] if run.cycles else ()
    chosen = chosen_id(run)
    parents = _parents(known)

    below: dict[str | None, list[str]] = {}
    for name, parent in parents.items():
        below.setdefault(parent, []).append(name)

    def node(name: str) -> Node:
        return Node(
            candidate=known[name],
            parent=known.get(parents[name] or ""),
            scores=tuple(scores.get(name, ())),
            alive=name in alive,
            chosen=name == chosen,
            children=tuple(node(child) for child in below.get(name, ())),
        )

    return [node(name) for name in below.get(None, ())]


def _parents(known: Mapping[str, Candidate]) -> dict[str, str | None]:
    """For each candidate its first known parent, so chosen that no chain of parents closes.

    Nor is one longer than ``MOST_GENERATIONS``.

    A text that comes up again has the id it had before, so that a candidate can be recorded as
    the child of its own child.
    """
    parents: dict[str, str | None] = dict.fromkeys(known)
    for name, candidate in known.items():
        for parent in candidate.parent_ids:
            line: set[str | None] = set()
            above: str | None = parent
            while above in parents and above not in line:
                line.add(above)
                above = parents[above]
            if parent in known and name not in line:
                parents[name] = parent
                break
    depths: dict[str | None, int] = {None: -1}
    for name in parents:
        line_up: list[str] = []
        at: str | None = name
        while at is not None and at not in depths:
            line_up.append(at)
            at = parents[at]
        for below, one in enumerate(reversed(line_up), start=1):
            depths[one] = depths[at] + below
    return {
        name: parent if depths[name] % MOST_GENERATIONS else None
        for name, parent in parents.items()
    }


@dataclass(frozen=True)
class Pareto:
    """The newest population's scores, example by example.

    Attributes:
        cycle: The cycle at whose end they were measured.
        validated: Whether the examples are validation examples; else they are training problems.
        candidate_ids: Length K, best mean first.
        val_ids: Length V, hardest example first.
        score_K_V: The scores, in these orders.
        mean_K: Mean of each candidate.
        wins_K: On how many examples none is better.
        front: Ids of the candidates on the per-example front.
    """

    cycle: int
    validated: bool
    candidate_ids: tuple[str, ...]
    val_ids: tuple[str, ...]
    score_K_V: tuple[tuple[float, ...], ...]
    mean_K: tuple[float, ...]
    wins_K: tuple[int, ...]
    front: frozenset[str]


def pareto(run: Run) -> Pareto | None:
    """The per-example table of the newest population, or ``None`` before the first validation."""
    row = run.populations[-1] if run.populations else None
    if row is None or not row["score_K_V"] or not row["val_ids"]:
        return None
    ids = [candidate["id"] for candidate in row["candidates"]]
    score_K_V = row["score_K_V"]
    mean_K = [sum(score_V) / max(1, len(score_V)) for score_V in score_K_V]
    columns = list(zip(*score_K_V, strict=True))
    order_K = sorted(range(len(ids)), key=lambda k: (-mean_K[k], ids[k]))
    order_V = sorted(range(len(columns)), key=lambda v: (sum(columns[v]), row["val_ids"][v]))
    wins_K = [
        sum(score == max(column) for score, column in zip(score_V, columns, strict=True))
        for score_V in score_K_V
    ]
    return Pareto(
        cycle=row["cycle"],
        validated=is_validated(run, row),
        candidate_ids=tuple(ids[k] for k in order_K),
        val_ids=tuple(row["val_ids"][v] for v in order_V),
        score_K_V=tuple(tuple(score_K_V[k][v] for v in order_V) for k in order_K),
        mean_K=tuple(mean_K[k] for k in order_K),
        wins_K=tuple(wins_K[k] for k in order_K),
        front=frozenset(ids[k] for k in pareto_front(score_K_V)),
    )


def dotted_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"slow.learning_rate": ...}``; lists and texts stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            flat |= dotted_settings(value, name)
        else:
            flat[name] = value
    return flat


def _optional(path: Path, kind: TypeAdapter[Any]) -> Any | None:
    return schema.read_checked(path, kind) if path.exists() else None
