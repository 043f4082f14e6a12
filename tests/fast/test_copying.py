"""Instructions that copy training examples are refused; what many have in common is no copy."""

import logging
import random
import re
import time

import dspy
import pytest
from dspy.utils import DummyLM
from rule_runner import NAME, QUEUES, RULES, SEED, VAL, RuleRunner, Scripted, scored, words

from fst_dspy.config import FastConfig
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.proposers.copying import RUN, CopyGuard
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.fast.proposers.protocol import ProposalError
from fst_dspy.fast.proposers.reflection import ReflectionLMProposer

STEM = "Read the letter below with care and say which queue it belongs to, by its topic alone."
RNG = random.Random(0)
VOCABULARY = ["garden", "window", "letter", "payment", "river", "copper", "answer", "morning"]


def letter(number, topic="visa"):
    text = " ".join(RNG.choice(VOCABULARY) for _ in range(30))
    ticket = f"{STEM} Letter {number}: {text} about {topic}."
    return dspy.Example(ticket=ticket, topic=topic).with_inputs("ticket")


TRAIN = [letter(number, topic) for number, topic in enumerate([*QUEUES] * 5)]
BODY = TRAIN[7].ticket.removeprefix(STEM)


def guard_of(examples=TRAIN):
    guard = CopyGuard()
    guard.study(examples)
    return guard


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        (f"Answer with the queue. For example:{BODY}", True),
        (f"Answer.\n{BODY[20:80].upper()}!", True),
        (BODY.replace(" ", "\n - "), True),
        (f"Answer. {BODY[20:50]}", False),
        (f"Answer. {STEM} {STEM}", False),
        ("\n".join(RULES.values()), False),
        (" ".join(VOCABULARY * 4), False),
        ("", False),
        (BODY[:RUN // 2], False),
    ],
)  # fmt: skip
def test_a_long_run_of_one_example_is_a_copy(text, refused):
    copied = guard_of().copied(text, "Answer with the queue.")
    assert (copied is not None) is refused
    if refused:
        example = " ".join(re.findall(r"\w+", TRAIN[7].ticket.lower()))
        assert len(copied) == RUN and copied in example


def test_wherever_it_begins():
    guard, clean = guard_of(), BODY.strip().replace(":", "").replace(".", "")
    for start in range(len(clean) - RUN - 1):
        run = clean[start : start + RUN].strip()
        for before in range(0, 60, 7):
            text = "x" * before + " " + clean[start : start + RUN + 2]
            assert guard.copied(text, "") is not None, (start, before, run)


class NeverSearched(str):
    """Of 100,000 examples a search takes a tenth of a second, and a proposal has hundreds."""

    def __contains__(self, part):
        raise AssertionError("the examples are gone through")

    find = index = count = __contains__


def test_many_examples_are_not_gone_through_for_each_text():
    guard = guard_of()
    guard._text = NeverSearched(guard._text)
    assert guard.copied(f"Answer with the queue. For example:{BODY}", "") is not None
    assert guard.copied("\n".join(RULES.values()), "") is None
    assert guard.copied(f"Answer. {STEM} {STEM}", "") is None


def test_what_the_parent_had_is_its_own():
    guard = guard_of()
    assert guard.copied(f"Answer.{BODY} More.", f"Say it.{BODY}") is None
    other = TRAIN[9].ticket.removeprefix(STEM)
    assert guard.copied(f"Answer.{BODY} {other}", f"Say it.{BODY}") is not None


def test_what_few_examples_share_is_a_copy_and_what_many_do_is_not():
    passage = " ".join(RNG.choice(VOCABULARY) for _ in range(30))
    for holders, refused in ((1, True), (3, True), (10, False)):
        shared = [
            dspy.Example(q=f"{passage} question {n}", hint=["a", {"b": n}]).with_inputs("q", "hint")
            for n in range(holders)
        ]
        guard = guard_of([*shared, *TRAIN])
        assert (guard.copied(f"Mind: {passage}", "") is not None) is refused, holders


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [dspy.Example(q=5, a=1).with_inputs("q")] * 3,
        [dspy.Example(q=w).with_inputs("q") for w in VOCABULARY],
        [dspy.Example(q="the same text in all of the training examples, word for word, "
                        "and more of it", n=n).with_inputs("q", "n") for n in range(6)],
    ],
    ids=["none", "numbers", "words", "equal"],
)  # fmt: skip
def test_short_inputs_are_never_copied(examples):
    guard = guard_of(examples)
    assert guard.copied(" ".join(VOCABULARY), "") is None
    assert (
        guard.copied("Classify: garden, window, letter, payment, river, copper; 5 5 5", "") is None
    )


