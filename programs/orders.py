"""Orders of a shop, priced by a ReAct agent with a search and a calculator.

An order names goods and a town. What the goods cost stands in a catalogue, which is searched with
BM25; what shipping to a town costs stands nowhere: it is drawn from the seed, and only the feedback
tells it. The right total takes a search for each kind of goods, the town's fee and a sum.

For real models: the one in the package does not call tools in ReAct's format.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import bm25s
import dspy

from fst_dspy.types import Task

GOODS = (
    "anvil", "barrel", "basket", "blanket", "bottle", "broom", "bucket", "candle", "chair", "clock",
    "compass", "drum", "flute", "hammer", "kettle", "ladder", "lamp", "mirror", "needle", "rope",
    "saddle", "shovel", "spoon", "tent",
)  # fmt: skip
MAKES = ("ash", "brass", "clay", "copper", "iron", "oak", "pine", "tin", "wool", "yew")
TOWNS = ("Ashford", "Brightsea", "Coldwell", "Dunmoor", "Eastmere", "Fernhill")
FEES = (2, 3, 4, 6, 7, 9)
SHOWN, MAX_TURNS = 2, 6
FOUND = 0.3
"""The reward where all prices were looked up, and the total is wrong."""

OPERATORS: Mapping[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class PriceOrder(dspy.Signature):
    """Find what the order costs in all, shipping included. Answer with the number alone."""

    order: str = dspy.InputField()
    total: str = dspy.OutputField(desc="coins, a whole number")


def calculate(expression: str) -> str:
    """Work out a sum, such as 3*4 + 2."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp | ast.BinOp) and type(node.op) in OPERATORS:
            parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
            return OPERATORS[type(node.op)](*map(value, parts))
        raise ValueError("only numbers and + - * / can be worked out")

    if len(expression) > 200:  # nothing is raised to a power, so what is short is small
        raise ValueError("the expression is too long")
    try:
        return f"{value(ast.parse(expression.strip(), mode='eval').body):g}"
    except SyntaxError as error:
        raise ValueError(f"{expression!r} cannot be read") from error


def make_search(lines: Sequence[str]) -> Callable[[str], str]:
    """BM25 over the catalogue. A plain function: copies of the program share the index."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(lines), show_progress=False), show_progress=False)

    def search(query: str) -> str:
        """Search the catalogue for goods and what they cost."""
        tokens = bm25s.tokenize(query, show_progress=False, return_ids=False)
        if not tokens[0]:
            return "nothing found"
        ids, scores = index.retrieve(tokens, k=SHOWN, show_progress=False)
        found = [lines[i] for i, score in zip(ids[0], scores[0], strict=True) if score > 0]
        return "\n".join(found) or "nothing found"

    return search


def make_metric(fees: Mapping[str, int]) -> Callable[..., dspy.Prediction]:
    """1 for the right total; else ``FOUND`` times the share of the prices that were looked up.

    The feedback tells which prices were not, and what the town's fee is.
    """

    def metric(
        gold: dspy.Example,
        pred: dspy.Prediction,
        trace: Any = None,
        pred_name: str | None = None,
        pred_trace: Any = None,
    ) -> dspy.Prediction:
        trajectory = getattr(pred, "trajectory", None) or {}
        seen = "\n".join(str(v) for k, v in trajectory.items() if k.startswith("observation_"))
        missed = [line for line in gold.lines if line not in seen]
        said = [f"Not looked up: {line}" for line in missed]
        numbers = re.findall(r"-?\d+(?:\.\d+)?", str(getattr(pred, "total", "")))
        right = len(numbers) == 1 and float(numbers[0]) == gold.total
        if not right:
            said.append(f"The total was not {getattr(pred, 'total', None)!r} but {gold.total}.")
        said.append(f"Lesson: shipping to {gold.town} costs {fees[gold.town]} coins.")
        found = 1 - len(missed) / len(gold.lines)
        return dspy.Prediction(score=1.0 if right else FOUND * found, feedback="\n".join(said))

    return metric


def load(seed: int = 0, train: int = 120, val: int = 32, test: int = 60) -> Task:
    """The task: ``seed`` draws prices, fees and orders, all of them different."""
    rng = Random(f"orders {seed}")
    fees = dict(zip(TOWNS, rng.sample(FEES, len(TOWNS)), strict=True))
    prices = {thing: rng.randint(2, 12) for thing in GOODS}
    line_of = {thing: f"The {thing} costs {price} coins." for thing, price in prices.items()}
    makes = [f"The {thing} is made of {rng.choice(MAKES)}." for thing in GOODS]
    lines = [*line_of.values(), *makes]
    rng.shuffle(lines)
    drawn: dict[str, dspy.Example] = {}
    while len(drawn) < train + val + test:
        things, town = rng.sample(GOODS, 2), rng.choice(TOWNS)
        counts = [rng.randint(1, 5) for _ in things]
        goods = " and ".join(f"{n} x {thing}" for n, thing in zip(counts, things, strict=True))
        order = f"{goods}, shipped to {town}"
        total = sum(n * prices[thing] for n, thing in zip(counts, things, strict=True))
        example = dspy.Example(
            order=order, total=total + fees[town], town=town, lines=[line_of[t] for t in things]
        )
        drawn.setdefault(order, example.with_inputs("order"))
    examples = list(drawn.values())
    told = "\n".join(f"shipping to {town} costs {fee} coins." for town, fee in fees.items())
    program = dspy.ReAct(PriceOrder, tools=[make_search(lines), calculate], max_iters=MAX_TURNS)
    return Task(
        name="orders",
        program=program,
        metric=make_metric(fees),
        trainset=examples[:train],
        valset=examples[train : train + val],
        testset=examples[train + val :],
        ideal_instructions={
            "react": f"{program.react.signature.instructions}\n"
            f"Search the catalogue once for each kind of goods.\n{told}",
            "extract.predict": f"{PriceOrder.instructions}\n{told}",
        },
    )
