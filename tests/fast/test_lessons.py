import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.fast.proposers.lessons import (
    LessonProposer,
    contradicts,
    key_of,
    marked_lessons,
    opening,
    quotes_example,
    unmarked_sentences,
)
from fst_dspy.student.candidate import make_candidate

NAME = "solve.instructions"
SEED = make_candidate({NAME: "Answer with the queue.", "solve.demos": "[]"})


def words(text: str) -> int:
    return len(text.split())


def record(feedback: str, example: str = "e0", score: float = 0.0, **more: Any) -> dict[str, Any]:
    return {
        "Inputs": {"ticket": f"ticket {example}"},
        "Generated Outputs": {"queue": "slate"},
        "Feedback": feedback,
        "score": score,
        "example_id": example,
        "labels": {"queue": "silver"},
        "failure": None,
        **more,
    }


def proposer(tokens: int = 256) -> LessonProposer:
    return LessonProposer(tokens, words)


def propose(
    by: LessonProposer, records: list[dict[str, Any]], texts: Mapping[str, str] = SEED.components
) -> str:
    return by.propose(texts, {NAME: records}, [NAME])[NAME]


@pytest.mark.parametrize(
    ("feedback", "lessons"),
    [
        ("Wrong. Lesson: visa goes to silver.", ["visa goes to silver."]),
        ("rule: a b c. Second one!", ["a b c.", "Second one!"]),
        ("Note: one.\nnothing here\nHint: two.", ["one.", "two."]),
        ("Lessons:\n- first one\n* second one\n\nnot this", ["first one", "second one"]),
        ("Remember: use e.g. metres. Always.", ["use e.g. metres.", "Always."]),
        ("Expected 3.5 but got 4.", []),
        ("The footnote has no marker", []),
        ("", []),
    ],
)
def test_marked_lessons(feedback: str, lessons: list[str]) -> None:
    assert marked_lessons(feedback) == lessons


def test_lessons_are_appended_one_a_line_best_supported_first() -> None:
    text = propose(
        proposer(),
        [
            record("Lesson: tax tickets go to teal.", "e1"),
            record("Lesson: visa tickets go to silver.", "e2"),
            record("LESSON: Visa tickets go to silver", "e3"),
        ],
    )
    assert text.split("\n") == [
        "Answer with the queue.",
        "visa tickets go to silver.",
        "tax tickets go to teal.",
    ]


def test_failed_examples_count_more() -> None:
    by = proposer()
    by.observe(
        NAME,
        [
            record("Lesson: tax tickets go to teal.", "e1", score=1.0),
            record("Lesson: tax tickets go to teal.", "e2", score=1.0),
            record("Lesson: visa tickets go to silver.", "e3", score=0.0),
        ],
    )
    assert by.lessons(NAME) == ["visa tickets go to silver.", "tax tickets go to teal."]


def test_memory_reaches_every_later_child_whatever_its_parent() -> None:
    by = proposer()
    first = propose(by, [record("Lesson: visa tickets go to silver.", "e1")])
    text = propose(by, [record("Lesson: tax tickets go to teal.", "e2")])
    assert "visa tickets go to silver." in text and "tax tickets go to teal." in text
    child = propose(by, [record("Correct.", "e3", score=1.0)], {NAME: first})
    assert child.split("\n")[1:] == ["visa tickets go to silver.", "tax tickets go to teal."]


def test_a_fresh_proposer_keeps_the_candidates_own_lessons() -> None:
    parent = {NAME: "Answer with the queue.\nvisa tickets go to silver."}
    text = propose(proposer(), [record("Lesson: tax tickets go to teal.", "e1")], parent)
    assert text == parent[NAME] + "\ntax tickets go to teal."


def test_a_lesson_that_is_there_already_is_not_added() -> None:
    parent = {NAME: "Answer with the queue. Visa tickets go to silver."}
    text = propose(proposer(), [record("Lesson: visa tickets go to silver.")], parent)
    assert text == parent[NAME]


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ("visa tickets go to amber", "visa tickets go to silver", True),
        ("round up to two decimals", "round up to three decimals", True),
        ("visa is amber", "visa is silver", True),
        ("loan tickets go to silver", "visa tickets go to silver", False),
        ("loan tickets go to amber", "visa tickets go to silver", False),
        ("send loan tickets to silver", "send visa tickets to silver", False),
        ("visa tickets go to silver", "visa tickets go to silver", False),
        ("visa tickets go to the silver queue", "visa tickets go to silver", False),
        ("a b c d e f", "a b c x y z", False),
    ],
)
def test_contradicts(new: str, old: str, expected: bool) -> None:
    assert contradicts(new, old) is expected


