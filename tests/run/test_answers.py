"""Answers as they are written: short, plain, and never without what went wrong."""

import datetime
import json

import dspy

from fst_dspy.run.answers import MOST_CHARACTERS, answer_rows
from fst_dspy.types import Failure, PredictorTrace, Rollout


def rollout(*traces, failure=None):
    return Rollout("e", "c", (), traces, 0.5, "x" * 5000, failure, 3)


def test_the_last_predictor_has_the_answer():
    day = datetime.date(2020, 1, 2)
    first = PredictorTrace("plan", {}, {"plan": "none"}, "")
    last = PredictorTrace("say", {}, {"answer": "long " * 900, "day": day, "n": [1]}, "")
    example = dspy.Example(question="Why?", when=day, answer="so").with_inputs("question", "when")
    (row,) = answer_rows([rollout(first, last)], [example])
    assert row["outputs"].keys() == {"answer", "day", "n"} and row["outputs"]["n"] == "[1]"
    assert len(row["outputs"]["answer"]) == len(row["feedback"]) == MOST_CHARACTERS + 1
    assert row["inputs"].keys() == {"question", "when"} and row["labels"] == {"answer": "so"}
    assert json.loads(json.dumps(row)) == row


def test_what_could_not_be_read_is_kept_as_text():
    unread = PredictorTrace("say", {}, None, "amber, I think")
    (row,) = answer_rows([rollout(unread, failure=Failure("parse", "no field"))])
    assert (row["outputs"], row["text"], row["failure"]) == (None, "amber, I think", "parse")
    (row,) = answer_rows([rollout(failure=Failure("program", "KeyError"))])
    assert (row["outputs"], row["text"], row["failure"]) == (None, "", "program")
    assert "inputs" not in row
