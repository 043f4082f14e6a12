import dataclasses
import datetime
import json
from collections import deque
from collections.abc import Callable

import dspy
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fst_dspy.errors import ConfigError
from fst_dspy.student.candidate import (
    bind,
    candidate_from_json,
    candidate_to_json,
    decode_demos,
    encode_demos,
    example_id,
    make_candidate,
    plain_fields,
    population_from_json,
    population_to_json,
    predictor_names,
    seed_candidate,
    split_component,
    with_id,
)
from fst_dspy.types import Population


class TwoStep(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.think = dspy.ChainOfThought("question -> notes")
        self.answer = dspy.Predict(dspy.Signature("notes -> answer", "Answer shortly."))

    def forward(self, question: str) -> dspy.Prediction:
        return self.answer(notes=self.think(question=question).notes)


def test_seed_holds_instructions_and_demos_of_every_predictor() -> None:
    program = TwoStep()
    program.answer.demos = [dspy.Example(notes="n", answer="a").with_inputs("notes")]
    seed = seed_candidate(program)
    assert predictor_names(program) == ("think.predict", "answer")
    assert set(seed.components) == {
        "think.predict.instructions",
        "think.predict.demos",
        "answer.instructions",
        "answer.demos",
    }
    assert seed.components["answer.instructions"] == "Answer shortly."
    assert json.loads(seed.components["answer.demos"]) == [{"answer": "a", "notes": "n"}]
    assert seed.components["think.predict.demos"] == "[]"
    assert (seed.parent_ids, seed.cycle, seed.source) == ((), 0, "seed")


def test_bind_puts_texts_in_and_leaves_the_program_alone() -> None:
    program = TwoStep()
    before = seed_candidate(program)
    changed = make_candidate(
        {"answer.instructions": "Speak.", "answer.demos": '[{"notes": "x", "answer": "y"}]'}
    )
    bound = bind(program, changed)
    assert bound.answer.signature.instructions == "Speak."
    assert [demo.toDict() for demo in bound.answer.demos] == [{"notes": "x", "answer": "y"}]
    assert bound.think.predict.signature.instructions == (
        program.think.predict.signature.instructions
    )
    assert seed_candidate(program) == before
    assert type(bound) is TwoStep and bound is not program


def test_bound_texts_reach_the_prompt() -> None:
    lm = dspy.utils.DummyLM([{"answer": "yes"}])
    texts = {"answer.instructions": "Speak up.", "answer.demos": '[{"notes": "x", "answer": "y"}]'}
    bound = bind(TwoStep(), make_candidate(texts))
    with dspy.context(lm=lm):
        bound.answer(notes="n")
    prompt = json.dumps(lm.history[-1]["messages"])
    assert "Speak up." in prompt and "[[ ## answer ## ]]\\ny" in prompt


def test_bind_then_seed_gives_the_same_candidate() -> None:
    program = TwoStep()
    program.answer.demos = [dspy.Example(notes="n", answer="ä", tags=["a", "b"], rank=2)]
    seed = seed_candidate(program)
    assert seed_candidate(bind(TwoStep(), seed)).id == seed.id


def test_demos_json_cannot_hold_stay_the_students_own() -> None:
    program = TwoStep()
    demo = dspy.Example(notes=datetime.date(2020, 1, 2), answer="a")
    program.answer.demos = [demo]
    seed = seed_candidate(program)
    assert "answer.demos" not in seed.components
    assert len(bind(program, seed).answer.demos) == 1


def test_demos_that_could_not_be_saved_are_refused() -> None:
    program = TwoStep()
    program.answer.demos = [dspy.Example(notes="n"), dspy.Example(notes=[object()])]
    with pytest.raises(ConfigError, match=r"demo 1 of the predictor 'answer' .* in 'notes'"):
        seed_candidate(program)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"nobody.instructions": "x"}, "predictors are"),
        ({"answer.prefix": "x"}, "is not"),
        ({"instructions": "x"}, "is not"),
        ({"answer.demos": "not json"}, "not valid JSON"),
        ({"answer.demos": '{"a": 1}'}, "list of objects"),
        ({"answer.demos": "[1]"}, "list of objects"),
    ],
)
def test_bind_refuses_what_does_not_fit(components: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(TwoStep(), make_candidate(components))


def test_a_program_without_predictors_has_no_seed() -> None:
    with pytest.raises(ConfigError, match="no predictors"):
        seed_candidate(dspy.Module())


def test_split_component_keeps_dots_in_the_predictors_name() -> None:
    assert split_component("think.predict.demos") == ("think.predict", "demos")


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1))
def test_id_depends_on_the_texts_alone(components: dict[str, str]) -> None:
    one = make_candidate(components, ["p"], 3, "instructions")
    other = make_candidate(dict(reversed(components.items())))
    assert one.id == other.id and len(one.id) == 12
    name = next(iter(components))
    assert make_candidate({**components, name: components[name] + "."}).id != one.id


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(st.lists(st.dictionaries(st.sampled_from(["q", "base", "self"]), values, min_size=1)))
def test_demos_come_back_as_they_were(rows: list[dict[str, object]]) -> None:
    decoded = decode_demos(encode_demos([dspy.Example(row) for row in rows]))
    assert [demo.toDict() for demo in decoded] == rows