def test_a_differing_word_that_the_example_is_about_is_the_subject() -> None:
    assert contradicts("use metric units for weight", "use metric units for length")
    assert not contradicts("use metric units for weight", "use metric units for length", ["weight"])


def test_subjects_are_told_apart_by_the_inputs() -> None:
    text = propose(
        proposer(),
        [
            record("Rule: use metric units for weight.", "e1", Inputs={"q": "what weight has it"}),
            record("Rule: use metric units for length.", "e2", Inputs={"q": "what length has it"}),
        ],
    )
    assert "weight" in text and "length" in text


def test_a_changed_policy_replaces_the_old_lesson() -> None:
    by = proposer()
    old = propose(by, [record("Lesson: visa tickets go to silver.", "e1")] * 3)
    text = propose(by, [record("Lesson: visa tickets go to amber.", "e2")], {NAME: old})
    assert text == "Answer with the queue.\nvisa tickets go to amber."


def test_a_changed_policy_replaces_a_line_of_the_students_own_instruction() -> None:
    own = "Answer with the queue.\nvisa tickets go to silver.\ntax tickets go to teal."
    by = LessonProposer(256, words)
    text = propose(by, [record("Lesson: visa tickets go to amber.")], {NAME: own})
    assert text.split("\n") == [
        "Answer with the queue.",
        "tax tickets go to teal.",
        "visa tickets go to amber.",
    ]


def test_lessons_that_keep_coming_back_after_each_other_both_hold() -> None:
    by = proposer()
    for number in range(4):
        unit = "length" if number % 2 else "weight"
        text = propose(by, [record(f"Rule: use metric units for {unit}.", f"e{number}")])
    assert "weight" in text and "length" in text


def test_the_least_supported_lesson_goes_when_the_budget_is_short() -> None:
    by = proposer(tokens=14)
    by.observe(NAME, [record("Lesson: tax tickets go to teal.", "e1")])
    by.observe(NAME, [record("Lesson: visa tickets go to silver.", e) for e in ("e2", "e3")])
    text = propose(by, [record("Lesson: loan tickets go to onyx.", "e4")])
    assert text.split("\n") == ["Answer with the queue.", "visa tickets go to silver.",
                                "loan tickets go to onyx."]  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["visa", "tax", "loan", "card", "fraud"]),
            st.sampled_from(["silver", "teal", "onyx"]),
        ),
        max_size=25,
    ),
    st.integers(4, 40),
)
def test_budget_and_consistency_hold_whatever_comes(
    stated: list[tuple[str, str]], tokens: int
) -> None:
    by = proposer(tokens)
    text = SEED.components[NAME]
    for number, (topic, queue) in enumerate(stated):
        feedback = f"Lesson: {topic} tickets go to {queue}."
        text = propose(by, [record(feedback, f"e{number}")], {NAME: text})
        lines = text.split("\n")
        assert lines[0] == SEED.components[NAME]
        assert words(text) <= tokens
        assert len({key_of(line) for line in lines}) == len(lines)


def test_format_failures_teach_nothing() -> None:
    records = [record("Lesson: never seen.", failure=kind) for kind in ("parse", "truncated")]
    assert propose(proposer(), records) == SEED.components[NAME]


def test_without_markers_general_sentences_are_found() -> None:
    records = [
        record("Wrong. The label was silver. Always look at the sender first.", "e1"),
        record("Your answer is wrong. Totals must include the tax. You said slate.", "e2"),
        record("The queue silver is the one here. Totals must include the tax.", "e3"),
    ]
    assert propose(proposer(), records).split("\n") == [
        "Answer with the queue.",
        "Totals must include the tax.",
        "Always look at the sender first.",
    ]


def test_a_sentence_that_quotes_its_example_needs_a_second_one() -> None:
    by = proposer()
    sentence = "All of these go to silver."
    assert quotes_example(sentence, record(""))
    assert sentence not in propose(by, [record(sentence, "e1")])
    assert sentence in propose(by, [record(sentence, "e2")])


