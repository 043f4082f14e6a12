"""What code depends on, in a form that is the same in every process."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.evaluate import SemanticF1

from fst_dspy.student.identity import metric_identity, program_identity
from fst_dspy.student.values import MOST_ITEMS, values_of


class Place(enum.Enum):
    CELLAR = object()
    LOCKER = object()


@dataclasses.dataclass(frozen=True)
class Limits:
    words: int
    password: str = "a"


def metric(gold: Any, pred: Any, trace: Any = None, bonus: float = 0.0, *, mode: str = "f1") -> Any:
    return bonus


def options(gold: Any, pred: Any, **others: Any) -> int:
    return len(others)


def closing(bonus: float) -> Any:
    return lambda gold, pred: bonus


class Judge:
    """A metric with settings."""

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)

    def __call__(self, gold: Any, pred: Any) -> float:
        return 1.0


class Program(dspy.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.say = dspy.ChainOfThought("question -> answer")
        for name, value in settings.items():
            setattr(self, name, value)


def wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


def judged(instructions: str) -> Any:
    judge = dspy.Predict(dspy.Signature("answer -> verdict", instructions))
    return lambda gold, pred: judge(answer=pred.answer)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (metric, functools.partial(metric, bonus=5.0)),
        (functools.partial(metric, mode="f1"), functools.partial(metric, mode="em")),
        (functools.partial(closing, 1.0), functools.partial(closing, 2.0)),
        (options, functools.partial(options, strict=True)),
        (closing(0), closing(5)),
        (wrapped(closing(0)), wrapped(closing(5))),
        (functools.lru_cache(closing(0)), functools.lru_cache(closing(5))),
        (functools.partial(Judge(bonus=1)), functools.partial(Judge(bonus=2))),
        (Judge(bonus=1).__call__, Judge(bonus=2).__call__),
        (Judge(inner=closing(0)), Judge(inner=closing(5))),
        (Judge(inner=metric), Judge(inner=options)),
        (SemanticF1(threshold=0.5), SemanticF1(threshold=0.7)),
        (judged("Be strict."), judged("Be kind.")),
        (Judge(lm=dspy.LM("openai/a")), Judge(lm=dspy.LM("openai/b"))),
        (Program(k=3), Program(k=9)),
        (Program(more=[Program(k=3)]), Program(more=[Program(k=9)])),
        (dspy.ReAct("a -> b", tools=[], max_iters=2), dspy.ReAct("a -> b", tools=[], max_iters=3)),
    ],
)
def test_other_values_are_other_code(one: Any, other: Any) -> None:
    assert values_of(one) != values_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (True, False), (1, 1.5), (None, 0), ("a", "b"), (b"a", b"b"), ({1, 2}, {1, 3}),
        ([1, {"a": 2}], [1, {"a": 3}]), ({"a": (1,)}, {"a": (2,)}), (Place.CELLAR, Place.LOCKER),
        (datetime.date(2020, 1, 2), datetime.date(2020, 1, 3)), (Decimal("0.1"), Decimal("0.2")),
        (Limits(1), Limits(2)), (10**20, 10**20 + 1), (float("nan"), float("inf")),
        (int, str), (len, max), (object(), []),
    ],
)  # fmt: skip
def test_plain_values_count(one: Any, other: Any) -> None:
    found = [values_of(Judge(value=value)) for value in (one, other)]
    assert found[0] != found[1] and list(found[0]) == ["value"]
    assert found == json.loads(json.dumps(found))


def test_what_has_no_stable_form_counts_by_its_class() -> None:
    for one, other in ((object(), object()), ([object()], [object()]), (Path("a"), Path("b"))):
        assert values_of(Judge(value=one)) == values_of(Judge(value=other))


def test_private_values_secrets_and_data_do_not_count() -> None:
    settings = {
        "_cache": {}, "api_key": "a", "password": "b", "hf_token": "c",
        "name": "sk-0123456789abcdef", "data": list(range(MOST_ITEMS + 1)),
    }  # fmt: skip
    assert values_of(Judge(bonus=1, **settings)) == {"bonus": 1}
    assert values_of(Judge(limits=Limits(1))) == values_of(Judge(limits=Limits(1, "b")))


def test_texts_do_not_go_into_a_folder() -> None:
    found = metric_identity(functools.partial(metric, mode="a secret", bonus=2))
    assert found["values"]["bonus"] == 2 and "a secret" not in json.dumps(found)


def test_a_program_has_its_modules_values_and_its_predictors_texts_have_their_own_place() -> None:
    found = program_identity(Program(k=3, inner=Program(k=4)))["values"]
    assert {name: found[name] for name in ("k", "inner.k")} == {"k": 3, "inner.k": 4}
    program = Program()
    before = program_identity(program)
    predict = program.say.predict
    predict.signature = predict.signature.with_instructions("Otherwise.")
    predict.history.append({})
    assert program_identity(program) == before


def test_values_and_ids_are_the_same_in_another_process() -> None:
    code = (
        "import json, dspy; from fst_dspy.student.identity import *; "
        "from fst_dspy.student.candidate import example_id; "
        "p = dspy.ReAct('a -> b', tools=[len]); p.some = {'x', 'y', 'z'}; p.other = object(); "
        "print(json.dumps([program_identity(p), metric_identity(p)], sort_keys=True)); "
        "print(example_id(dspy.Example(q={'b', 'a', 'c'}, n=1).with_inputs('q')))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1