def test_example_id_covers_inputs_labels_and_which_is_which() -> None:
    base = dspy.Example(q="1", a="2")
    ids = {
        example_id(base.with_inputs("q")),
        example_id(base.with_inputs("a")),
        example_id(dspy.Example(q="1", a="3").with_inputs("q")),
        example_id(dspy.Example(q="2", a="2").with_inputs("q")),
    }
    assert len(ids) == 4
    assert example_id(dspy.Example(a="2", q="1").with_inputs("q")) in ids


@pytest.mark.parametrize("value", [{1, 2}, b"\x00", {1: "a", "b": 2}, float("nan"), int, "\ud800"])
def test_example_id_takes_values_json_cannot_hold(value: object) -> None:
    assert example_id(dspy.Example(q=value)) == example_id(dspy.Example(q=value))


@dataclasses.dataclass
class Held:
    pixels: object


def of_middle(value: float) -> np.ndarray:
    pixels = np.zeros((64, 64))
    pixels[30, 30] = value
    return pixels


@pytest.mark.parametrize(
    "made",
    [
        of_middle,
        lambda value: of_middle(value).astype(object),
        lambda value: np.ma.masked_equal(of_middle(value), 0),
        lambda value: np.array([0.1 + value * 1e-12]),
        lambda value: torch.from_numpy(of_middle(value)),
        lambda value: torch.from_numpy(of_middle(value)).bfloat16().requires_grad_(),
        lambda value: torch.from_numpy(of_middle(value)).to_sparse(),
        lambda value: pandas.DataFrame(of_middle(value)),
        lambda value: pandas.DataFrame({f"column {value}": [1]}),
        lambda value: pandas.Series(np.zeros(100), index=range(value, value + 100)),
        lambda value: Image.fromarray(of_middle(value).astype("uint8")),
        lambda value: memoryview(of_middle(value).tobytes()),
        lambda value: Held(of_middle(value)),
        lambda value: deque([{"a": [of_middle(value)]}]),
    ],
)
def test_example_id_covers_what_a_repr_leaves_out(made: Callable[[int], object]) -> None:
    ids = [example_id(dspy.Example(x=made(value)).with_inputs("x")) for value in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return x + {}",
        "def f(x): return x in {{{}, 5, 6}}",
        "def f(x, y={}): return lambda: x + y",
        "f = (lambda y: lambda x: x + y)({})",
        "import functools; f = functools.partial(lambda x, y: x, y={})",
    ],
)
def test_example_id_knows_a_function_by_what_it_does(source: str) -> None:
    """Its ``repr`` has its address, which is another in every process."""

    def made(value: int) -> dspy.Example:
        names: dict[str, object] = {}
        exec(source.format(value), names)
        return dspy.Example(tools={"f": names["f"]}).with_inputs("tools")

    one, same, other = [made(value) for value in (1, 1, 2)]
    assert one.tools["f"] is not same.tools["f"]
    assert example_id(one) == example_id(same) != example_id(other)


@pytest.mark.parametrize(
    ("value", "known"),
    [
        ("a", "c80cd3a999dc"),
        ([1, {"a": (2.5, None)}], "a8bb9021417e"),
        ({1, 2, "x"}, "1bb085401419"),
        (b"\x00", "b819502f61cd"),
        (datetime.date(2020, 1, 2), "61d640d3d331"),
        (np.int64(3), "26fb75750749"),
        (Held([1]), "6b37d82966de"),
    ],
)
def test_ids_of_earlier_versions_stay(value: object, known: str) -> None:
    """Seeds and run folders are made of them."""
    assert example_id(dspy.Example(x=value, label="b").with_inputs("x")) == known


def test_example_id_leaves_out_what_dspy_keeps_to_itself() -> None:
    """``dspy.datasets`` gives examples another ``dspy_uuid`` in every process."""
    plain = dspy.Example(q="1", a="2").with_inputs("q")
    own = dspy.Example(q="1", a="2", dspy_uuid="x", dspy_split="train").with_inputs("q")
    assert example_id(own) == example_id(plain)
    assert plain_fields(own.labels()) == {"a": "2"}
    assert encode_demos([own]) == encode_demos([plain])  # by which a run folder knows its student


def test_an_id_that_was_taken_stays_whatever_is_written() -> None:
    example = dspy.Example(q=["1"]).with_inputs("q")
    before = example_id(example)
    known = with_id(example)
    example.q.append("2")
    example.more = 1
    assert example_id(known) == example_id(with_id(known)) == before != example_id(example)
    assert known.q is example.q and "more" not in known and known.inputs().keys() == ["q"]
    assert example_id(known.copy(q="3")) == example_id(dspy.Example(q="3").with_inputs("q"))


def test_json_round_trip() -> None:
    parent = make_candidate({"p.instructions": "a"})
    child = make_candidate({"p.instructions": "b"}, [parent.id], 2, "instructions")
    population = Population((parent, child), ("v1", "v2"), ((0.0, 1.0), (0.5, 0.25)), 7)
    data = json.loads(json.dumps(population_to_json(population)))
    assert population_from_json(data) == population
    assert candidate_from_json(json.loads(json.dumps(candidate_to_json(child)))) == child


def test_damaged_json_is_refused() -> None:
    data = candidate_to_json(make_candidate({"p.instructions": "a"}))
    with pytest.raises(ConfigError, match="does not match its texts"):
        candidate_from_json({**data, "components": {"p.instructions": "b"}})
