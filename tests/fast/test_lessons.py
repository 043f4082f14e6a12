import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fst_dspy.fast.proposers import lessons as module
from fst_dspy.fast.proposers.lesson import contradicts, gaps
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.stated import marked_lessons, unmarked_sentences
from fst_dspy.fast.proposers.verdicts import quotes_example
from fst_dspy.fast.proposers.words import key_of
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
        ("He left a note: gone. The rule: none.", []),
        ("Right; hint: one.\nTurn 3, 'go': Lesson: two.", ["one.", "two."]),
        ('Take the 5" pipe. Lesson: take the 3" pipe.', ['take the 3" pipe.']),
        ("Lesson: U.S. visas go to amber.", ["U.S. visas go to amber."]),
        ("Lesson: a goes to b. c goes to d.", ["a goes to b.", "c goes to d."]),
        ("**Lesson:** visa is amber.", ["visa is amber."]),
        ("- **Lesson**: visa is amber.", ["visa is amber."]),
        ("**Lesson: visa is amber.**", ["visa is amber."]),
        ("> _Lesson:_ visa is amber.", ["visa is amber."]),
        ("### Lesson\nvisa is amber.\n\nnot this", ["visa is amber."]),
        ("## Lessons\n\n- one\n- two\n## Score\nnot this", ["one", "two"]),
        ("错误。Lesson：签证归琥珀。护照归玛瑙。", ["签证归琥珀。", "护照归玛瑙。"]),
        ("", []),
    ],
)
def test_marked_lessons(feedback: str, lessons: list[str]) -> None:
    assert marked_lessons(feedback) == lessons


@pytest.mark.parametrize(
    "feedback",
    [
        'You read "Hello. Note: I am away until May" too fast.',
        "You read “Hello. Note: I am away until May” too fast.",
        "You read Hello. Note: I am away too fast.",
        "The ticket is:\nNote:\nI am away until May.",
    ],
)
def test_a_marker_in_what_feedback_repeats_is_none(feedback: str) -> None:
    assert marked_lessons(feedback, "Hello.\nNote: I am away until May.") == []
    assert marked_lessons(f"{feedback}\nNote: be kind.", "Note: I am away") == ["be kind."]


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
    by = proposer(tokens=10)
    by.observe(NAME, [record("Lesson: tax tickets go to teal.", "e1")])
    by.observe(NAME, [record("Lesson: visa tickets go to silver.", e) for e in ("e2", "e3")])
    text = propose(by, [record("Lesson: loan tickets go to onyx.", "e4")])
    assert text.split("\n") == ["Answer with the queue.", "visa tickets go to silver.",
                                "loan tickets go to onyx."]  # fmt: skip


def test_an_own_instruction_of_any_length_leaves_the_same_room() -> None:
    own = "Answer with the queue.\n" + "be polite " * 300
    records = [record(f"Lesson: topic{n} tickets go to queue{n}.", f"e{n}") for n in range(9)]
    texts = [propose(proposer(20), records, {NAME: text}) for text in (SEED.components[NAME], own)]
    short, long = (text.split("\n") for text in texts)
    assert short[1:] == long[2:] and len(short) == 5
    assert "\n".join(long[:2]) == own


def test_what_is_too_much_is_found_with_few_counts() -> None:
    counted: list[str] = []

    def count(text: str) -> int:
        counted.append(text)
        return words(text)

    rng = random.Random(0)
    lessons = [f"topic{n} " + "word " * rng.randint(1, 9) + f"is {n}." for n in range(512)]
    records = [record(f"Lesson: {lesson}", f"e{n}") for n, lesson in enumerate(lessons)]
    by = LessonProposer(256, count)
    lines = propose(by, records).split("\n")
    assert len(counted) < 16
    kept = list(map(lessons.index, lines[1:]))
    # As many of the best, here the newest, as there is room for.
    assert sorted(kept) == list(range(min(kept), 512))
    left = 256 - sum(map(words, lines[1:]))
    assert 0 <= left < words(lessons[min(kept) - 1])


