"""Demos as fast weights: the bank, the choice, the budget, and their way through a fast phase."""

import datetime
import enum
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import make_rollout
from rule_runner import SEED, TRAIN, VAL, RuleRunner, Scripted, run, scored, words

from fst_dspy.config import FastConfig
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.proposers.demos import (
    BANK_SIZE,
    SOURCE,
    DemoProposer,
    only_fewer,
    shown_examples,
)
from fst_dspy.rollouts.jobs import RolloutJob
from fst_dspy.student.candidate import bind, decode_demos, encode_demos, example_id, make_candidate
from fst_dspy.types import Failure, PredictorTrace, Rollout, Turn

NAME = "solve.demos"


def rollout(
    ident: str, text: str, answer: Any, reward: float = 1.0, failure: Failure | None = None
) -> Rollout:
    trace = PredictorTrace("solve", {"ticket": text}, {"reasoning": "so", "queue": answer}, "")
    return make_rollout(reward, example_id=ident, traces=(trace,), failure=failure)


def filled(tokens: int = 100, answers: Sequence[str] = ("red", "blue", "green")) -> DemoProposer:
    by = DemoProposer(tokens, words)
    by.bank([rollout("bad", "a bad one", "black", 0.0)])
    by.bank([rollout(f"e{n}", f"ticket {n}", answers[n % len(answers)]) for n in range(12)])
    return by


def propose(by: DemoProposer, text: str = "[]", shown: Sequence[str] = ()) -> list[dspy.Example]:
    records = [{"example_id": i, "Inputs": {"ticket": "x"}, "score": 1.0} for i in shown]
    return decode_demos(by.propose({NAME: text}, {NAME: records}, [NAME])[NAME])


def test_demos_cover_the_answers_first_and_carry_the_reasoning() -> None:
    demos = propose(filled(tokens=75))
    assert sorted(demo.queue for demo in demos) == ["blue", "green", "red"]
    assert all(demo.reasoning == "so" and demo[SOURCE].startswith("e") for demo in demos)


def test_only_success_is_shown() -> None:
    by = DemoProposer(100, words)
    assert not by.ready(NAME)
    by.bank([rollout("e0", "x", "red", 0.0), rollout("e1", "y", "red", 0.0)])
    assert not by.ready(NAME) and propose(by) == []
    by.bank([rollout("e2", "z", "red", 1.0, Failure("no_calls", "none"))])
    assert not by.ready(NAME)
    by.bank([rollout("e3", "z", "red", 0.9), rollout("e4", "w", "blue", 0.4)])
    assert by.ready(NAME) and [demo[SOURCE] for demo in propose(by)] == ["e3"]


def test_of_an_agents_good_episode_the_turns_that_went_wrong_are_not_shown() -> None:
    def act(seen: str, action: str) -> PredictorTrace:
        return PredictorTrace("solve", {"ticket": seen}, {"queue": action}, "")

    def turn(action: str, status: Any) -> Turn:
        return Turn("seen", action, "shown", 0.0, status, 0.0, 1)

    traces = (act("a", "jump"), act("b", "up"), act("c", "left"), act("d", "finish"))
    turns = (turn("jump", "invalid"), turn("up", "error"), turn("left", "ok"))
    by = DemoProposer(100, words)
    by.bank([rollout("bad", "x", "black", 0.0)])
    by.bank([replace(make_rollout(1.0, example_id="e", traces=traces), turns=turns)])
    assert {demo.queue for demo in propose(by)} == {"left", "finish"}


def test_examples_of_the_minibatch_are_not_shown() -> None:
    shown = [f"e{n}" for n in range(9)]
    assert {demo[SOURCE] for demo in propose(filled(), shown=shown)} <= {"e9", "e10", "e11"}


@given(st.integers(0, 80), st.integers(0, 3))
def test_the_budget_holds(tokens: int, turns: int) -> None:
    by = filled(tokens)
    for _ in range(turns + 1):
        demos = propose(by)
        assert sum(map(by._tokens, demos)) <= tokens


def test_every_other_turn_takes_demos_away_until_none_are_left() -> None:
    by = filled(tokens=100)
    text = encode_demos(propose(by))
    count = len(decode_demos(text))
    assert count > 3
    while count:
        fewer = propose(by, text)
        assert len(fewer) == count // 2
        assert only_fewer(encode_demos(fewer), text)
        text, count = encode_demos(fewer), len(fewer)
        propose(by, text)


