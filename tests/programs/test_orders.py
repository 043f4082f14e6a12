"""The shop's orders: a scripted agent prices them, a careless one is told what was wrong."""

from __future__ import annotations

import json
import re

import dspy
import pytest
from dspy.utils import DummyLM

from fst_dspy.student.candidate import bind, make_candidate
from fst_dspy.tasks import load_task


def turn(tool, **arguments):
    args = json.dumps(arguments)
    return {"next_thought": "on", "next_tool_name": tool, "next_tool_args": args}


def test_searches_a_sum_and_the_fee_price_an_order():
    task = load_task("orders")
    for example in task.trainset[:3]:
        goods = re.findall(r"(\d) x (\w+)", example.order)
        prices = [int(re.findall(r"\d+", line)[0]) for line in example.lines]
        fee = example.total - sum(int(n) * p for (n, _), p in zip(goods, prices, strict=True))
        summed = " + ".join(f"{n}*{p}" for (n, _), p in zip(goods, prices, strict=True))
        turns = [turn("search", query=f"what does the {thing} cost") for _, thing in goods]
        turns.append(turn("calculate", expression=f"{summed} + {fee}"))
        last = {"reasoning": "", "total": str(example.total)}
        lm = DummyLM([*turns, turn("finish"), last])
        with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
            pred = task.program(**example.inputs())
        assert pred.trajectory["observation_2"] == str(example.total)
        said = task.metric(example, pred)
        assert said.score == 1.0
        assert f"shipping to {example.town} costs {fee} coins" in said.feedback


def test_what_was_not_looked_up_is_told():
    task = load_task("orders")
    example = task.trainset[0]
    _, thing = re.findall(r"(\d) x (\w+)", example.order)[0]
    turns = [turn("search", query=thing), turn("finish"), {"reasoning": "", "total": "1"}]
    with dspy.context(lm=DummyLM(turns), adapter=dspy.ChatAdapter()):
        said = task.metric(example, task.program(**example.inputs()))
    assert said.score == pytest.approx(0.15)
    assert f"Not looked up: {example.lines[1]}" in said.feedback
    assert example.lines[0] not in said.feedback
    assert f"but {example.total}" in said.feedback


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("3*(4 + 2) - -1", "19"),
        ("7/2", "3.5"),
        *[(text, None) for text in ("2**9", "__import__('os')", "1/0", "3 +", "True + 1")],
        ("1+" * 200 + "1", None),
    ],
)
def test_the_calculator_works_out_sums_and_nothing_else(expression, said):
    calculate = load_task("orders").program.tools["calculate"]
    if said is None:
        with pytest.raises((ValueError, ZeroDivisionError)):
            calculate(expression=expression)
    else:
        assert calculate(expression=expression) == said


def test_the_seed_draws_another_shop_and_the_ideal_prompt_fits_the_program():
    first, second = load_task("orders", 0), load_task("orders", 1)
    assert [e.order for e in first.trainset] != [e.order for e in second.trainset]
    orders = [e.order for e in (*first.trainset, *first.valset, *first.testset)]
    assert len(set(orders)) == len(orders) == 212
    texts = {f"{name}.instructions": text for name, text in first.ideal_instructions.items()}
    bound = bind(first.program, make_candidate(texts))
    assert "Search the catalogue once" in bound.react.signature.instructions