def test_a_new_lesson_is_compared_with_those_that_it_can_contradict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[str] = []

    def counted(new: str, old: str, subject: Sequence[str] = ()) -> bool:
        compared.append(new)
        return contradicts(new, old, subject)

    monkeypatch.setattr(module, "contradicts", counted)
    lines = [f"in every test of the suite x{n} is y{n} for z{n}" for n in range(200)]
    proposer().observe(NAME, [record("\n".join(f"Lesson: {line}" for line in lines))])
    assert len(compared) < 200
    same = [f"visa tickets go to queue{n}" for n in range(200)]
    proposer().observe(NAME, [record("\n".join(f"Lesson: {line}" for line in same))])
    assert len(compared) < 600


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
        assert sum(map(words, lines[1:])) <= tokens
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
        "The answer should have been Friday. Your answer should be 15, not 4.",
        "The right answer, or one of them, is `5`. The expected output holds two lines.",
        "The correct queue was jade. The model wrongly predicted the onyx queue.",
        "The model's answer misses the unit. Gold label is amber, got onyx.",
        "Your accuracy is below 0.5 on this. Wrong answers are in lines 3 and 4.",
    ],
)
def test_verdicts_and_scraps_are_not_lessons(feedback: str) -> None:
    assert unmarked_sentences(feedback) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "The answer must be a single word in lower case.",
        "Your answer must name the unit.",
        "The response should be valid JSON with two keys.",
        "Your reply must be in German.",
        "The model number decides which queue it is.",
        "Gold customers go to the priority queue.",
        "The right queue depends on the sender's country.",
        "Right turns on red are fine here.",
        "Expected deliveries go to the tracking desk.",
        "Applicants with a credit score below 600 are declined.",
        "A credit score of 600 or more is enough.",
        "A product recall since 2024 goes to legal.",
        "Answers are single words in lower case.",
        "No refund is paid after 30 days.",
        "It is best to read the sender first.",
        "Correctness of names matters: look at the last line.",
        "Close tickets that nobody has answered.",
    ],
)
def test_rules_are_no_verdicts(sentence: str) -> None:
    assert unmarked_sentences(sentence) == [sentence]


def test_one_marker_among_many_feedbacks_does_not_end_what_is_learned_without() -> None:
    by = proposer()
    sentence = "Totals must include the tax."
    by.observe(NAME, [record(sentence, "e1"), record(sentence, "e2")])
    by.observe(NAME, [record("Note: the desk is closed today.", "e3")])
    other = json.loads(json.dumps(by.state()))
    by.observe(NAME, [record("Always look at the sender first.", "e4")])
    assert len(by.lessons(NAME)) == 3
    by.observe(NAME, [record("Lesson: tax goes to teal.", "e5")])
    assert set(by.lessons(NAME)) == {"the desk is closed today.", "tax goes to teal."}
    again = proposer()
    again.load_state(other)
    again.observe(NAME, [record("Lesson: tax goes to teal.", "e5")])
    assert len(again.lessons(NAME)) == 2


def test_of_a_metric_that_marks_some_of_its_feedback_only_what_is_marked_is_taken() -> None:
    chatter = "Our team looked at it on the same day."
    records = [record("Lesson: tax goes to teal.", "e1"), record(chatter, "e2")]
    by = proposer()
    assert propose(by, records).split("\n")[1:] == ["tax goes to teal."]
    later = [record(chatter, "e3"), record("Lesson: visa goes to jade.", "e4")]
    assert chatter not in propose(by, later)
    assert chatter not in propose(by, [record(chatter, "e5")])


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


def test_what_is_remembered_does_not_grow_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric whose lessons are all new ones, as a judge's are: most never reach a prompt."""
    monkeypatch.setattr(module, "MOST_ADDED", 20)
    one, text, sizes = proposer(40), "Answer.", []
    for turn in range(12):
        told = [f"Lesson: case {turn} {n} {n * turn} goes to desk {turn * n}." for n in range(60)]
        rows = [record(told[n], f"e{n}") for n in range(60)]
        text = one.propose({NAME: text}, {NAME: rows}, [NAME])[NAME]
        state = json.loads(json.dumps(one.state()))
        sizes.append(len(state["added"][NAME]))
        assert set(text.split("\n")[1:]) <= set(state["added"][NAME]), "those in use stay"
    assert max(sizes) <= 20


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


