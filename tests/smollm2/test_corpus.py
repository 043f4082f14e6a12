"""The exercises: what they teach is what DSPy's adapters read, and what is held out is held out."""

from __future__ import annotations

import re
from random import Random

import pytest

from fst_dspy.smollm2.corpus import SHARES, SKILLS
from fst_dspy.smollm2.corpus.render import ADAPTERS, prompt, render
from fst_dspy.smollm2.corpus.words import HELD_OUT_WORDS, WORDS
from programs.triage import QUEUES, TOPICS

DRAWS = 40


def texts(name: str, held_out: bool, draws: int = DRAWS) -> list[str]:
    found = []
    for n in range(draws):
        tree = render(SKILLS[name](Random(f"{name} {n}"), held_out, n % 2 == 0), ADAPTERS["chat"])
        found.append("\n".join(m.content for part in (tree.stem, *tree.branches) for m in part))
    return found


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", SKILLS)
@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_taught_is_read_back_by_the_adapter(
    name: str, adapter: str, held_out: bool
) -> None:
    for n in range(DRAWS // 2):
        exercise = SKILLS[name](Random(n), held_out, n % 2 == 0)
        tree = render(exercise, ADAPTERS[adapter])
        assert len(tree.branches) == len(exercise.turns) and (not held_out or not exercise.demos)
        for turn, branch in zip(exercise.turns, tree.branches, strict=True):
            asked, answer = branch
            assert (asked.role, answer.role, asked.taught, answer.taught) == (
                "user", "assistant", False, True,
            )  # fmt: skip
            found = ADAPTERS[adapter].parse(exercise.signature, answer.content)
            for field, value in turn.outputs.items():
                if adapter == "xml" and name == "tools":  # XML gives arguments back as texts
                    assert str(found[field]).replace("'", "") == str(value).replace("'", "")
                else:
                    assert found[field] == value
            sent = prompt(ADAPTERS[adapter], exercise.signature, exercise.demos, turn)
            assert [m["content"] for m in sent] == [m.content for m in (*tree.stem, asked)]


@pytest.mark.parametrize("name", ["rules", "topics", "strategies"])
def test_the_answer_follows_from_the_prompt_and_from_nothing_else(name: str) -> None:
    for n in range(DRAWS):
        exercise = SKILLS[name](Random(f"{name} {n}"), True, False)
        ((value,),) = [tuple(turn.outputs.values()) for turn in exercise.turns]
        instructions = exercise.signature.instructions.lower()
        assert str(value).lower() in instructions
        assert not any(str(value) in str(given) for given in exercise.turns[0].inputs.values())
        assert exercise.without_rules.instructions == "Answer."


def test_words_of_the_evaluation_and_of_the_tasks_are_not_trained_on() -> None:
    trained = " ".join(text for name in SKILLS for text in texts(name, False)).lower()
    seen = set(re.findall(r"[a-z]+", trained))
    assert not seen & set(HELD_OUT_WORDS) and not set(WORDS) & set(HELD_OUT_WORDS)
    assert not seen & {*TOPICS, *QUEUES}
    assert len(seen & set(WORDS)) > 200
    measured = " ".join(text for name in SKILLS for text in texts(name, True)).lower()
    words = set(re.findall(r"[a-z]+", measured))
    assert len(words & set(HELD_OUT_WORDS)) == len(HELD_OUT_WORDS)


def test_an_exercise_is_determined_by_its_generator() -> None:
    for name in SKILLS:
        assert texts(name, False, 6) == texts(name, False, 6)
        assert len(set(texts(name, False))) == DRAWS
    assert SHARES.keys() == SKILLS.keys() and sum(SHARES.values()) == pytest.approx(1)


def test_the_first_rule_that_holds_decides() -> None:
    for n in range(DRAWS):
        exercise = SKILLS["strategies"](Random(n), False, False)
        lines = re.findall(r"^\d+\. (.*)\.$", exercise.signature.instructions, re.MULTILINE)
        for turn in exercise.turns:
            text, number = turn.inputs.values()
            (value,) = turn.outputs.values()
            for line in lines:
                limit = re.search(
                    r"is (over|above|more than|greater than|under|below|less than) (\d+)", line
                )
                word = re.search(r"mentions (\w+),", line)
                if limit:
                    over = limit[1] in ("over", "above", "more than", "greater than")
                    holds = number > int(limit[2]) if over else number < int(limit[2])
                else:
                    holds = word is None or word[1] in re.findall(r"\w+", text.lower())
                if holds:
                    assert line.endswith(f" {value}")
                    break
