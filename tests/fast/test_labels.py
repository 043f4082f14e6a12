"""Feedback that teaches nothing: what is learned from labels instead, and what is said."""

import dataclasses
import datetime
import enum
import json
import logging
import random
from collections import Counter

import dspy
import pytest
from rule_runner import NAME, QUEUES, SEED, TOPICS, Scripted, run, words
from simulated_loop import ScriptedRunner, simulate

from fst_dspy.config import FastConfig
from fst_dspy.fast.acceptance import ProposalStats
from fst_dspy.fast.gepa.adapter import GepaAdapter
from fst_dspy.fast.memory import Memory
from fst_dspy.fast.phase import FastPhase
from fst_dspy.fast.population import best, choose
from fst_dspy.fast.proposers import demos as demos_module
from fst_dspy.fast.proposers import labels as labels_module
from fst_dspy.fast.proposers.demos import SOURCE, DemoProposer, shown_examples, without_answer
from fst_dspy.fast.proposers.labels import MAX_EXAMPLES, read_rules
from fst_dspy.fast.proposers.lessons import ORDERS, LessonProposer
from fst_dspy.fast.reflector import Reflector, Trajectory, make_records
from fst_dspy.fast.trials import TrialPhase
from fst_dspy.loop.sampling import StepSampler
from fst_dspy.run.records import as_read_back
from fst_dspy.student.candidate import decode_demos, encode_demos, example_id, make_candidate
from fst_dspy.types import Failure, PredictorTrace, Rollout

DEMOS = "solve.demos"
CHATTER = ["please help", "any news", "I have waited for two weeks", "it is urgent", "my page"]


def routed(count, seed, policy=QUEUES):
    rng = random.Random(seed)
    return [
        dspy.Example(
            ticket=f"{rng.choice(CHATTER)} {seed}-{n} about {(t := rng.choice(TOPICS))}, hello",
            queue=policy[t],
            topic=t,
        ).with_inputs("ticket")
        for n in range(count)
    ]


TRAIN, VAL = routed(200, 1), routed(24, 2)


def rollout_of(example, answer, feedback, candidate=SEED):
    trace = PredictorTrace("solve", example.inputs().toDict(), {"queue": answer}, answer)
    reward = float(answer == example.queue)
    return Rollout(
        example_id(example), candidate.id, (), (trace,), reward, feedback, None, policy_version=0
    )


FEEDBACK = {
    "expected": "Expected {gold}, got {said}.",
    "should": "The answer {said} was wrong. It should have been {gold}.",
    "arrow": "{said} -> {gold}",
    "long": "Please have a look: the ticket you got had to go to {gold}, and not to {said}, sorry.",
    "none": "",
}
USELESS = {"useless": "Lesson: read every ticket twice."}


class ColonRunner:
    """A model that follows ``topic: queue`` and sentences that say as much, and guesses else."""

    def __init__(self, feedback, seed=0):
        self.feedback, self.seed, self.jobs = feedback, seed, []

    def run(self, jobs, *, channel, salt, version=None):
        self.jobs += jobs
        return [self.rollout(job, salt) for job in jobs]

    def rollout(self, job, salt):
        example = job.example
        rng = random.Random(f"{self.seed}|{salt}|{example_id(example)}|{job.candidate.id}")
        known = f"{example.topic}: {example.queue}" in job.candidate.components[NAME]
        shown = f'"queue": "{example.queue}"' in job.candidate.components.get(DEMOS, "")
        right = rng.random() < (0.8 if known or shown else 0.06)
        answer = example.queue if right else rng.choice(list(QUEUES.values()))
        text = {**FEEDBACK, **USELESS}[self.feedback].format(gold=example.queue, said=answer)
        return rollout_of(example, answer, text, job.candidate)


