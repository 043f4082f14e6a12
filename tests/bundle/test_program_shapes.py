"""Programs of every shape, with demos of every type, in and out of a bundle."""

from __future__ import annotations

import datetime
import enum
import json

import dspy
import pydantic
import pytest
from bundles import SETTINGS, seal
from bundles import read_manifest as manifest_of
from helpers import RawAdapter, questions, vowels

import fst_dspy
from fst_dspy import FST, LocalLM
from fst_dspy.errors import ConfigError, ProgramError, StoreError
from fst_dspy.student.modules import every_predictor

pytestmark = pytest.mark.slow


def predict():
    return dspy.Predict("question -> answer")


class Parts(dspy.Module):
    """Predictors nested, in a list, in a dict, and one under two names."""

    def __init__(self):
        super().__init__()
        self.steps = [predict(), dspy.ChainOfThought("question -> answer")]
        self.by_kind = {"a": predict(), "b": dspy.ChainOfThought("question -> answer")}
        self.inner = Pair()
        self.again = self.inner.first


class Pair(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first = predict()
        self.second = self.first


class Nested(dspy.Module):
    """Predictors where DSPy does not look for them: in lists in lists, and in a plain object."""

    def __init__(self):
        super().__init__()
        self.say = predict()
        self.grid = {"a": [predict(), [predict()]]}
        self.held = Holder()


class Holder:
    def __init__(self):
        self.inside = predict()


class Frozen(dspy.Module):
    """A sub-module that was compiled before, whose predictors DSPy leaves as they are."""

    def __init__(self):
        super().__init__()
        self.say = predict()
        self.inner = Pair()
        self.inner._compiled = True


class Remembering(dspy.Module):
    """State of its own, saved in the usual way."""

    def __init__(self):
        super().__init__()
        self.say = predict()
        self.memory = []

    def dump_state(self, json_mode=True):
        return {**super().dump_state(json_mode=json_mode), "memory": self.memory}

    def load_state(self, state, *, allow_unsafe_lm_state=False):
        self.memory = state["memory"]
        super().load_state(state, allow_unsafe_lm_state=allow_unsafe_lm_state)


class Wrapped(dspy.Module):
    """State of its own, in a shape of its own."""

    def __init__(self):
        super().__init__()
        self.say = predict()
        self.count = 0

    def dump_state(self, json_mode=True):
        return {"program": super().dump_state(json_mode=json_mode), "count": self.count}

    def load_state(self, state, *, allow_unsafe_lm_state=False):
        self.count = state["count"]
        super().load_state(state["program"], allow_unsafe_lm_state=allow_unsafe_lm_state)


def look_up(predictor):
    def look(question):
        return predictor(question=question)

    return look


class Closing(dspy.Module):
    """Functions that close over its predictor and another, and a part that knows the whole."""

    def __init__(self):
        super().__init__()
        self.say = predict()
        self.look = look_up(self.say)
        self.other = look_up(predict())
        self.inner = Knowing(lambda: self)

    def forward(self, question):
        return self.look(question)


class Knowing(dspy.Module):
    def __init__(self, whole):
        super().__init__()
        self.whole = whole


class ClosingItself(Closing):
    """The same, which saves itself."""

    def dump_state(self, json_mode=True):
        return {"program": super().dump_state(json_mode=json_mode)}

    def load_state(self, state, *, allow_unsafe_lm_state=False):
        super().load_state(state["program"], allow_unsafe_lm_state=allow_unsafe_lm_state)


class Checked(dspy.Predict):
    """A predictor with another inside."""

    def __init__(self):
        super().__init__("question -> answer")
        self.check = predict()


def tool(text: str) -> str:
    """Says it again."""
    return text


SHAPES = {
    "predict": predict,
    "chain of thought": lambda: dspy.ChainOfThought("question -> answer"),
    "react": lambda: dspy.ReAct("question -> answer", tools=[tool]),
    "program of thought": lambda: dspy.ProgramOfThought("question -> answer"),
    "parts": Parts,
    "pair": Pair,
    "nested": Nested,
    "frozen": Frozen,
    "remembering": Remembering,
    "wrapped": Wrapped,
    "closing": Closing,
    "checked": Checked,
}


def tuned(make, model):
    """A program with a text, a demo and settings of its own in every predictor."""
    program, lm = make(), LocalLM(str(model), temperature=0.0, max_tokens=8, cache=False)
    for number, (name, predictor) in enumerate(every_predictor(program).items()):
        predictor.signature = predictor.signature.with_instructions(f"Tuned {name}.")
        predictor.demos = [dspy.Example(question=f"q {name}", answer="a")]
        predictor.lm = lm.copy(max_tokens=8 + number)
    if hasattr(program, "memory"):
        program.memory = ["one", {"two": 2}]
    return program


def texts(program):
    return {
        name: (p.signature.instructions, [dict(d) for d in p.demos], p.lm.model, p.lm.kwargs)
        for name, p in every_predictor(program).items()
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_program_of_any_shape_comes_back(shape, tiny_qwen3, tmp_path):
    program = tuned(SHAPES[shape], tiny_qwen3)
    before = texts(program)
    fst_dspy.save(program, tmp_path / "bundle")
    assert texts(program) == before
    loaded = fst_dspy.load(tmp_path / "bundle", SHAPES[shape](), base=tiny_qwen3)
    found = texts(loaded)
    assert list(found) == list(before)
    for name, (instructions, demos, _, kwargs) in before.items():
        assert found[name][:2] == (instructions, demos) and found[name][3] == kwargs
    assert getattr(loaded, "memory", None) == getattr(program, "memory", None)
    loaded.save(tmp_path / "again")
    again = fst_dspy.load(tmp_path / "again", SHAPES[shape](), base=tiny_qwen3)
    assert texts(again) == found
    own = SHAPES[shape]()
    if shape != "checked":  # DSPy itself forgets a predictor inside a predictor
        own.load(tmp_path / "bundle" / "program.json")
        assert [p.demos for p in own.predictors()] == [p.demos for p in loaded.predictors()]


@pytest.mark.parametrize("kind", [Closing, ClosingItself])
def test_functions_of_a_loaded_program_reach_its_own_predictors(kind, tiny_qwen3, tmp_path):
    program = tuned(kind, tiny_qwen3)
    fst_dspy.save(program, tmp_path / "bundle")
    given = kind()
    loaded = fst_dspy.load(tmp_path / "bundle", given, base=tiny_qwen3)
    inside = [f.__closure__[0].cell_contents for f in (loaded.look, loaded.other)]
    assert inside[0] is loaded.say and loaded.inner.whole() is loaded
    assert list(every_predictor(loaded).values()) == inside
    assert all(isinstance(predictor.lm, LocalLM) for predictor in inside)
    assert all(predictor.lm is None for predictor in every_predictor(given).values())
    assert given.inner.whole() is given


def test_a_compiled_bare_predictor_comes_back(tiny_qwen3, tmp_path):
    lm = LocalLM(str(tiny_qwen3), temperature=0.0, max_tokens=8, cache=False)
    settings = {**SETTINGS, "max_cycles": 1, "steps_per_cycle": 1}
    with dspy.context(lm=lm, adapter=RawAdapter()):
        compiled = FST(vowels, **settings).compile(
            predict(), trainset=questions(6), valset=questions(4, 6)
        )
        compiled.save(tmp_path / "bundle")
        loaded = fst_dspy.load(tmp_path / "bundle", predict())
        for question in questions(4):
            asked = {"question": question.question}
            assert loaded(**asked).answer == compiled(**asked).answer


def test_a_predictor_may_be_named_as_what_is_written_beside_predictors(tiny_qwen3, tmp_path):
    def make():
        program = Pair()
        program.metadata = predict()
        return program

    program = tuned(make, tiny_qwen3)
    fst_dspy.save(program, tmp_path / "bundle")
    assert texts(fst_dspy.load(tmp_path / "bundle", make(), base=tiny_qwen3)) == texts(program)


def test_another_shape_is_refused(tiny_qwen3, tmp_path):
    fst_dspy.save(tuned(predict, tiny_qwen3), tmp_path / "bundle")
    for other in (Pair, Checked, SHAPES["react"]):
        with pytest.raises(ProgramError, match=r"predictors|parameters"):
            fst_dspy.load(tmp_path / "bundle", other(), base=tiny_qwen3)
    with pytest.raises(ProgramError, match="without arguments"):
        fst_dspy.load(tmp_path / "bundle", base=tiny_qwen3)


@pytest.mark.parametrize("shape", ["predict", "parts", "remembering"])
def test_no_attribute_comes_in_with_a_state(shape, tiny_qwen3, tmp_path):
    fst_dspy.save(tuned(SHAPES[shape], tiny_qwen3), tmp_path / "bundle")
    path = tmp_path / "bundle" / "program.json"
    state = json.loads(path.read_text())
    (state if shape == "predict" else next(iter(state.values())))["forward"] = "replaced"
    path.write_text(json.dumps(state))
    seal(tmp_path / "bundle", manifest_of(tmp_path / "bundle"))
    with pytest.raises(StoreError, match=r"program\.json"):
        fst_dspy.load(tmp_path / "bundle", SHAPES[shape](), base=tiny_qwen3)


# --- typed demos ----------------------------------------------------------------------------------


class Level(enum.Enum):
    HIGH = "high"
    LOW = "low"


class Person(pydantic.BaseModel):
    name: str
    born: datetime.date
    level: Level


class Typed(dspy.Signature):
    """Judge."""

    person: Person = dspy.InputField()
    day: datetime.date = dspy.InputField()
    people: list[Person] = dspy.InputField()
    answer: Level = dspy.OutputField()


ANN = Person(name="Ann", born=datetime.date(2001, 2, 3), level=Level.HIGH)
DEMOS = {
    "typed": dspy.Example(
        person=ANN, day=datetime.date(2020, 1, 2), people=[ANN, ANN], answer=Level.LOW
    ),
    "nested": dspy.Example(
        person=ANN, day=datetime.datetime(2020, 1, 2, 3), people=[], answer={"x": [(Level.LOW, 1)]}
    ),
}


class Judge(dspy.Module):
    def __init__(self):
        super().__init__()
        self.say = dspy.Predict(Typed)


@pytest.mark.parametrize("kind", DEMOS)
def test_typed_demos_come_back_as_the_same_prompt(kind, tiny_qwen3, tmp_path):
    program = Judge()
    program.say.lm = LocalLM(str(tiny_qwen3), max_tokens=8)
    program.say.demos = [DEMOS[kind]]
    fst_dspy.save(program, tmp_path / "bundle")
    assert program.say.demos == [DEMOS[kind]]  # the program's own stay typed
    loaded = fst_dspy.load(tmp_path / "bundle", Judge(), base=tiny_qwen3)
    asked = {"person": ANN, "day": datetime.date(2020, 5, 6), "people": [ANN]}
    before, after = (
        dspy.ChatAdapter().format(p.say.signature, p.say.demos, asked) for p in (program, loaded)
    )
    if kind == "typed":
        assert after == before
    assert len(after) == len(before)


def test_demos_that_cannot_be_saved_are_found_before_the_compile(tiny_qwen3):
    lm = LocalLM(str(tiny_qwen3), max_tokens=8)
    student = predict()
    student.demos = [dspy.Example(question=object(), answer="x")]
    calls = []

    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        calls.append(gold)
        return 0.0

    fst = FST(metric, **SETTINGS)
    with (
        dspy.context(lm=lm, adapter=RawAdapter()),
        pytest.raises(ConfigError, match=r"object in 'question'.*could not be saved"),
    ):
        fst.compile(student, trainset=questions(6), valset=questions(4, 6))
    assert len(calls) == 1  # the metric was tried on an answer made up, and nothing was run