def test_the_students_own_demos_stay() -> None:
    own = dspy.Example(ticket="mine", queue="pink")
    by = filled(tokens=60)
    demos = propose(by, encode_demos([own]))
    assert demos[0].toDict() == own.toDict() and len(demos) > 1
    assert propose(by, encode_demos(demos))[0].toDict() == own.toDict()


def test_the_students_own_demos_take_no_room_of_those_learned() -> None:
    own = dspy.Example(ticket="mine " * 500, queue="pink")
    demos = propose(filled(tokens=60), encode_demos([own]))
    assert [demo.toDict() for demo in demos[1:]] == [d.toDict() for d in propose(filled(60))]


def test_the_tokens_of_a_demo_are_counted_once() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return words(text)

    by = DemoProposer(100, count)
    by.bank([rollout("bad", "a bad one", "black", 0.0)])
    by.bank([rollout(f"e{n}", f"ticket {n}", "red") for n in range(12)])
    for _ in range(3):
        propose(by)
    assert len(counted) == len(set(counted)) == 12


def test_fields_may_have_any_name() -> None:
    trace = PredictorTrace("solve", {"base": "3", "self": "4"}, {"area": "12"}, "")
    by = DemoProposer(100, words)
    by.bank([rollout("bad", "a bad one", "black", 0.0)])
    by.bank([make_rollout(1.0, example_id="e", traces=(trace,))])
    (demo,) = propose(by)
    assert demo.toDict() == {"base": "3", "self": "4", "area": "12", SOURCE: "e"}


def test_words_of_scripts_without_spaces_are_covered_too() -> None:
    by = DemoProposer(90, words)
    by.bank([rollout("bad", "坏", "黑", 0.0)])
    by.bank([rollout(f"v{n}", f"我想咨询签证的手续{n}", "红") for n in range(8)])
    by.bank([rollout("t", "税务申报怎么办理", "红")])
    assert "t" in {demo[SOURCE] for demo in propose(by)[:2]}


def test_the_bank_is_bounded_and_keeps_rare_answers() -> None:
    by = filled()
    by.bank([rollout("rare", "once", "gold")])
    by.bank([rollout(f"x{n}", f"more {n}", "red") for n in range(5 * BANK_SIZE)])
    calls = by.state()["bank"]["solve"]
    assert len(calls) == BANK_SIZE
    assert "gold" in {call["outputs"]["queue"] for call in calls}


def test_what_json_cannot_hold_is_left_out() -> None:
    by = DemoProposer(100, words)
    by.bank([rollout("e0", "x", object()), rollout("e1", "y", "red", 0.0)])
    assert not by.ready(NAME)


class Colour(enum.Enum):
    """An answer that is no text."""

    RED = "red"
    BLUE = "blue"


class Size(enum.Enum):
    """Members that DSPy reads by their names alone."""

    SMALL = enum.auto()
    LARGE = enum.auto()


class Place(pydantic.BaseModel):
    """One whose fields are not in the order of the alphabet."""

    town: str
    at: datetime.date


PLACE = Place(town="Ulm", at=datetime.date(2024, 2, 29))


@pytest.mark.parametrize(
    ("answer", "kind", "shown"),
    [
        (Colour.RED, Colour, "red"),
        (Size.LARGE, Size, "LARGE"),
        (PLACE.at, datetime.date, "2024-02-29"),
        (PLACE, Place, '{"town": "Ulm", "at": "2024-02-29"}'),
        ({Colour.BLUE: {"b", "a"}}, dict[Colour, set[str]], '{"blue": ["a", "b"]}'),
        (np.int64(3), int, "3"),
        ([np.bool_(True)], list[bool], "[true]"),
    ],
    ids=["enum", "number", "date", "model", "keys", "numpy", "numpys"],
)
def test_typed_answers_are_shown_as_they_are_read(answer: Any, kind: Any, shown: str) -> None:
    by = DemoProposer(100, words)
    by.bank([rollout("e0", "x", answer), rollout("e1", "y", "red", 0.0)])
    (demo,) = propose(by)
    signature = dspy.Signature("ticket -> reasoning").append("queue", dspy.OutputField(), kind)
    adapter = dspy.ChatAdapter()
    said = adapter.format(signature, [demo], {"ticket": "z"})[-2]["content"]
    assert f"[[ ## queue ## ]]\n{shown}\n" in said
    assert adapter.parse(signature, said)["queue"] == answer


