"""Metrics of every kind that Python can call, and what they may do to their arguments."""

import functools
import math
import operator

import dspy
import pytest
from dspy.evaluate import CompleteAndGrounded, SemanticF1, answer_exact_match
from dspy.teleprompt.gepa.gepa_utils import ScoreWithFeedback

from fst_dspy.errors import MetricError
from fst_dspy.fast.proposers.lessons import marked_lessons
from fst_dspy.student.candidate import example_id
from fst_dspy.student.metric import (
    ask_about_predictor,
    call_metric,
    check_metric,
    gives_predictor_feedback,
    own_copy,
    read_score,
)

GOLD = dspy.Example(question="q", response="a", tags=["x", {"y": 1}]).with_inputs("question")
PRED = dspy.Prediction(response="a")


def five(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return dspy.Prediction(score=0.5, feedback="Half.")


class Callable5:
    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        return 1


class Callable3:
    def __call__(self, gold, pred, trace=None):
        return 1

    def method(self, gold, pred):
        return 1

    @staticmethod
    def static(gold, pred, trace=None):
        return 1


class Judge(dspy.Module):
    def forward(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=0.25, feedback="Quarter.")


class Anything:
    def __call__(self, *args, **kwargs):
        return len(args)


def wrapped(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


def with_options(gold, pred, trace=None, frac=1.0, strict=True):
    assert (frac, strict) == (1.0, True)
    return 1


@pytest.mark.parametrize(
    ("metric", "predictors", "score"),
    [
        (five, True, 0.5),
        (lambda gold, pred: True, False, 1.0),
        (lambda gold, pred, trace=None: 1, False, 1.0),
        (lambda *args: len(args), True, 5.0),
        (Callable5(), True, 1.0),
        (Callable3(), False, 1.0),
        (Callable3().method, False, 1.0),
        (Callable3.static, False, 1.0),
        (Anything(), True, 5.0),
        (wrapped(Callable3().method), False, 1.0),
        (functools.partial(five), True, 0.5),
        (functools.partial(five, trace=None), False, 0.5),
        (functools.partial(lambda k, gold, pred, trace=None: k, 0.75), False, 0.75),
        (functools.partial(Judge()), True, 0.25),
        (Judge(), True, 0.25),
        (operator.eq, False, 0.0),
        (with_options, False, 1.0),
    ],
)
def test_whatever_can_be_called_is_a_metric(metric, predictors, score):
    check_metric(metric)
    assert gives_predictor_feedback(metric) is predictors
    assert call_metric(metric, GOLD, PRED).reward == score


def test_dspys_own_metrics():
    class Said(dspy.Module):
        def forward(self, **inputs):
            assert inputs["ground_truth"] == "a" and inputs["system_response"] == "a"
            return dspy.Prediction(precision=1.0, recall=0.5)

    metric = SemanticF1()
    metric.module = Said()
    for judge in (metric, functools.partial(metric)):
        check_metric(judge)
        assert not gives_predictor_feedback(judge)
        assert call_metric(judge, GOLD, PRED).reward == pytest.approx(2 / 3)
    check_metric(CompleteAndGrounded())
    check_metric(answer_exact_match)
    gold = dspy.Example(question="q", answer="a").with_inputs("question")
    assert call_metric(answer_exact_match, gold, dspy.Prediction(answer="a")).reward == 1


def test_a_builtin_without_a_signature_is_tried():
    check_metric(max)  # no signature to read
    assert call_metric(max, 1, 2).reward == 2, "of 5, 3 and 2 arguments, 2 will do"
    with pytest.raises(TypeError):
        call_metric(max, GOLD, PRED)


async def waits(gold, pred, trace=None):
    return 1


class Waits:
    async def __call__(self, gold, pred, trace=None):
        return 1


class AsyncModule(dspy.Module):
    async def aforward(self, gold, pred, trace=None):
        return 1


@pytest.mark.parametrize(
    "metric",
    [
        waits,
        Waits(),
        Waits().__call__,
        functools.partial(waits, trace=None),
        AsyncModule(),
        wrapped(waits),
    ],
)
def test_an_async_metric_is_told_plainly(metric):
    with pytest.raises(MetricError, match="must not be async"):
        check_metric(metric)


@pytest.mark.filterwarnings("error")
def test_a_metric_that_hides_that_it_is_async_is_told_when_called():
    with pytest.raises(MetricError, match="must not be async"):
        call_metric(lambda gold, pred: waits(gold, pred), GOLD, PRED)


@pytest.mark.parametrize("metric", [lambda: 1, lambda gold: 1, lambda a, b, c, d: 1])
def test_other_numbers_of_arguments_are_refused(metric):
    with pytest.raises(MetricError, match="must accept"):
        check_metric(metric)


def test_a_metric_may_change_what_it_is_given():
    gold = GOLD.copy()
    pred = dspy.Prediction(response="a", steps=["one"])
    before = example_id(gold)

    def careless(gold, pred, trace=None, pred_name=None, pred_trace=None):
        gold.question = "other"
        gold.tags.append("z")
        gold.tags[1]["y"] = 2
        del gold["response"]
        pred.response = None
        pred.steps.clear()
        return 1

    call_metric(careless, gold, pred)
    ask_about_predictor(careless, gold, pred, [], "p", [])
    assert example_id(gold) == before and gold.inputs().toDict() == {"question": "q"}
    assert gold.tags == ["x", {"y": 1}]
    assert pred.response == "a" and pred.steps == ["one"]


def test_other_objects_are_passed_on_as_they_are():
    thing, loop = object(), []
    loop.append(loop)
    gold = dspy.Example(thing=thing, loop=loop, pair=(["a"], thing)).with_inputs("thing")
    copied = own_copy(gold)
    assert type(copied) is dspy.Example and copied is not gold
    assert copied.thing is thing and copied.pair[1] is thing
    assert copied.pair[0] == ["a"] and copied.pair[0] is not gold.pair[0]
    assert copied.loop is not loop and copied.loop[0] is copied.loop
    assert copied._input_keys == gold._input_keys
    assert own_copy("text") == "text"
    pred = own_copy(dspy.Prediction.from_completions([{"x": 1}, {"x": 2}]))
    assert isinstance(pred, dspy.Prediction) and len(pred.completions) == 2


@pytest.mark.parametrize(
    "said",
    [
        ["Lesson: visa goes to amber.", "Lesson: tax goes to jade."],
        {"Lesson: visa goes to amber.", "Lesson: tax goes to jade."},
        {"lesson": "visa goes to amber.", "rule": "tax goes to jade."},
        {"why": ["Lesson: visa goes to amber."], "more": ("Rule: tax goes to jade.", None)},
        dspy.Prediction(score=0.5, feedback="Lesson: visa goes to amber.\nHint: tax goes to jade."),
    ],
    ids=["list", "set", "dict", "nested", "prediction"],
)
def test_feedback_that_is_no_text_teaches_as_text_does(said):
    """As a judge with a typed output gives it."""
    feedback = read_score(dspy.Prediction(score=0, feedback=said)).feedback
    assert set(marked_lessons(feedback)) == {"visa goes to amber.", "tax goes to jade."}


def test_feedback_that_is_none_is_empty():
    for said in (None, "", [], {}, False, 0, math.nan):
        assert read_score(dspy.Prediction(score=0, feedback=said)).feedback == ""
    loop = ["a"]
    loop.append(loop)
    assert read_score(dspy.Prediction(score=0, feedback=loop)).feedback == "['a', [...]]"


def test_scores_by_objective_are_read():
    def scored(objectives):
        return read_score(dspy.Prediction(score=1, feedback="f", objective_scores=objectives))

    assert scored({"short": True, 5: 0.5}).objectives == {"short": 1.0, "5": 0.5}
    assert scored(None).objectives == {} == read_score(0.5).objectives
    assert read_score({"score": 1, "objective_scores": {"x": 2}}).objectives == {"x": 2.0}
    given = ScoreWithFeedback(score=0.5, feedback="f", objective_scores={"x": 1.0})
    assert read_score(given).objectives == {"x": 1.0}
    for bad, message in (([0.5], "a dict"), ({"x": "?"}, "'x'"), ({"x": math.nan}, "finite")):
        with pytest.raises(MetricError, match=message):
            scored(bad)