def test_only_keys_that_share_a_gap_contradict() -> None:
    rng = random.Random(0)
    keys = [" ".join(rng.choices("abc", k=rng.randint(1, 5))) for _ in range(300)]
    pairs = [(a, b) for a in keys for b in keys if contradicts(a, b)]
    assert len(pairs) > 1000
    shared = {key: {*gaps(key)} for key in keys}
    assert all(shared[a] & shared[b] for a, b in pairs)
    alike = [(a, b) for a in keys for b in keys if shared[a] & shared[b]]
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("C++ tickets go to amber.", "C# tickets go to amber."),
        ("a discount < 5 is refused.", "a discount > 5 is refused."),
        ("a fee of $5 is due.", "a fee of €5 is due."),
    ],
)
def test_what_differs_in_a_symbol_says_another_thing(one: str, other: str) -> None:
    text = propose(proposer(), [record(f"Lesson: {one}", "e1"), record(f"Lesson: {other}", "e2")])
    assert text.split("\n")[1:] == [one, other]


@pytest.mark.parametrize(
    "label",
    [
        lambda queue, number: {"queue": queue, "priority": number},
        lambda queue, number: {"out": json.dumps({"queue": queue, "priority": number})},
        lambda queue, number: {"out": json.dumps([[queue, None], {"all": number}])},
    ],
    ids=["flat", "json", "nested"],
)
def test_what_only_names_the_parts_of_a_label_is_a_verdict(label: Any) -> None:
    queues = ["amber", "silver", "teal", "onyx", "ruby"]
    records = [
        record(
            f"The ticket belonged to {queue} with priority {number}.",
            f"e{number}",
            labels=label(queue, number),
        )
        for number, queue in enumerate(queues, 1)
    ]
    assert propose(proposer(), records) == SEED.components[NAME]
    assert propose(proposer(), [*records, *records]) == SEED.components[NAME]


def test_an_empty_instruction_becomes_the_lessons() -> None:
    text = propose(proposer(), [record("Lesson: visa goes to silver.")], {NAME: ""})
    assert text == "visa goes to silver."
    assert propose(proposer(), [record("Correct.")], {NAME: ""}) == ""


CHINESE = {"签证": "琥珀", "护照": "玛瑙", "税务": "青玉", "养老": "珍珠"}


@pytest.mark.parametrize("marker", ["", "Lesson：", "Lesson: "])
def test_lessons_are_learned_in_scripts_without_spaces(marker: str) -> None:
    records = [
        record(
            f"{marker}{topic}工单应当转到{queue}队列，请不要转到别处。",
            f"{topic}{number}",
            Inputs={"t": f"您好我想咨询{topic}的申请手续{number}"},
            labels={"q": queue},
        )
        for topic, queue in CHINESE.items()
        for number in range(3)
    ]
    lines = propose(proposer(), records, {NAME: "请分类。"}).split("\n")
    assert [line[:2] for line in lines[1:]] == list(CHINESE)
    verdicts = [record(f"这张工单应当转到{r['labels']['q']}。", **keep(r)) for r in records]
    assert propose(proposer(), verdicts) == SEED.components[NAME]


def keep(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"example": row["example_id"], "Inputs": row["Inputs"], "labels": row["labels"]}


def test_a_changed_policy_is_followed_in_scripts_without_spaces() -> None:
    by = proposer()
    old = propose(by, [record("Lesson：签证工单转到琥珀队列。", "e1")])
    text = propose(by, [record("Lesson：签证工单转到青玉队列。", "e2")], {NAME: old})
    assert text == "Answer with the queue.\n签证工单转到青玉队列。"
