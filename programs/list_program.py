"""Predicting what a short program does to a list: stands for the paper's CodeIO.

A program is two words, such as ``falcon then comet``. What each of the eight words does is a
convention drawn from the seed: no model can know it, feedback says it one word at a time, and
eight lines of instruction hold it. A guess is right one time in eight, so that reinforcement alone
has something to begin with. With ``tell=false`` the feedback gives the right list and leaves the
words to be understood from examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import dspy

from fst_dspy.embedded.corpus.list_program import OPERATIONS, draw_items, draw_program, run
from fst_dspy.embedded.corpus.words import ENGLISH
from fst_dspy.types import Task

WORDS = ("falcon", "comet", "anchor", "lantern", "prism", "cedar", "marble", "tulip")
INSTRUCTIONS = "Run the program on the words."


class RunProgram(dspy.Signature):
    """Run the program on the words."""

    words: str = dspy.InputField()
    program: str = dspy.InputField()
    output: str = dspy.OutputField()


def draw_meanings(seed: int) -> dict[str, str]:
    """The hidden convention: which operation each word stands for."""
    names = Random(f"list_program {seed}").sample(list(OPERATIONS), len(WORDS))
    return dict(zip(WORDS, names, strict=True))


def make_metric(meanings: Mapping[str, str], tell: bool = True) -> Callable[..., dspy.Prediction]:
    """The metric, in GEPA's form: 1 for the right list, and what the program's words mean."""

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        output = " ".join(str(getattr(pred, "output", "")).split())
        right = output == gold.output
        verdict = "Right" if right else f"Wrong: the program gives {gold.output}"
        lessons = [
            f"Lesson: {word} means {meanings[word]}."
            for word in gold.program.split(" then ")
            if tell
        ]
        return dspy.Prediction(
            score=float(right),
            feedback="\n".join([f"{verdict}; the answer was {output or 'nothing'}.", *lessons]),
        )

    return metric


def load(
    seed: int = 0, train: int = 600, val: int = 64, test: int = 200, tell: bool = True
) -> Task:
    """The task: ``seed`` draws the convention, programs and lists; ``tell`` the words' meanings.

    There are more lists than in the other programs: of 200, the weights learn some by heart.
    """
    meanings = draw_meanings(seed)
    rng = Random(f"list_program data {seed}")
    items_of = [word for word in ENGLISH if word not in WORDS]
    examples = []
    for _ in range(train + val + test):
        program, items = draw_program(rng, meanings, 2), draw_items(rng, items_of, 4)
        output = run([meanings[word] for word in program], items)[-1]
        example = dspy.Example(
            words=" ".join(items), program=" then ".join(program), output=" ".join(output)
        )
        examples.append(example.with_inputs("words", "program"))
    rules = "\n".join(f"{word} means {name}." for word, name in meanings.items())
    return Task(
        name="list_program",
        program=dspy.ChainOfThought(RunProgram),
        metric=make_metric(meanings, tell),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        ideal_instructions={"predict": f"{INSTRUCTIONS}\n{rules}"},
    )