def test_state_goes_through_json_and_continues_identically() -> None:
    one, other = filled(), DemoProposer(100, words)
    propose(one)
    other.load_state(json.loads(json.dumps(one.state())))
    for _ in range(3):
        assert encode_demos(propose(one)) == encode_demos(propose(other))
    assert one.state() == other.state()


def test_a_candidate_tells_which_examples_it_shows() -> None:
    text = encode_demos(propose(filled()))
    candidate = make_candidate({NAME: text, "solve.instructions": "Answer."})
    assert shown_examples(candidate) == {demo[SOURCE] for demo in decode_demos(text)}
    assert shown_examples(SEED) == frozenset()


def test_the_source_of_a_demo_is_not_in_the_prompt() -> None:
    class Solve(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.solve = dspy.ChainOfThought("ticket -> queue")

    demos = encode_demos(propose(filled()))
    program = bind(Solve(), make_candidate({"solve.predict.demos": demos}))
    predictor = program.solve.predict
    messages = dspy.ChatAdapter().format(predictor.signature, predictor.demos, {"ticket": "t"})
    text = json.dumps(messages)
    assert "ticket 1" in text and "so" in text and SOURCE not in text


# In a fast phase


class DemoRunner(RuleRunner):
    """A model that knows an answer if a demo with it is in the prompt, or after ``learned``."""

    learned = False

    def rollout(self, job: RolloutJob, salt: int) -> Rollout:
        text = job.candidate.components[NAME]
        key = f"{self.seed}|{salt}|{example_id(job.example)}|{job.index}"
        shown = f'"queue": "{job.example.topic}"' in text
        chance = 0.9 if self.learned else (0.95 if shown else 0.3)
        right = random.Random(key).random() < chance
        queue = job.example.topic if right else "?"
        trace = PredictorTrace("solve", {"ticket": job.example.ticket}, {"queue": queue}, "")
        ident = example_id(job.example)
        return make_rollout(
            float(right), example_id=ident, candidate_id=job.candidate.id, traces=(trace,)
        )


def phase_with(demos: DemoProposer | None, **config: Any) -> FastPhase:
    return FastPhase(FastConfig(demo_tokens=120, **config), Scripted(lambda *_: {}), 0, demos=demos)


def test_demos_are_evolved_beside_instructions_and_dropped_when_learned() -> None:
    runner = DemoRunner()
    by = DemoProposer(120, words)
    phase = phase_with(by)
    end = run(phase, runner, scored(runner, SEED), iterations=8)
    with_demos = [c for c in end.candidates if shown_examples(c)]
    assert with_demos and all(c.source == "demos" for c in with_demos)
    # Validation examples are never shown, and never banked.
    val_ids = {example_id(e) for e in VAL}
    banked = {call["example_id"] for call in by.state()["bank"]["solve"]}
    assert banked and not banked & val_ids and banked <= {example_id(e) for e in TRAIN}
    best_mean = max(sum(row) / len(row) for row in end.score_K_V)
    assert best_mean > 0.5
    # Once the weights know it all, the shorter prompt does as well and is accepted.
    runner.learned = True
    before = phase.stats.accepted
    longest = max(with_demos, key=lambda c: len(decode_demos(c.components[NAME])))
    sizes: set[int] = set()
    for cycle in range(2, 6):
        end = run(phase, runner, scored(runner, longest), iterations=6, cycle=cycle)
        sizes |= {len(decode_demos(c.components[NAME])) for c in end.candidates}
    assert phase.stats.accepted > before
    assert min(sizes) < len(decode_demos(longest.components[NAME]))


def test_without_a_budget_demos_are_left_alone() -> None:
    runner = DemoRunner()
    phase = phase_with(None)
    end = run(phase, runner, scored(runner, SEED), iterations=4)
    assert [c.components[NAME] for c in end.candidates] == ["[]"]
    assert set(phase.proposer.names) == {"solve.instructions"}


@pytest.mark.parametrize("selector", ["round_robin", "worst_first"])
def test_instructions_and_demos_take_turns(selector: str) -> None:
    runner = DemoRunner()
    by = DemoProposer(120, words)
    phase = phase_with(by, component_selector=selector)
    run(phase, runner, scored(runner, SEED), iterations=8)
    instructions = len(phase.proposer.names)
    assert 3 <= instructions <= 5
    assert by.state()["turns"]["solve.demos"] == 8 - instructions
