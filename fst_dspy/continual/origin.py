"""Which known task a new one is nearest to: the one whose prompt does best on it."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import dspy

from fst_dspy import distributed
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.fast.decide import better, share
from fst_dspy.fast.population import blocks_of
from fst_dspy.files import read_json, write_atomically
from fst_dspy.lm.predictors import find_local_lm
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.jobs import Runner
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import bind, seed_candidate
from fst_dspy.types import Candidate, RolloutCounts, Task, TurnCounts

logger = logging.getLogger(__name__)

SEARCH_EXAMPLES = 16
"""Training examples of a new task that the known tasks' best candidates are scored on."""


@dataclass(frozen=True)
class Origin:
    """Where a task's first population comes from.

    Attributes:
        name: The known task that it is taken from; ``None`` for the program's own prompt.
        counts, tokens, seconds, turns: What finding that out has cost, as in ``CycleRecord``.
    """

    name: str | None
    counts: RolloutCounts = field(default_factory=RolloutCounts)
    tokens: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    turns: TurnCounts = field(default_factory=TurnCounts)


def kept_origin(folder: Path | None, name: str, find: Callable[[], Origin]) -> Origin:
    """A stage's origin: the one in its folder or, at first, what ``find`` says, which is kept.

    So a stage that is resumed begins as before.

    Args:
        folder: The stage's run folder, if it has one.
        name: The task to learn.
        find: Runs the search.

    Raises:
        StoreError: The stage in the folder learned another task.
    """
    if folder is None:
        return find()
    path = folder / "start.json"
    plain = distributed.from_main(lambda: read_json(path) if path.exists() else None)
    if plain is None:
        origin = find()
        text = json.dumps({"task": name, **asdict(origin)}, indent=1).encode()
        if distributed.is_main():
            write_atomically(path, lambda file: file.write(text))
        return origin
    if plain.pop("task") != name:
        raise StoreError(
            f"the stage in {folder} learned another task than {name!r}; learn the tasks in the "
            "same order as before, or choose another log_dir"
        )
    counts, turns = RolloutCounts(**plain["counts"]), TurnCounts(**plain.get("turns", {}))
    return Origin(**{**plain, "counts": counts, "turns": turns})


def find_origin(
    task: Task,
    student: dspy.Module,
    known: Mapping[str, Candidate],
    sampling: SamplingConfig,
    seed: int,
) -> Origin:
    """Look for the nearest of the known tasks, with rollouts of channel ``fast``.

    Args:
        task: The new one.
        student: Its program, which calls the weights to sample from.
        known: The best candidates of tasks that are ``alike``. Those that are the program's own
            prompt are left out; where none is left, nothing is run.
        sampling: Of the rollouts.
        seed: Of the rollouts and the draw of ``SEARCH_EXAMPLES`` training examples.
    """
    own = seed_candidate(student)
    known = {name: candidate for name, candidate in known.items() if candidate.id != own.id}
    if not known:
        return Origin(None)
    started, lm = time.monotonic(), find_local_lm(student)
    runner = RolloutRunner(student, task.metric, lm, sampling, seed)
    count = min(SEARCH_EXAMPLES, len(task.trainset))
    examples = random.Random(seed).sample(task.trainset, count)
    name = nearest(runner, own, known, examples, lm.version)
    logger.info("%s begins with the population of %s", task.name, name or "its own prompt")
    seconds = {"fast": time.monotonic() - started}
    return Origin(name, runner.counts, dict(runner.tokens), seconds, runner.turns)


def nearest(
    runner: Runner,
    own: Candidate,
    known: Mapping[str, Candidate],
    examples: Sequence[dspy.Example],
    version: str,
) -> str | None:
    """The task whose candidate scores best, if it is better than the program's own, not by chance.

    Where none is, one is taken at the rate ``decide.LEVEL`` at most, however many there are. Runs
    (1 + tasks) x examples rollouts on channel ``fast``.

    Args:
        runner: Of the new task's program and metric.
        own: The new program's own texts.
        known: The known tasks' best candidates, made for programs like the new one.
        examples: Training examples of the new task.
        version: The weights to sample from.

    Returns:
        Its name, the first of equals; ``None`` where none is better by more than chance.
    """
    candidates = [own, *known.values()]
    scored = evaluate(runner, candidates, examples, channel="fast", version=version)
    own_V, *others = scored.score_K_V
    means = dict(zip(known, scored.mean_K[1:], strict=True))
    clearly = [
        name
        for name, score_V in zip(known, others, strict=True)
        if better(blocks_of(score_V, own_V), share(len(known)))
    ]
    return max(clearly, key=lambda name: means[name], default=None)


def alike(one: Task, other: Task) -> bool:
    """Whether the programs have the same predictors with the same fields, to share candidates."""
    return _fields(one.program) == _fields(other.program)


def fits(candidate: Candidate, program: dspy.Module) -> bool:
    """Whether a program has all that a candidate tells of; agents may differ in their tools."""
    try:
        bind(program, candidate)
    except ConfigError:
        return False
    return True


def _fields(program: dspy.Module) -> dict[str, tuple[str, ...]]:
    return {name: tuple(p.signature.fields) for name, p in program.named_predictors()}
