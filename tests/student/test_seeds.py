"""Seed candidates: dicts of instructions or programs, completed with what the student has."""

import dspy
import pytest
from helpers import Echo, Twice

from fst_dspy.errors import ConfigError
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.student.seeds import read_seeds

OWN = seed_candidate(Twice())


def other_program():
    program = Twice()
    program.first.signature = program.first.signature.with_instructions("Sketch.")
    program.second.demos = [dspy.Example(draft="d", answer="a")]
    return program


def test_the_students_own_texts_come_first():
    given = [{"first": "Outline."}, {"second.instructions": "End."}, other_program(), Twice()]
    own, first, second, third = read_seeds(Twice(), given)
    assert own == OWN
    assert first.components == {**OWN.components, "first.instructions": "Outline."}
    assert second.components == {**OWN.components, "second.instructions": "End."}
    assert third.components["first.instructions"] == "Sketch."
    assert third.components["second.demos"] != "[]"
    assert read_seeds(Twice(), None) == ()
    assert read_seeds(Twice(), [{"first": "Draft."}]) == (OWN,), "the same is not taken twice"
    demos = {"first.demos": '[{"question": "q", "draft": "d"}]'}
    assert read_seeds(Twice(), (demos,))[1].components["first.demos"] == demos["first.demos"]


class Renamed(Twice):
    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question -> outline")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"first": "Outline."}, "must be a list"),
        ("Outline.", "must be a list"),
        ([], "must be a list"),
        (5, "must be a list"),
        (["Outline."], r"seed_candidates\[0\] must be"),
        ([{}], "must be"),
        ([{"first": "A"}, {"third": "B"}], r"\[1\] names 'third'; the predictors are .*'second'"),
        ([{"first": 5}], "a text"),
        ([{"first": " "}], "not empty"),
        ([{"first.demos": "no json"}], "not valid JSON"),
        ([Echo()], "another program"),
        ([Renamed()], "outline"),
    ],
)
def test_what_is_not_the_students_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        read_seeds(Twice(), given)