def phase_on(feedback, iterations=8, demos=None, train=TRAIN, proposer=None, **config):
    runner = ColonRunner(feedback)
    phase = FastPhase(FastConfig(**config), proposer or LessonProposer(256, words), 0, demos=demos)
    start = choose([SEED], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    settings = {"cycle": 1, "iterations": iterations, "policy_version": 0}
    return phase.run(runner, start, train, VAL, **settings), phase, runner


@pytest.mark.parametrize("feedback", FEEDBACK)
def test_labels_teach_where_feedback_only_names_the_answer(feedback):
    found, phase, _ = phase_on(feedback)
    winner = found.candidates[best(found)]
    text = winner.components[NAME]
    assert sum(f"{topic}: {queue}" in text for topic, queue in QUEUES.items()) >= 10
    assert "have been" not in text and "Please have a look" not in text
    assert phase.stats.accepted >= 1 and "advice" not in phase.report()


def test_rules_are_what_the_examples_tell():
    rules = read_rules(TRAIN, ["queue", "reasoning"])
    assert {(r.cue, r.answer) for r in rules} == set(QUEUES.items())
    assert [r.support for r in rules] == sorted((r.support for r in rules), reverse=True)
    assert rules[0].text == f"{rules[0].cue}: {rules[0].answer}"
    two = read_rules(TRAIN, ["queue", "topic"])
    assert any(r.text == "visa: queue silver" for r in two)
    assert any(r.text == "visa: topic visa" for r in two)


class Queue(enum.Enum):
    """Labels that are no texts."""

    AMBER = "amber"
    JADE = "jade"


def test_typed_values_are_told_as_adapters_write_them():
    examples = [
        dspy.Example(ticket=f"{topic} {n}", queue=queue, due=datetime.date(2024, 1, n + 1))
        for topic, queue in (("visa", Queue.AMBER), ("refund", Queue.JADE))
        for n in range(12)
    ]
    examples = [example.with_inputs("ticket") for example in examples]
    assert {rule.text for rule in read_rules(examples, ["queue"])} == {
        "visa: amber",
        "refund: jade",
    }
    trace = PredictorTrace("solve", {"ticket": "visa 0"}, {"queue": Queue.JADE, "all": ["x"]}, "")
    rollout = Rollout(example_id(examples[0]), "c", (), (trace,), 0.0, "", None, 0)
    for kept in (rollout, as_read_back(rollout)):  # in the pool as well
        (record,) = make_records(NAME, [Trajectory(examples[0], kept)])
        assert record["Generated Outputs"] == {"queue": "jade", "all": '["x"]'}
        assert record["labels"] == {"queue": "amber", "due": "2024-01-01"}


def test_chance_is_no_rule():
    rng = random.Random(0)
    for count in (8, 30, 200):
        noise = [
            dspy.Example(
                text=" ".join(
                    rng.choices(
                        ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"], k=5
                    )
                ),
                label=rng.choice(["yes", "no"]),
            ).with_inputs("text")
            for _ in range(count)
        ]
        assert read_rules(noise, ["label"]) == []


@pytest.mark.parametrize(
    "examples",
    [
        [],
        [dspy.Example(q=f"q {n}", a=f"answer {n}").with_inputs("q") for n in range(40)],
        [dspy.Example(q=f"q {n}", a="the same").with_inputs("q") for n in range(40)],
        [dspy.Example(q=f"q {n}", a="word " * 20).with_inputs("q") for n in range(40)],
        [dspy.Example(q="x", a=None).with_inputs("q"), dspy.Example(q=1, a=[2]).with_inputs("q")],
        [dspy.Example(q="\ud800", a="\ud800").with_inputs("q")] * 9,
    ],
)
def test_examples_that_tell_no_rule(examples):
    assert read_rules(examples, ["a", "nowhere"]) == []


def labelled(texts, answers, number=60):
    """Examples with one of some texts, and the answer that goes with it."""
    pairs = list(zip(texts, answers, strict=True))
    return [
        dspy.Example(ticket=f"{text.format(n)}", queue=answer).with_inputs("ticket")
        for n in range(number)
        for text, answer in [pairs[n % len(pairs)]]
    ]


def test_cues_keep_their_symbols():
    texts = ["I use C++ number {}", "I use C# number {}", "I use Java number {}"]
    rules = read_rules(labelled(texts, ["amber", "onyx", "jade"]), ["queue"])
    assert {rule.text for rule in rules} == {"c++: amber", "c#: onyx", "java: jade"}


def test_cues_of_scripts_without_spaces_are_two_characters():
    topics = {"签证": "琥珀", "护照": "玛瑙", "税务": "青玉", "养老": "珍珠"}
    texts = [f"您好，我想咨询{topic}办理的问题，编号{{}}，谢谢。" for topic in topics]
    rules = read_rules(labelled(texts, topics.values(), 200), ["queue"])
    assert {rule.answer for rule in rules} == {*topics.values()}
    for rule in rules:
        (topic,) = (topic for topic, queue in topics.items() if queue == rule.answer)
        assert set(rule.cue) & set(topic)


def test_examples_sorted_by_their_labels_teach_as_others_do():
    """As many data sets are; of many examples not all labels are looked at."""
    texts = ["on visa number {}", "on tax number {}"]
    examples = labelled(texts, ["amber", "onyx"], 2 * MAX_EXAMPLES + 2)
    examples.sort(key=lambda example: example.queue)
    rules = read_rules(examples, ["queue"])
    assert {rule.text for rule in rules} == {"visa: amber", "tax: onyx"}
    demos = DemoProposer(200, words)
    demos.study({example_id(e): e for e in examples})
    demos.know("solve", ["ticket"], ["queue"])
    text = demos.propose({DEMOS: "[]"}, {DEMOS: []}, [DEMOS])[DEMOS]
    assert {demo.queue for demo in decode_demos(text)} == {"amber", "onyx"}


def test_long_documents_are_looked_at_by_their_ends(monkeypatch):
    """To take all words of hundreds of them, at every proposal, took minutes."""
    read = []
    for module in (labels_module, demos_module):
        known = module.telling_words
        monkeypatch.setattr(
            module, "telling_words", lambda text, known=known: read.append(len(text)) or known(text)
        )
    page = "word " * 20_000
    examples = labelled([f"on visa {page} {{}}", f"{page} on tax {{}}"], ["amber", "onyx"])
    rules = read_rules(examples, ["queue"])
    assert {rule.text for rule in rules} == {"visa: amber", "tax: onyx"}
    demos = DemoProposer(30_000, words)
    demos.study({example_id(e): e for e in examples})
    demos.know("solve", ["ticket"], ["queue"])
    text = demos.propose({DEMOS: "[]"}, {DEMOS: []}, [DEMOS])[DEMOS]
    assert [len(demo.ticket) > 100_000 for demo in decode_demos(text)] == [True]
    assert len(read) == 2 * len(examples) and max(read) < 5000


def test_answers_of_several_lines_tell_no_rule():
    texts = ["on visa number {}", "on tax number {}", "on loan number {}"]
    examples = labelled(texts, ["amber\nteam two", "onyx", "jade"])
    rules = read_rules(examples, ["queue"])
    assert [rule.text for rule in rules] == ["loan: jade", "tax: onyx"]


def test_only_a_lesson_that_names_an_answer_goes_before_what_labels_tell():
    own = "Route the ticket.\n- visa → amber\n- tax → jade"
    texts = ["on visa number {}", "on tax number {}", "on loan number {}"]
    examples = labelled(texts, ["amber", "jade", "onyx"])

    def proposed(proposer, lesson, text):
        told = [Trajectory(examples[0], rollout_of(examples[0], "?", lesson))]
        return proposer.propose({NAME: text}, {NAME: make_records(NAME, told)}, [NAME])[NAME]

    proposer = LessonProposer(256, words)
    proposer.study({example_id(e): e for e in examples})
    care = "Handle visa and tax tickets with care."
    lines = proposed(proposer, f"Lesson: {care}", own).split("\n")
    assert lines[:3] == own.split("\n") and set(lines[3:]) == {care, "loan: onyx"}
    other = LessonProposer(256, words)
    other.load_state(json.loads(json.dumps(proposer.state())))
    other.study({example_id(e): e for e in examples})
    for one in (proposer, other):
        after = proposed(
            one, "Lesson: visa and loan tickets go to teal, or jade.", "\n".join(lines)
        )
        assert after.split("\n")[:3] == own.split("\n"), "lines of the student's own stay"
        assert "loan: onyx" not in after and care in after


def test_states_of_before_are_taken_up():
    proposer = LessonProposer(256, words)
    visa = next(e for e in TRAIN if e.topic == "visa")
    told = make_records(NAME, [Trajectory(visa, rollout_of(visa, "?", "Lesson: visa: jade."))])
    text = proposer.propose({NAME: "Answer."}, {NAME: told}, [NAME])[NAME]
    state = proposer.state()
    for name in ("marks", "is_marked", "added"):
        del state[name]
    other = LessonProposer(256, words)
    other.load_state(json.loads(json.dumps(state)))
    chatter = make_records(NAME, [Trajectory(visa, rollout_of(visa, "?", "We are closed today."))])
    assert other.propose({NAME: text}, {NAME: chatter}, [NAME])[NAME] == text
    other.instruction_tokens = 1
    assert other.propose({NAME: text}, {NAME: chatter}, [NAME])[NAME] == "Answer."


def observed(*pairs, topic_rules=False):
    """A proposer that has seen feedback on examples, with their training set."""
    proposer = LessonProposer(256, words)
    examples = [example for example, _ in pairs]
    rollouts = [rollout_of(e, "?", text) for e, text in pairs]
    trajectories = [Trajectory(e, r) for e, r in zip(examples, rollouts, strict=True)]
    proposer.observe(NAME, make_records(NAME, trajectories))
    return proposer


def test_a_sentence_that_only_names_the_answer_is_no_lesson():
    pairs = [(e, f"It should have been {e.queue}.") for e in TRAIN[:40]]
    assert observed(*pairs).lessons(NAME) == []
    pairs = [(e, f"{e.topic} tickets go to {e.queue}.") for e in TRAIN[:40]]
    twice = Counter(e.topic for e in TRAIN[:40])  # once is not enough to hold in general
    assert len(observed(*pairs).lessons(NAME)) == sum(n > 1 for n in twice.values())
    # A rule that changed is stated with two answers, of one subject.
    other = dict(zip(QUEUES, reversed(QUEUES.values()), strict=True))
    pairs += [(e, f"{e.topic} tickets go to {e.queue}.") for e in routed(40, 5, other)]
    lessons = observed(*pairs).lessons(NAME)
    assert lessons and all("tickets go to" in lesson for lesson in lessons)


def test_what_feedback_states_goes_before_what_labels_tell():
    proposer = LessonProposer(256, words)
    proposer.study({example_id(e): e for e in TRAIN})
    visa = [e for e in TRAIN if e.topic == "visa"][:3]
    rest = [e for e in TRAIN if e.topic != "visa"][:9]
    first = [Trajectory(e, rollout_of(e, "?", "")) for e in rest]
    text = proposer.propose({NAME: "Answer."}, {NAME: make_records(NAME, first)}, [NAME])[NAME]
    assert "visa: silver" in text
    told = [Trajectory(e, rollout_of(e, "?", "visa tickets go to silver.")) for e in visa]
    text = proposer.propose({NAME: text}, {NAME: make_records(NAME, told)}, [NAME])[NAME]
    assert "visa: silver" not in text and "visa tickets go to silver." in text
    marked = [Trajectory(e, rollout_of(e, "?", "Lesson: loan goes to amber.")) for e in rest]
    text = proposer.propose({NAME: text}, {NAME: make_records(NAME, marked)}, [NAME])[NAME]
    assert "loan: " not in text and "loan goes to amber." in text
    assert "visa: silver" in text, "feedback that marks its lessons says so of all others"


def test_lessons_and_what_labels_tell_are_tried_together_and_each_alone():
    proposer = LessonProposer(256, words)
    proposer.study({example_id(e): e for e in TRAIN})
    visa = next(e for e in TRAIN if e.topic == "visa")
    told = make_records(NAME, [Trajectory(visa, rollout_of(visa, "?", "Lesson: visa: jade."))])

    def proposed(text):
        return proposer.propose({NAME: text}, {NAME: told}, [NAME])[NAME].split("\n")[1:]

    both, alone, labels, again = (proposed("Answer.") for _ in range(4))
    assert alone == ["visa: jade."], "the metric's word, where labels say silver"
    rules = {f"{topic}: {queue}" for topic, queue in QUEUES.items()}
    assert both == again and set(both) == {*alone, *(rules - {"visa: silver"})}
    assert set(labels) == rules
    assert proposed("\n".join(["Answer.", *both])) != alone, "what was accepted stays"


def told_of(examples, feedback):
    rollouts = [Trajectory(e, rollout_of(e, "?", feedback.format(**e))) for e in examples]
    return {NAME: make_records(NAME, rollouts)}


SENTENCE = "Lesson: {topic} tickets go to {queue}."
"""A lesson of five words, where the rule of the labels has two."""


def test_where_room_is_short_lessons_are_said_as_rules_of_labels():
    proposer = LessonProposer(4 * len(TOPICS), words)
    proposer.study({example_id(e): e for e in TRAIN})
    told = told_of(TRAIN, SENTENCE)
    text = proposer.propose({NAME: "Answer."}, told, [NAME])[NAME]
    rules = {f"{topic}: {queue}" for topic, queue in QUEUES.items()}
    assert set(text.split("\n")[1:]) == rules, "and not the first few sentences"
    roomy = LessonProposer(256, words)
    roomy.load_state(json.loads(json.dumps(proposer.state())))
    roomy.study({example_id(e): e for e in TRAIN})
    lines = roomy.propose({NAME: text}, told, [NAME])[NAME].split("\n")
    in_place = [line.replace(":", " tickets go to") + "." for line in text.split("\n")[1:]]
    assert lines[1:] == in_place, "as feedback words them"
    for _ in range(ORDERS):
        text, before = proposer.propose({NAME: text}, told, [NAME])[NAME], text
        assert text != before and set(text.split("\n")[1:]) == rules, "in another order"
    assert proposer.propose({NAME: text}, told, [NAME])[NAME] == text


def test_a_lesson_that_says_more_than_a_rule_of_labels_is_not_cut_short():
    proposer = LessonProposer(4 * len(TOPICS), words)
    proposer.study({example_id(e): e for e in TRAIN})
    visa = [e for e in TRAIN if e.topic == "visa"]
    rest = told_of([e for e in TRAIN if e.topic != "visa"], SENTENCE)
    proposer.observe(NAME, rest[NAME])
    more = told_of(visa, "Lesson: visa tickets of groups go to {queue}, once stamped.")
    lines = proposer.propose({NAME: "Answer."}, more, [NAME])[NAME].split("\n")
    assert "visa tickets of groups go to silver, once stamped." in lines
    assert "visa: silver" not in lines and "loan: amber" in lines


def test_rules_of_labels_take_the_place_of_lessons_that_say_the_same():
    proposer = LessonProposer(256, words)
    proposer.study({example_id(e): e for e in TRAIN})
    topics = sorted(QUEUES)
    two, third = ([e for e in TRAIN if e.topic in some] for some in (topics[:2], topics[2:3]))
    told = told_of(two, SENTENCE)
    _, alone = (proposer.propose({NAME: "Answer."}, told, [NAME])[NAME] for _ in range(2))
    assert alone.count("tickets go to") == 2 and ": " not in alone
    text = proposer.propose({NAME: alone}, told_of(third, SENTENCE), [NAME])[NAME]
    assert sorted(text.split("\n")[1:]) == sorted(f"{t}: {q}" for t, q in QUEUES.items())


@pytest.mark.parametrize("feedback", ["quoted", "reversed"])
def test_labels_are_tried_where_what_feedback_states_is_of_no_use(feedback):
    said = {
        "quoted": 'The ticket "{ticket}" should go to {queue}.',
        "reversed": "Lesson: {queue} takes {topic} tickets.",
    }[feedback]
    proposer = LessonProposer(256, words)
    proposer.study({example_id(e): e for e in TRAIN})
    rollouts = [(e, rollout_of(e, "?", said.format(**e))) for e in TRAIN]
    told = make_records(NAME, [Trajectory(*pair) for pair in rollouts])
    texts = [proposer.propose({NAME: "Answer."}, {NAME: told}, [NAME])[NAME] for _ in range(3)]
    rules = {f"{topic}: {queue}" for topic, queue in QUEUES.items()}
    assert any(set(text.split("\n")[1:]) == rules for text in texts)


def test_labels_that_changed_replace_the_rules_of_before():
    other = dict(zip(QUEUES, reversed(QUEUES.values()), strict=True))
    proposer = LessonProposer(256, words)
    records = {NAME: make_records(NAME, [Trajectory(TRAIN[0], rollout_of(TRAIN[0], "?", ""))])}
    proposer.study({example_id(e): e for e in TRAIN})
    text = proposer.propose({NAME: "Answer."}, records, [NAME])[NAME]
    proposer.study({example_id(e): e for e in routed(200, 6, other)})
    text = proposer.propose({NAME: text}, records, [NAME])[NAME]
    assert set(text.split("\n")[1:]) == {f"{topic}: {queue}" for topic, queue in other.items()}


def test_a_resumed_phase_continues_identically():
    _, phase, runner = phase_on("should", iterations=3)
    saved = json.loads(json.dumps(phase.state()))
    start = choose([SEED], [[0.0] * len(VAL)], [example_id(e) for e in VAL], 4, 0)
    settings = {"cycle": 2, "iterations": 4, "policy_version": 3}
    straight = phase.run(runner, start, TRAIN, VAL, **settings)
    other = FastPhase(FastConfig(), LessonProposer(256, words), 0)
    other.load_state(saved)
    assert other.run(runner, start, TRAIN, VAL, **settings) == straight
    assert other.state() == phase.state()


def test_a_resumed_loop_of_trials_continues_identically():
    def reward(example, candidate, step, rng):
        known = f"{example.topic}: {example.queue}" in candidate.components[NAME]
        right = rng.random() < (0.7 if known else 0.06)
        return float(right), f"It should have been {example.queue}."

    def looped(after=lambda phase: phase):
        demos = DemoProposer(120, words)
        phase = TrialPhase(
            FastConfig(demo_tokens=120),
            LessonProposer(256, words),
            0,
            steps_per_cycle=6,
            demos=demos,
        )
        return simulate(phase, ScriptedRunner(reward, 0), SEED, TRAIN, VAL, cycles=2, after=after)

    def resumed(phase):
        demos = DemoProposer(120, words)
        other = TrialPhase(
            FastConfig(demo_tokens=120),
            LessonProposer(256, words),
            0,
            steps_per_cycle=6,
            demos=demos,
        )
        other.load_state(json.loads(json.dumps(phase.state(), default=vars)))
        return other

    assert looped() == looped(resumed)


# Where nothing can be learned


NOTHING = [dspy.Example(ticket=f"ticket {n}", queue=f"q{n}", topic="visa").with_inputs("ticket")
           for n in range(60)]  # fmt: skip


@pytest.mark.parametrize(
    ("feedback", "said"),
    [
        ("expected", "such as 'Expected q"),
        ("should", "such as"),
        ("none", "gave no feedback"),
        ("useless", "(1 rules) made no answers better"),
    ],
)
def test_it_is_said_once_where_there_was_nothing_to_learn(feedback, said, caplog):
    with caplog.at_level(logging.WARNING):
        found, phase, runner = phase_on(feedback, train=NOTHING)
    (warning,) = [r.getMessage() for r in caplog.records if "accepted" in r.getMessage()]
    assert warning.startswith(f"0 of {phase.stats.proposals} proposals were accepted")
    assert said in warning and "'visa tickets go to amber.'" in warning
    assert phase.report()["advice"] == warning
    caplog.clear()
    other = FastPhase(FastConfig(), LessonProposer(256, words), 0)
    other.load_state(json.loads(json.dumps(phase.state())))
    assert other.report() == phase.report(), "a resumed run says so too"
    other.run(runner, found, NOTHING, VAL, cycle=2, iterations=2, policy_version=0)
    assert not [r for r in caplog.records if "accepted" in r.getMessage()]


def test_where_no_rollout_reached_the_metric_its_feedback_is_not_at_fault():
    memory, stats = Memory(LessonProposer(256, words)), ProposalStats(iterations=1)
    cut = Rollout(example_id(NOTHING[0]), "c", (), (), 0.0, "", Failure("truncated", "cut off"), 0)
    memory.observe([NAME], NOTHING[:1], [cut])
    assert "every rollout failed before it had a score" in memory.advice(stats)
    memory.observe([NAME], NOTHING[:1], [dataclasses.replace(cut, failure=None)])
    assert "the metric gave no feedback" in memory.advice(stats)


def test_where_what_was_learned_changes_nothing_it_is_said():
    memory = Memory(LessonProposer(1, words))
    empty = ProposalStats(iterations=4, empty=4)
    right = rollout_of(TRAIN[0], TRAIN[0].queue, f"Lesson: {TRAIN[0].topic} goes first.")
    memory.observe([NAME], TRAIN[:1], [right])
    assert memory.advice(empty) is None, "there was nothing to mend"
    memory.observe([NAME], TRAIN[:1], [dataclasses.replace(right, reward=0.0)])
    assert "changed no instruction" in memory.advice(empty)
    assert "instruction_tokens" in memory.advice(empty)
    assert memory.advice(dataclasses.replace(empty, iterations=5)) is None


def test_a_proposer_of_ones_own_is_not_advised():
    _, phase, _ = phase_on("none", train=NOTHING, proposer=Scripted(lambda *_: {}))
    assert "advice" not in phase.report()


# Labelled demos


def test_labels_are_shown_where_no_rollout_succeeded():
    demos = DemoProposer(60, words)
    silent = Scripted(lambda *_: {})
    found, _, runner = phase_on("none", demos=demos, proposer=silent, demo_tokens=60)
    shown = [c for c in found.candidates if shown_examples(c)]
    assert shown and all(c.source == "demos" for c in shown)
    (demo, *_) = decode_demos(shown[0].components[DEMOS])
    assert set(demo.toDict()) == {"ticket", "queue", SOURCE}
    assert shown_examples(shown[0]) <= {example_id(e) for e in TRAIN}
    # No rollout had its own answer in the prompt.
    assert not any(example_id(j.example) in shown_examples(j.candidate) for j in runner.jobs)


def test_demos_wait_for_instructions_that_are_no_better(caplog):
    def run(phase, runner, found, cycle):
        rest = {"cycle": cycle, "iterations": 4, "policy_version": 0}
        return phase.run(runner, found, TRAIN, VAL, **rest)

    silent = Scripted(lambda *_: {})
    found, phase, runner = phase_on("none", 4, DemoProposer(60, words), proposer=silent)
    told = "4 iterations found no better instructions: solved and labelled examples are tried"
    assert told not in caplog.text and not any(map(shown_examples, found.candidates))
    resumed = FastPhase(FastConfig(), silent, 0, demos=DemoProposer(60, words))
    resumed.load_state(json.loads(json.dumps(phase.state())))
    later = [run(by, runner, found, cycle=2) for by in (phase, resumed)]
    assert later[0] == later[1] and any(map(shown_examples, later[0].candidates))
    assert caplog.text.count(told) == 2
    after = FastPhase(FastConfig(), silent, 0, demos=DemoProposer(60, words))
    after.load_state(json.loads(json.dumps(phase.state())))
    assert after.memory.shows_demos and after.report() == phase.report()
    # Where lessons are of use, they are all there is.
    found, phase, runner = phase_on("expected", demos=DemoProposer(60, words))
    found = run(phase, runner, found, cycle=2)
    assert phase.stats.accepted and not any(map(shown_examples, found.candidates))


def test_a_labelled_demo_costs_what_is_written_for_the_fields_it_lacks():
    demos = DemoProposer(1000, words)
    demos.study({example_id(e): e for e in TRAIN[:3]})
    trace = PredictorTrace("solve", {"ticket": "t"}, {"reasoning": "so", "queue": "?"}, "")
    wrong = Rollout("x", SEED.id, (), (trace,), 0.0, "", None, 0)
    assert not demos.ready(DEMOS)
    demos.bank([wrong])
    assert demos.ready(DEMOS) and not demos.ready("other.demos")
    text = demos.propose({DEMOS: "[]"}, {DEMOS: []}, [DEMOS])[DEMOS]
    (demo, *_) = decode_demos(text)
    assert "reasoning" not in demo and "topic" not in demo
    assert demos._tokens(demo, "solve") > demos._tokens(demo) + 5
    # What a rollout has found is not shown as a label too.
    good = PredictorTrace(
        "solve", {"ticket": "t"}, {"reasoning": "w " * 9, "queue": TRAIN[0].queue}, ""
    )
    demos.bank([Rollout("y", SEED.id, (), (good,), 1.0, "", None, 0)])
    text = demos.propose({DEMOS: "[]"}, {DEMOS: []}, [DEMOS])[DEMOS]
    queues = [demo.queue for demo in decode_demos(text)]
    assert queues.count(TRAIN[0].queue) == 1


def showing(*examples):
    demos = [{**e.inputs().toDict(), "queue": e.queue, SOURCE: example_id(e)} for e in examples]
    return make_candidate({**SEED.components, DEMOS: encode_demos(demos)})


def test_a_problem_is_not_rolled_out_under_its_own_answer():
    one, two, three = TRAIN[:3]
    candidate = showing(one, two)
    assert without_answer(candidate, example_id(three)) is candidate
    assert without_answer(candidate, None) is candidate
    left = without_answer(candidate, example_id(one))
    assert shown_examples(left) == {example_id(two)} and left.id != candidate.id
    assert left.parent_ids == (candidate.id,)
    start = choose([candidate, SEED], [[1.0], [0.9]], ["x"], 2, 0)
    for phase in (
        FastPhase(FastConfig(population_size=2), Scripted(lambda *_: {}), 0),
        TrialPhase(FastConfig(population_size=2), Scripted(lambda *_: {}), 0, steps_per_cycle=6),
    ):
        assert [c.id for c in phase.lineup(start, 4)] == [candidate.id, SEED.id] * 2
        slots = phase.lineup(start, 4, example_id(one))
        assert [c.id for c in slots] == [left.id, SEED.id] * 2
    runner = ColonRunner("none")
    adapter = GepaAdapter(runner, Reflector(Scripted(lambda *_: {}), set()), 1)
    adapter.evaluate([one, two, three], candidate.components, capture_traces=True)
    shown = [len(shown_examples(job.candidate)) for job in runner.jobs]
    assert shown == [1, 1, 2]


def test_the_slow_phase_asks_for_each_problem():
    from fst_dspy.config import SlowConfig
    from fst_dspy.loop.problems import ProblemStream

    candidate = showing(*TRAIN[:4])
    runner = ColonRunner("none")
    phase = FastPhase(FastConfig(population_size=1), Scripted(lambda *_: {}), 0)
    config = SlowConfig(group_size=2, problems_per_step=6)
    sampler = StepSampler(runner, phase, config, TRAIN[:6], 0)
    start = choose([candidate], [[1.0]], ["x"], 1, 0)
    groups, *_ = sampler.sample(start, 1, ProblemStream())
    assert len(groups) == 6 and len(runner.jobs) == 12
    assert not any(example_id(j.example) in shown_examples(j.candidate) for j in runner.jobs)


def test_marked_lessons_are_as_they_were():
    from rule_runner import RuleRunner, scored

    runner = RuleRunner()
    phase = FastPhase(FastConfig(), LessonProposer(256, words), 0)
    run(phase, runner, scored(runner, SEED))
    assert phase.proposer.rules(NAME) == [] and phase.stats.accepted > 0
