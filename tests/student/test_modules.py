"""What a copy of a program has its own of, and what it shares."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import dspy

from fst_dspy.student.modules import MAX_WALKED_ITEMS, copy_program, every_predictor


class Asks(dspy.Module):
    """A predictor, and whatever else is given."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        self.say = dspy.Predict("question -> answer")
        for name, value in held.items():
            setattr(self, name, value)

    def ask(self, question: str) -> dspy.Predict:
        return self.say


class Child(dspy.Module):
    """A part that knows the program it is in."""

    def __init__(self, parent: Callable[[], dspy.Module | None]) -> None:
        super().__init__()
        self.parent = parent


def test_a_weak_reference_to_the_program_is_to_the_copy() -> None:
    ended: list[Any] = []
    program = Asks()
    program.child = Child(weakref.ref(program, ended.append))
    twin = copy_program(program)
    assert twin.child.parent() is twin and program.child.parent() is program
    assert list(every_predictor(twin)) == ["say"]
    del twin
    assert not ended


def test_a_weak_reference_to_what_no_program_holds_stays_as_it_is() -> None:
    outside, gone = Asks(), weakref.ref(Asks())
    child = Child(weakref.ref(outside))
    program = Asks(child=child, gone=gone)
    twin = copy_program(program)
    assert twin.child is not child and twin.child.parent() is outside
    assert twin.gone is gone and gone() is None
    assert list(every_predictor(program)) == ["say"]


def test_a_cached_method_is_the_copys_own_with_an_empty_cache() -> None:
    program = Asks()
    program.cached = functools.lru_cache(maxsize=7, typed=True)(program.ask)
    program.cached.note = [program.say]
    assert program.cached("a") is program.say
    twin = copy_program(program)
    assert twin.cached("a") is twin.say is not program.say
    assert twin.cached.cache_parameters() == {"maxsize": 7, "typed": True}
    assert twin.cached.cache_info().misses == 1 and program.cached.cache_info().currsize == 1
    assert twin.cached.__name__ == "ask" and twin.cached.note == [twin.say]
    again = copy_program(twin)
    assert again.cached("a") is again.say


def test_a_cached_function_may_call_itself() -> None:
    predictor = dspy.Predict("question -> answer")

    @functools.cache
    def deep(n: int) -> dspy.Predict:
        return predictor if n == 0 else deep(n - 1)

    twin = copy_program(Asks(deep=deep))
    assert twin.deep(3) is twin.deep(0) is not predictor
    assert isinstance(twin.deep(0), dspy.Predict) and deep.cache_info().currsize == 0


def test_a_tool_writes_into_the_list_that_its_copy_reads() -> None:
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)

    add = dspy.Tool(functools.partial(note), name="note")
    program = Asks(notes=notes, tools={"note": add}, other=len)
    twin = copy_program(program)
    twin.tools["note"](text="a")
    assert twin.notes == ["a"] and notes == [] and twin.other is len
    add(text="b")
    assert twin.notes == ["a"] and notes == ["b"]


def test_a_list_that_a_shared_object_holds_too_is_shared() -> None:
    class Store:
        def __init__(self, notes: list[str]) -> None:
            self.notes = notes

        def add(self, text: str) -> None:
            self.notes.append(text)

    store = Store([])
    program = Asks(notes=store.notes, parts=[store.notes], add=store.add)
    twin = copy_program(program)
    twin.add("a")
    assert twin.notes is twin.parts[0] is store.notes and twin.notes == ["a"]
    assert twin.parts is not program.parts


def test_a_conversation_that_a_module_holds_is_the_copys_own() -> None:
    program = Asks(chat=dspy.History(messages=[{"question": "a"}]))
    twin = copy_program(program)
    twin.chat.messages.append({"question": "b"})
    assert len(program.chat.messages) == 1 and len(twin.chat.messages) == 2


def test_a_cached_function_without_a_module_is_shared() -> None:
    @functools.lru_cache
    def length(text: str) -> int:
        return len(text)

    assert copy_program(Asks(length=length)).length is length


class Index(dict):
    """A long dict that is not made without arguments."""

    def __init__(self, length: int) -> None:
        super().__init__((n, [n]) for n in range(length))


class Lines(list):
    """A list of the same kind."""

    def __init__(self, length: int) -> None:
        super().__init__(range(length))


def test_long_containers_of_any_class_are_data() -> None:
    index, lines = Index(MAX_WALKED_ITEMS + 1), Lines(MAX_WALKED_ITEMS + 1)
    twin = copy_program(Asks(index=index, lines=lines))
    assert twin.index is index and twin.lines is lines


def test_what_an_optimizer_has_tried_is_no_part_of_the_program() -> None:
    answers = dspy.utils.DummyLM([{"reasoning": "", "answer": "a"}] * 20)
    search = dspy.BootstrapFewShotWithRandomSearch(
        metric=lambda gold, pred, trace=None: True, num_candidate_programs=1, num_threads=1
    )
    examples = [dspy.Example(question=word, answer="a").with_inputs("question") for word in "xy"]
    with dspy.context(lm=answers):
        found = search.compile(dspy.ChainOfThought("question -> answer"), trainset=examples)
    assert len(found.candidate_programs) > 1
    assert list(every_predictor(found)) == ["predict"]


def test_an_attribute_of_such_a_name_may_hold_predictors() -> None:
    program = Asks(candidate_programs=[dspy.Predict("question -> answer")])
    assert list(every_predictor(program)) == ["say", "candidate_programs[0]"]
    assert copy_program(program).candidate_programs[0] is not program.candidate_programs[0]
