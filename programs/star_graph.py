"""Path finding in star graphs: the paper's star-graph search.

Eight arms leave the start (``degree``), and one of them ends at the goal, three steps off
(``length``); more of them are harder to guess. A model that walks forward has to
guess the arm, so the bare prompt earns next to nothing; walking back from the goal there is
nothing to guess. That strategy is what feedback teaches and an instruction holds. A model that
walks back now and then can also learn it by reinforcement alone. With ``tell=false`` the feedback
shows the right path and leaves the strategy to be seen in it, as examples may show it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import dspy

from fst_dspy.embedded.corpus.star_graph import Star, draw_star
from fst_dspy.embedded.corpus.words import ENGLISH
from fst_dspy.errors import DataError
from fst_dspy.types import Task

INSTRUCTIONS = "Find the path from the start to the goal."
STRATEGY = "Begin at the goal and walk back to the start."
DEGREE, LENGTH = 8, 3


class FindPath(dspy.Signature):
    """Find the path from the start to the goal."""

    graph: str = dspy.InputField()
    start: str = dspy.InputField()
    goal: str = dspy.InputField()
    path: str = dspy.OutputField()


def make_example(rng: Random, star: Star) -> dspy.Example:
    """The edges in random order, the two ends, and the path as the label."""
    edges = [f"{a} {b}" for a, b in star.edges]
    rng.shuffle(edges)
    return dspy.Example(
        graph=", ".join(edges), start=star.center, goal=star.path[-1], path=" ".join(star.path)
    ).with_inputs("graph", "start", "goal")


def make_metric(tell: bool = True) -> Callable[..., dspy.Prediction]:
    """The metric, in GEPA's form: 1 for the whole path, node for node, and how to get there."""

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        nodes = str(getattr(pred, "path", "")).split()
        right = nodes == gold.path.split()
        found = "Right." if right else f"Wrong: {' '.join(nodes)} does not end at {gold.goal}."
        if not right and nodes[-1:] == [gold.goal]:
            found = f"Wrong: {' '.join(nodes)} has edges that the graph does not have."
        lesson = f"\nLesson: {STRATEGY}" if tell else ""
        return dspy.Prediction(
            score=float(right), feedback=f"{found} The path is {gold.path}.{lesson}"
        )

    return metric


def load(
    seed: int = 0,
    train: int = 200,
    val: int = 64,
    test: int = 200,
    tell: bool = True,
    degree: int = DEGREE,
    length: int = LENGTH,
) -> Task:
    """The task: ``seed`` draws the graphs; no graph is in two splits. ``tell`` the strategy.

    Raises:
        DataError: A star of fewer than one arm or step, or of more nodes than there are words.
    """
    if min(degree, length) < 1 or degree * length >= len(ENGLISH):
        raise DataError(
            f"a star of {degree} arms of {length} steps cannot be drawn of {len(ENGLISH)} words"
        )
    rng = Random(f"star_graph {seed}")
    examples = [
        make_example(rng, draw_star(rng, degree, length, ENGLISH))
        for _ in range(train + val + test)
    ]
    return Task(
        name="star_graph",
        program=dspy.ChainOfThought(FindPath),
        metric=make_metric(tell),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        ideal_instructions={"predict": f"{INSTRUCTIONS}\n{STRATEGY}"},
    )