def test_lists_and_other_scripts_count():
    passages = ["".join(chr(0x4E00 + RNG.randrange(3000)) for _ in range(80)) for _ in range(6)]
    examples = [dspy.Example(q={"a": [p]}).with_inputs("q") for p in passages]
    assert guard_of(examples).copied(f"答：{passages[2][10:70]}", "") is not None
    assert guard_of(examples).copied(f"答：{passages[2][10:40]}", "") is None


def test_demos_may_show_examples():
    guard = guard_of()
    before = {NAME: "Answer.", "solve.demos": "[]"}
    guard.check({"solve.demos": BODY}, before)
    with pytest.raises(ProposalError, match=r"copy_guard=False") as caught:
        guard.check({NAME: f"Answer. {BODY}"}, before)
    assert caught.value.kind == "copied_example"


def test_one_guard_is_fed_once(monkeypatch):
    guard = CopyGuard()
    lessons = LessonProposer(256, words, guard)
    reflection = ReflectionLMProposer(DummyLM([]), 256, words, fallback=lessons)
    for proposer in (lessons, reflection):
        memory = Memory(proposer)
        assert memory.guard is guard
    memory.study(TRAIN)
    assert guard.copied(BODY, "") is not None
    read = []
    monkeypatch.setattr("fst_dspy.fast.proposers.copying._normal", read.append)
    guard.study(list(TRAIN))
    assert read == []
    assert Memory(lessons, config=FastConfig(copy_guard=False)).guard is None
    assert Memory(Scripted(copying)).guard is not None


def test_it_is_quick():
    many = [letter(number) for number in range(2000)]
    guard, text = guard_of(many), "\n".join([STEM, *RULES.values()] * 5)
    began = time.perf_counter()
    assert guard.copied(text, "Answer.") is None
    assert time.perf_counter() - began < 2.0


class Letters(RuleRunner):
    """Routes letters as it does tickets."""


def phase_run(proposer, **config):
    runner = Letters()
    phase = FastPhase(FastConfig(**config), proposer, 0)
    start = scored(runner, SEED)
    found = phase.run(runner, start, TRAIN, VAL, cycle=1, iterations=4, policy_version=0)
    return phase, found


def copying(n, texts, names):
    return {NAME: f"{texts[NAME]} {TRAIN[n].ticket}\n" + "\n".join(RULES.values())}


def test_a_copy_is_refused_counted_and_told(caplog):
    with caplog.at_level(logging.WARNING):
        phase, found = phase_run(Scripted(copying))
    assert phase.stats.errors == {"copied_example": 4} and found.candidates == (SEED,)
    assert "no proposal (copied_example): the new text of solve.instructions copies" in caplog.text
    phase, found = phase_run(Scripted(copying), copy_guard=False)
    assert not phase.stats.errors and phase.stats.accepted


def test_lessons_without_copies_are_learned_all_the_same():
    class Quoting(Letters):
        def rollout(self, job, salt):
            made = super().rollout(job, salt)
            ticket = job.example.ticket.replace(".", "")
            said = f"{made.feedback}\nLesson: {ticket} belongs elsewhere."
            return type(made)(**{**vars(made), "feedback": said})

    runner, guard = Quoting(), CopyGuard()
    phase = FastPhase(FastConfig(), LessonProposer(256, words, guard), 0)
    start = scored(runner, SEED)
    found = phase.run(runner, start, TRAIN, VAL, cycle=1, iterations=4, policy_version=0)
    texts = [candidate.components[NAME] for candidate in found.candidates]
    assert phase.stats.accepted and not phase.stats.errors
    assert any(rule in text for text in texts for rule in RULES.values())
    assert not any("elsewhere" in text for text in texts)