@pytest.mark.parametrize(
    "feedback",
    [
        "Correct. The answer is 4 not 5. Well done. You said a b c",
        "Not fully right (score 0.10 of 1): the answer was `Friday`.",
        "Partially correct: the total is off by 3.",
        "Almost right, but the unit is missing. That is not correct at all.",
        "Close! It was wrong because the sum is 15. No, it is spam.",
        "The model answered Friday but Monday was expected.",
        "Your reply misses the second city. This answer is not right.",
        "Model output 'x' does not match 'y'.",
        "3 of 5 items are right. 40% of the keywords are there.",
        "The summary has a ROUGE of 0.4 against the reference. An F1 score of 0.3 was reached.",
        "Good job, the answer is correct.",
    ],
)
def test_verdicts_and_scraps_are_not_lessons(feedback: str) -> None:
    assert unmarked_sentences(feedback) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "Answers are single words in lower case.",
        "No refund is paid after 30 days.",
        "It is best to read the sender first.",
        "Correctness of names matters: look at the last line.",
        "Close tickets that nobody has answered.",
    ],
)
def test_rules_are_no_verdicts(sentence: str) -> None:
    assert unmarked_sentences(sentence) == [sentence]


def test_once_markers_were_seen_other_sentences_do_not_count() -> None:
    by = proposer()
    by.observe(NAME, [record("Lesson: tax tickets go to teal.", "e1")])
    text = propose(by, [record("Please look at the sender first.", "e2")])
    assert "sender" not in text


def test_other_orders_are_proposed_a_few_times_then_nothing() -> None:
    by = proposer()
    lessons = [f"topic{n} tickets go to queue{n}." for n in range(8)]
    records = [record(f"Lesson: {lesson}", f"e{n}") for n, lesson in enumerate(lessons)]
    text = propose(by, records)
    orders = [propose(by, records, {NAME: text}) for _ in range(5)]
    assert len({text, *orders[:3]}) == 4
    assert orders[3:] == [text, text]
    assert all(sorted(order.split("\n")[1:]) == sorted(lessons) for order in orders)


def test_state_goes_through_json_and_continues_identically() -> None:
    first = [record(f"Lesson: topic{n} tickets go to silver.", f"e{n}") for n in range(5)]
    later = [record(f"Lesson: topic{n} tickets go to amber.", f"x{n}") for n in range(3)]
    one, other = proposer(), proposer()
    one.observe(NAME, first)
    other.load_state(json.loads(json.dumps(one.state())))
    for _ in range(3):
        assert propose(one, later) == propose(other, later)
    assert one.state() == other.state()


def test_seeing_the_same_rollouts_again_adds_no_support() -> None:
    by = proposer()
    records = [record("Lesson: tax tickets go to teal.", "e1")]
    by.observe(NAME, records)
    by.observe(NAME, records)
    row = by.state()["memory"][NAME][0]
    assert (row["example_ids"], row["failed_ids"]) == (["e1"], ["e1"])


@given(st.text(max_size=200), st.text(max_size=40))
def test_any_feedback_is_survived(feedback: str, value: str) -> None:
    by = proposer(40)
    text = propose(by, [record(feedback, Inputs={"q": value}), record(value, "e2")])
    assert text.startswith(SEED.components[NAME])
    json.dumps(by.state())


def test_only_keys_that_open_alike_contradict():
    rng = random.Random(0)
    keys = [" ".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(300)]
    pairs = [(a, b) for a in keys for b in keys if contradicts(a, b)]
    assert len(pairs) > 1000
    assert all(opening(a) == opening(b) for a, b in pairs)
    alike = [(a, b) for a in keys for b in keys if opening(a) == opening(b)]
    assert len(alike) < len(keys) ** 2 / 4


def test_sentences_learned_before_the_first_marker_are_taken_back() -> None:
    by = proposer()
    before = propose(by, [record("The desk is closed at noon today.", "e1")])
    assert "noon" in before
    told = [record("The desk is closed at noon today.\nLesson: tax goes to teal.", "e2")]
    after = propose(by, told, {NAME: before})
    assert "tax goes to teal." in after
    assert "noon" not in after


def test_a_quotation_of_several_sentences_is_one_and_teaches_nothing() -> None:
    action = "red doors need a red key. you carry a green key. use it"
    line = f"Turn 15, '{action}': no action as asked was stated."
    assert unmarked_sentences(line) == [line]
    assert quotes_example(line, record(line))


def test_a_sentence_that_the_example_itself_holds_is_no_lesson() -> None:
    seen = {"Inputs": {"observation": "You carry nothing. A red door is straight ahead of you."}}
    sentence = "A red door is straight ahead of you."
    assert quotes_example(sentence, record("", **seen))
    assert sentence not in propose(proposer(), [record(f"Blocked. {sentence}", **seen)])
