"""A proposer without a language model: it puts the lessons that feedback states into the prompt.

Feedback often says in so many words what the model did not know ("Lesson: visa tickets go to
silver."). Such sentences are collected over all training rollouts of a run, counted by the examples
they came from, and appended to the instruction, one a line. Feedback without any such marker is
searched for sentences that hold beyond their own example. What it has not stated yet is read off
the examples' inputs and labels (``fst_dspy.fast.proposers.labels``), where these tell rules: the
labels of all examples are known before the first rollout, lessons come minibatch by minibatch.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import dspy

from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.labels import Rule, read_rules
from fst_dspy.fast.proposers.protocol import Findings, Record, well_formed
from fst_dspy.student.candidate import texts_in, tool_in

MARKER = re.compile(r"\b(?:lesson|rule|hint|note|remember|tip)s?\s*:\s*", re.IGNORECASE)
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)\s+")
QUOTED = re.compile(r"\"[^\"]+\"|`[^`]+`|(?<!\w)'[^']+'(?!\w)")
_ANSWER = r"(?:answer|output|response|reply|prediction|guess|completion)"
VERDICT = re.compile(
    r"^(?:correct|incorrect|wrong|right|expected|got|predicted|gold|score|this (?:is|was)"
    r"|(?:it|that)(?:'s| is| was) (?:not )?(?:wrong|right|correct|incorrect)"
    r"|(?:not |almost |nearly |partly |partially |mostly )+(?:\w+ )?(?:right|correct)"
    r"|(?:no|yes|close|almost|nearly|good job|nice work|well done|great job)[,.!:;]"
    r"|the (?:correct|expected|right|gold|model|episode (?:ended|was cut off))"
    rf"|(?:the|this|that|your|model|model's|predicted) {_ANSWER}"
    r"|you (?:answered|said|wrote|predicted|chose)"
    r"|\d[\d.]*(?: ?%| ?/| of| out of))(?!\w)"
    r"|\b(?:score|accuracy|precision|recall|f1|bleu|rouge)\b[^.]*\d",
    re.IGNORECASE,
)
"""What is said of one answer, or how it was scored, at the beginning of a sentence or in it."""
MIN_WORDS = 4
"""Shorter sentences without a marker ("Well done.") teach nothing."""
NEW_UNMARKED = 4
"""Sentences without a marker that one proposal may add: most of them are chatter."""
ORDERS = 3
"""Other orders of the same lessons to propose: how well a model finds a rule depends on its place,
and candidates of a population that know as much should still differ."""
MEMORY_SIZE = 512
"""Lessons remembered for a component; the least supported are forgotten first."""


@dataclass
class Lesson:
    """One sentence that feedback stated.

    Attributes:
        text: As first stated.
        general: It had a marker, or quotes nothing of its example; others need two examples.
        marked: It had a marker.
        subject: Words of it that the example's inputs hold, and not all examples do.
        example_ids: Training examples whose feedback stated it.
        failed_ids: Those of them on which the rollout scored below the best of its minibatch.
        first, last: When it was first and last stated, on the proposer's clock.
        live: Nothing newer contradicts it.
        revived: Times it was stated again after something contradicted it.
        template: Its key with the answers of its example left out; empty where there are none.
        verdict: Other examples have the same sentence with other answers, whatever their inputs:
            it says what was right there, and no more.
    """

    text: str
    general: bool
    marked: bool
    subject: list[str]
    first: int
    last: int
    example_ids: list[str] = field(default_factory=list)
    failed_ids: list[str] = field(default_factory=list)
    live: bool = True
    revived: int = 0
    template: str = ""
    verdict: bool = False

    @property
    def rank(self) -> tuple[int, int, int]:
        """Higher is better supported, then newer."""
        return (len(self.failed_ids), len(self.example_ids), self.last)

    @property
    def usable(self) -> bool:
        """Whether it may go into an instruction."""
        known = self.general or len(self.example_ids) >= 2
        return self.live and known and not self.verdict


@dataclass
class Template:
    """A sentence without the answers of its example, as several examples have it.

    Attributes:
        answers: Different answers it was stated with, up to two.
        subject: Words of it that all the examples' inputs hold.
    """

    answers: list[str]
    subject: list[str]

    @property
    def is_verdict(self) -> bool:
        """Whether nothing in the inputs decides which of the answers it is."""
        return len(self.answers) > 1 and not self.subject


class LessonProposer:
    """Appends the lessons of all training feedback so far to the instruction. Deterministic.

    A lesson replaces an older one that differs from it only in a word or two at its end ("visa
    tickets go to silver." becomes "visa tickets go to amber."), so a changed policy is followed.
    When an instruction would be too long, the least supported lessons are left out; lines that no
    feedback stated, such as the student's own, stay.

    Args:
        instruction_tokens: Longest instruction to propose.
        count_tokens: Counts the tokens of a text, best with the local model's tokenizer.
        guard: Lessons that copy a training example's inputs are left out; ``None`` for none.
    """

    def __init__(
        self,
        instruction_tokens: int,
        count_tokens: Callable[[str], int],
        guard: CopyGuard | None = None,
    ) -> None:
        self.instruction_tokens, self.guard = instruction_tokens, guard
        self.count_tokens = count_tokens
        self._memory: dict[str, dict[str, Lesson]] = {}
        self._orders: dict[str, int] = {}  # orders tried since the lessons last changed
        self._mixes: dict[str, int] = {}  # times that lessons and labels' rules were both new
        self._clock = 0
        self._templates: dict[str, dict[str, Template]] = {}
        self._outputs: dict[str, list[str]] = {}  # names of the fields that predictors give
        self._examples: Sequence[dspy.Example] = ()
        self._rules: dict[str, list[Rule]] = {}
        self._seen = [0, 0]  # rollouts that were scored, and those with feedback
        self._sample = ""

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """The instructions with all lessons known by now; see ``proposers.Proposer``."""
        for name in names:
            self.observe(name, records[name])
        return {name: self._rewrite(name, components[name]) for name in texts_in(names)}

    def observe(self, component: str, records: Sequence[Record]) -> None:
        """Remember the lessons of some rollouts; to see the same ones again changes nothing."""
        self._take_fields(component, records)
        scored = [record for record in records if record["failure"] in (None, "no_calls")]
        told = [record for record in scored if record["Feedback"]]
        self._seen = [self._seen[0] + len(scored), self._seen[1] + len(told)]
        if not told:
            return
        self._sample = self._sample or told[0]["Feedback"][:200]
        memory = self._memory.setdefault(component, {})
        alike: dict[tuple[int, str], list[str]] = {}
        for key in memory:
            alike.setdefault(opening(key), []).append(key)
        before = {key for key, lesson in memory.items() if lesson.usable}
        top = max(record["score"] for record in told)
        worst = min(record["score"] for record in told)
        inputs = [_words(" ".join(map(str, record["Inputs"].values()))) for record in told]
        everywhere = set.intersection(*map(set, inputs)) if len(inputs) > 1 else set()
        stated = [marked_lessons(record["Feedback"]) for record in told]
        marked = any(stated) or any(lesson.marked for lesson in memory.values())
        if marked:  # feedback that marks its lessons says so of all others: they are none
            for known in memory.values():
                known.live &= known.marked
        for record, words, lessons in zip(told, inputs, stated, strict=True):
            failed = record["score"] < top or top == worst
            subject = set(words) - everywhere
            for text in lessons if marked else unmarked_sentences(record["Feedback"]):
                general = marked or not quotes_example(text, record)
                lesson = self._remember(
                    memory, alike, text, record["example_id"], failed, subject, general, marked
                )
                if lesson is not None and not marked:
                    self._compare(component, lesson, record, subject)
        for key in sorted(memory, key=lambda key: memory[key].rank)[: len(memory) - MEMORY_SIZE]:
            del memory[key]
        if before != {key for key, lesson in memory.items() if lesson.usable}:
            self._orders[component] = 0

    def study(self, examples: Mapping[str, dspy.Example]) -> None:
        """Take training examples, to read rules off their inputs and labels where need be."""
        self._examples, self._rules = list(examples.values()), {}
        if self.guard is not None:
            self.guard.study(self._examples)

    def findings(self) -> Findings:
        """What there was to learn."""
        known = sum(len(self.lessons(name)) for name in self._memory)
        rules = sum(len(self.rules(name)) for name in self._outputs)
        return Findings(self._seen[0], self._seen[1], known + rules, self._sample)

    def rules(self, component: str) -> list[Rule]:
        """What labels tell and feedback does not, which goes before them."""
        memory = self._memory.get(component, {})
        stated = {word for key, lesson in memory.items() if lesson.usable for word in key.split()}
        return [rule for rule in self._all_rules(component) if rule.cue not in stated]

    def lessons(self, component: str) -> list[str]:
        """The lessons known for a component, best supported first."""
        known = [lesson for lesson in self._memory.get(component, {}).values() if lesson.usable]
        return [lesson.text for lesson in _ranked(known)]

    def state(self) -> dict[str, Any]:
        """The memory, for JSON."""
        return {
            "clock": self._clock,
            "orders": dict(self._orders),
            "mixes": dict(self._mixes),
            "outputs": {name: list(fields) for name, fields in self._outputs.items()},
            "templates": {
                component: {key: dataclasses.asdict(t) for key, t in templates.items()}
                for component, templates in self._templates.items()
            },
            "memory": {
                component: [dataclasses.asdict(lesson) for lesson in memory.values()]
                for component, memory in self._memory.items()
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up the memory that :meth:`state` gave."""
        self._clock = int(state["clock"])
        self._orders = dict(state["orders"])
        self._mixes = dict(state.get("mixes", {}))
        self._rules = {}
        self._outputs = {name: list(fields) for name, fields in state.get("outputs", {}).items()}
        self._templates = {
            component: {key: Template(**row) for key, row in rows.items()}
            for component, rows in state.get("templates", {}).items()
        }
        self._memory = {
            component: {key_of(row["text"]): Lesson(**row) for row in rows}
            for component, rows in state["memory"].items()
        }

    def _remember(
        self,
        memory: dict[str, Lesson],
        alike: dict[tuple[int, str], list[str]],
        text: str,
        example: str,
        failed: bool,
        subject: set[str],
        general: bool,
        marked: bool,
    ) -> Lesson | None:
        key = key_of(text)
        if not key:
            return None
        self._clock += 1
        lesson = memory.get(key)
        if lesson is None:
            own = sorted(subject & set(key.split()))
            lesson = memory[key] = Lesson(text, general, marked, own, self._clock, self._clock)
            alike.setdefault(opening(key), []).append(key)
        lesson.last = self._clock
        lesson.general |= general
        lesson.revived += not lesson.live
        lesson.live = True
        for ids, counts in ((lesson.example_ids, True), (lesson.failed_ids, failed)):
            if counts and example not in ids:
                ids.append(example)
        # Only those that open alike can contradict; to try all would take seconds a step.
        for other_key in alike[opening(key)] if lesson.usable else ():
            other = memory[other_key]
            # Two that keep coming back after each other do not contradict: both hold.
            both_return = lesson.revived > 0 and other.revived > 0
            if other.live and not both_return and contradicts(key, other_key, lesson.subject):
                other.live = False
        return lesson

    def _all_rules(self, component: str) -> list[Rule]:
        if component not in self._outputs:
            return []
        if component not in self._rules:
            self._rules[component] = read_rules(self._examples, self._outputs[component])
        return self._rules[component]

    def _take_fields(self, component: str, records: Sequence[Record]) -> None:
        if component not in self._outputs:
            read = [r["Generated Outputs"] for r in records]
            fields = [name for outputs in read if isinstance(outputs, Mapping) for name in outputs]
            if fields:
                self._outputs[component] = list(dict.fromkeys(fields))

    def _compare(self, component: str, lesson: Lesson, record: Record, subject: set[str]) -> None:
        """Find out whether a sentence is only a verdict, by the others of its template."""
        found = template_of(lesson.text, record)
        if found is None:
            return
        lesson.template, answer = found
        own = sorted(subject & set(lesson.template.split()))
        templates = self._templates.setdefault(component, {})
        template = templates.setdefault(lesson.template, Template([answer], own))
        if answer not in template.answers:
            template.answers = [*template.answers, answer][:2]
        template.subject = [word for word in template.subject if word in own]
        while len(templates) > MEMORY_SIZE:
            del templates[next(iter(templates))]
        for other in self._memory[component].values():
            if other.template == lesson.template:
                other.verdict = template.is_verdict

    def _rewrite(self, component: str, instruction: str) -> str:
        memory, rules = self._memory.get(component, {}), self.rules(component)
        tool = tool_in(component)
        if tool is not None:  # all others stand in the instructions, once
            memory = {key: le for key, le in memory.items() if f" {key_of(tool)} " in f" {key} "}
            rules = []
        live = {key: lesson for key, lesson in memory.items() if lesson.usable}
        if self.guard is not None:  # else no proposal with such a lesson in it would pass
            live = {k: v for k, v in live.items() if not self.guard.copied(v.text, instruction)}
        said = {key: lesson.subject for key, lesson in live.items()}
        said |= {key_of(rule.text): [rule.cue] for rule in rules}
        stale = {key_of(rule.text) for rule in self._all_rules(component) if rule not in rules}
        lines = [line for line in instruction.split("\n") if not _outdated(line, memory, said)]
        lines = [line for line in lines if key_of(line) not in stale]
        present = f" {key_of(' '.join(lines))} "
        missing = _ranked([x for key, x in live.items() if f" {key} " not in present])
        every = [] if tool is not None else self._all_rules(component)
        if missing and every and not any(f" {key_of(rule.text)} " in present for rule in every):
            # Labels are not always what a metric is after, and not all feedback is of use to a
            # model: where both are new they are tried together, and each alone.
            mixes = [(missing, rules), *([(missing, [])] if rules else []), ([], every)]
            turn = self._mixes[component] = self._mixes.get(component, -1) + 1
            missing, rules = mixes[turn % len(mixes)]
        unmarked = [lesson for lesson in missing if not lesson.marked][NEW_UNMARKED:]
        lines += [lesson.text for lesson in missing if lesson not in unmarked]
        lines += [rule.text for rule in rules if f" {key_of(rule.text)} " not in present]
        rank = {key: lesson.rank for key, lesson in memory.items()}
        rank |= {key_of(rule.text): (-1, 0, rule.support) for rule in rules}
        lines = self._shorten(lines, rank)
        text = "\n".join(lines)
        if text != instruction or self._orders.get(component, 0) >= ORDERS:
            return text
        turn = self._orders[component] = self._orders.get(component, 0) + 1
        # Rules of labels stand still while the clock does: each turn has an order of its own.
        seed = f"{self._clock}|{turn}" if rules else self._clock
        return self._reordered(lines, rank, random.Random(seed))

    def _reordered(self, lines: list[str], known: Collection[str], rng: random.Random) -> str:
        places = [i for i, line in enumerate(lines) if key_of(line) in known]
        shuffled = [lines[i] for i in places]
        rng.shuffle(shuffled)
        moved = dict(zip(places, shuffled, strict=True))
        return "\n".join(moved.get(i, line) for i, line in enumerate(lines))

    def _shorten(self, lines: list[str], rank: Mapping[str, tuple[int, int, int]]) -> list[str]:
        learned = [line for line in lines if key_of(line) in rank]
        weakest = sorted(learned, key=lambda line: rank[key_of(line)], reverse=True)
        while weakest and self._tokens(lines) > self.instruction_tokens:
            dropped = weakest.pop()
            lines = [line for line in lines if line != dropped]
        return lines

    def _tokens(self, lines: Sequence[str]) -> int:
        return self.count_tokens(well_formed("\n".join(lines)))


def marked_lessons(feedback: str) -> list[str]:
    """The sentences after a marker such as ``Lesson:``, to the end of its line.

    A marker that ends its line holds for the lines up to the next blank one.
    """
    lessons: list[str] = []
    in_block = False
    for raw in feedback.split("\n"):
        line = BULLET.sub("", raw).strip()
        found = MARKER.search(line)
        if found:
            rest = MARKER.sub("", line[found.end() :])
            lessons += sentences(rest)
            in_block = not rest
        elif in_block and line:
            lessons += sentences(line)
        elif not line:
            in_block = False
    return lessons


def unmarked_sentences(feedback: str) -> list[str]:
    """The sentences of feedback without markers that may say more than right or wrong.

    Quotations stay whole, however many sentences they hold: a part of one says nothing.
    """
    lines = [BULLET.sub("", line).strip() for line in feedback.split("\n")]
    return [
        sentence
        for line in lines
        for sentence in sentences(line, quotations_whole=True)
        if len(sentence.split()) >= MIN_WORDS and not VERDICT.search(sentence)
    ]


def sentences(line: str, *, quotations_whole: bool = False) -> list[str]:
    """The sentences of one line; where quotations are whole, none ends within one."""
    quoted = [found.span() for found in QUOTED.finditer(line)] if quotations_whole else []
    ends = [
        found.span()
        for found in SENTENCE_END.finditer(line)
        if not any(start < found.start() < end for start, end in quoted)
    ]
    starts = [0, *(end for _, end in ends)]
    parts = [line[a:b].strip() for a, b in zip(starts, [*(a for a, _ in ends), None], strict=True)]
    return [part for part in parts if part]


def quotes_example(sentence: str, record: Record) -> bool:
    """Whether a sentence repeats its own example: a value of it, or words that stand in one."""
    if QUOTED.search(sentence):
        return True
    outputs = record["Generated Outputs"]
    values = [*record["Inputs"].values(), *record["labels"].values()]
    values += outputs.values() if isinstance(outputs, Mapping) else [outputs]
    inside = f" {key_of(sentence)} "
    keys = [f" {key} " for key in (key_of(str(value)) for value in values) if key]
    return any(key in inside or inside in key for key in keys)


def template_of(sentence: str, record: Record) -> tuple[str, str] | None:
    """A sentence's key with the answers of its example left out, and these.

    Answers are labels and outputs that the example's inputs do not hold. ``None`` where the
    sentence names none.
    """
    outputs = record["Generated Outputs"]
    values = [
        *record["labels"].values(),
        *(outputs.values() if isinstance(outputs, Mapping) else ()),
    ]
    inputs = f" {key_of(' '.join(map(str, record['Inputs'].values())))} "
    keys = {key_of(str(value)) for value in values}
    inside = f" {key_of(sentence)} "
    named = [k for k in sorted(keys, key=lambda k: (-len(k), k)) if k and f" {k} " in inside]
    named = [key for key in named if f" {key} " not in inputs]
    for key in named:
        inside = inside.replace(f" {key} ", " _ ")
    return (inside.strip(), "|".join(named)) if named else None


def contradicts(new: str, old: str, subject: Sequence[str] = ()) -> bool:
    """Whether two keys say different things of the same subject.

    They do if only one or two neighbouring words differ, in the second half: in a rule the subject
    comes first. Where a differing word is one of ``subject`` (words of ``new`` that its example is
    about), it is the subject that differs.
    """
    new_words, old_words = new.split(), old.split()
    if len(new_words) != len(old_words):
        return False
    differ = [i for i, (a, b) in enumerate(zip(new_words, old_words, strict=True)) if a != b]
    if not 1 <= len(differ) <= 2 or differ[-1] - differ[0] >= len(differ):
        return False
    if any(new_words[i] in subject for i in differ):
        return False
    return 2 * differ[0] >= len(new_words)


def opening(key: str) -> tuple[int, str]:
    """What two keys must have in common for one to contradict the other."""
    words = key.split()
    return len(words), " ".join(words[: (len(words) + 1) // 2])


@lru_cache(maxsize=1024)  # an input's text is compared with every sentence about it
def key_of(text: str) -> str:
    """A text's words in lower case: texts with equal keys say the same."""
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’.-]\w+)*", text.lower())


def _ranked(lessons: Sequence[Lesson]) -> list[Lesson]:
    return sorted(lessons, key=lambda x: (-len(x.failed_ids), -len(x.example_ids), x.first))


def _outdated(line: str, memory: Mapping[str, Lesson], said: Mapping[str, Sequence[str]]) -> bool:
    """Whether a line is no longer true, by what is said now and the subject of each saying."""
    key = key_of(line)
    if key in memory:
        return not memory[key].live or memory[key].verdict
    return any(contradicts(other, key, subject) for other, subject in said.items())
