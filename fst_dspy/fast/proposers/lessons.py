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
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import dspy

from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.labels import Rule, answers_in, read_rules
from fst_dspy.fast.proposers.protocol import Findings, Record, well_formed
from fst_dspy.fast.proposers.sentences import HEADING, after_markers, markers, sentences
from fst_dspy.fast.proposers.verdicts import VERDICT, quotes_example, template_of
from fst_dspy.fast.proposers.words import blanked, holds, key_of, length, words
from fst_dspy.student.candidate import texts_in, tool_in

BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
MIN_WORDS = 4
"""Shorter sentences without a marker ("Well done.") teach nothing."""
NEW_UNMARKED = 4
"""Sentences without a marker that one proposal may add: most of them are chatter."""
ORDERS = 3
"""Other orders of the same lessons to propose: how well a model finds a rule depends on its place,
and candidates of a population that know as much should still differ."""
MEMORY_SIZE = 512
"""Lessons remembered for a component; the least supported are forgotten first."""
FORGOTTEN = (-2, 0, 0)
"""The rank of a line that was a lesson, or a rule of labels, and is none that is known now."""

Gap = tuple[int, int, int]
"""What is around some words of a key."""


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
    When more was learned than the instruction may hold, the least supported lessons are left out.
    Lines that it did not put there, such as the student's own, stay and are not counted; only a
    lesson that says otherwise takes their place.

    Args:
        instruction_tokens: Most tokens of an instruction that are learned, beside its other lines.
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
        self._marks: dict[str, list[str]] = {}  # examples whose feedback had markers, up to two
        self._is_marked: set[str] = set()  # components whose feedback marks its lessons
        self._added: dict[str, dict[str, None]] = {}  # lines put into proposals
        self._orders: dict[str, int] = {}  # orders tried since the lessons last changed
        self._mixes: dict[str, int] = {}  # times that lessons and labels' rules were both new
        self._clock = 0
        self._templates: dict[str, dict[str, Template]] = {}
        self._outputs: dict[str, list[str]] = {}  # names of the fields that predictors give
        self._examples: Sequence[dspy.Example] = ()
        self._rules: dict[str, list[Rule]] = {}
        self._answers: dict[str, frozenset[str]] = {}
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
        near = Near(memory)
        before = {key for key, lesson in memory.items() if lesson.usable}
        top = max(record["score"] for record in told)
        worst = min(record["score"] for record in told)
        read = [" ".join(map(str, record["Inputs"].values())) for record in told]
        inputs = [words(text) for text in read]
        everywhere = set.intersection(*map(set, inputs)) if len(inputs) > 1 else set()
        stated = [
            marked_lessons(record["Feedback"], text)
            for record, text in zip(told, read, strict=True)
        ]
        self._take_marks(component, told, stated)
        is_marked = component in self._is_marked
        if is_marked:  # then it says of all its other sentences: no lessons
            for known in memory.values():
                known.live &= known.marked
        marked = is_marked or any(stated)
        for record, its_words, lessons in zip(told, inputs, stated, strict=True):
            failed = record["score"] < top or top == worst
            subject = set(its_words) - everywhere
            others = [] if is_marked else unmarked_sentences(record["Feedback"])
            for key in map(key_of, others if lessons else ()):  # no lessons, by this feedback
                if key in memory:
                    memory[key].live &= memory[key].marked
            for text in lessons if marked else others:
                general = marked or not quotes_example(text, record)
                lesson = self._remember(
                    memory, near, text, record["example_id"], failed, subject, general, marked
                )
                if lesson is not None and not marked:
                    self._compare(component, near, lesson, record, subject)
        for key in sorted(memory, key=lambda key: memory[key].rank)[: len(memory) - MEMORY_SIZE]:
            del memory[key]
        if before != {key for key, lesson in memory.items() if lesson.usable}:
            self._orders[component] = 0

    def study(self, examples: Mapping[str, dspy.Example]) -> None:
        """Take training examples, to read rules off their inputs and labels where need be."""
        self._examples, self._rules, self._answers = list(examples.values()), {}, {}
        if self.guard is not None:
            self.guard.study(self._examples)

    def findings(self) -> Findings:
        """What there was to learn."""
        known = sum(len(self.lessons(name)) for name in self._memory)
        rules = sum(len(self.rules(name)) for name in self._outputs)
        return Findings(self._seen[0], self._seen[1], known + rules, self._sample)

    def rules(self, component: str) -> list[Rule]:
        """What labels tell and feedback does not, which goes before them.

        A lesson that names a rule's cue and no answer at all says something else of it.
        """
        rules, memory = self._all_rules(component), self._memory.get(component, {})
        stated = [key for key, lesson in memory.items() if lesson.usable] if rules else []
        answers = self._answers.get(component, frozenset())
        stated = [key for key in stated if any(holds(key, answer) for answer in answers)]
        cues = {rule.cue: key_of(rule.cue) for rule in rules}
        return [rule for rule in rules if not any(holds(key, cues[rule.cue]) for key in stated)]

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
            "marks": {name: list(examples) for name, examples in self._marks.items()},
            "is_marked": sorted(self._is_marked),
            "added": {name: list(lines) for name, lines in self._added.items()},
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
        self._rules, self._answers = {}, {}
        self._outputs = {name: list(fields) for name, fields in state.get("outputs", {}).items()}
        self._templates = {
            component: {key: Template(**row) for key, row in rows.items()}
            for component, rows in state.get("templates", {}).items()
        }
        self._memory = {
            component: {key_of(row["text"]): Lesson(**row) for row in rows}
            for component, rows in state["memory"].items()
        }
        # Earlier states lack what follows: one marker was enough then, and lessons were known
        # by their words.
        memories = self._memory.items()
        marked = {name for name, memory in memories if any(x.marked for x in memory.values())}
        added = {name: [x.text for x in memory.values()] for name, memory in memories}
        self._marks = {name: list(ids) for name, ids in state.get("marks", {}).items()}
        self._is_marked = set(state.get("is_marked", marked))
        self._added = {
            name: dict.fromkeys(lines) for name, lines in state.get("added", added).items()
        }

    def _remember(
        self,
        memory: dict[str, Lesson],
        near: Near,
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
        lesson.last = self._clock
        lesson.general |= general
        lesson.marked |= marked
        lesson.revived += not lesson.live
        lesson.live = True
        for ids, counts in ((lesson.example_ids, True), (lesson.failed_ids, failed)):
            if counts and example not in ids:
                ids.append(example)
        near.take(key, lesson)
        for other_key, other in near.opposed(key, lesson) if lesson.usable else ():
            # Two that keep coming back after each other do not contradict: both hold.
            both_return = lesson.revived > 0 and other.revived > 0
            if not both_return and contradicts(key, other_key, lesson.subject):
                other.live = False
        return lesson

    def _all_rules(self, component: str) -> list[Rule]:
        if component not in self._outputs:
            return []
        if component not in self._rules:
            self._rules[component] = read_rules(self._examples, self._outputs[component])
            self._answers[component] = answers_in(self._examples, self._outputs[component])
        return self._rules[component]

    def _take_marks(
        self, component: str, told: Sequence[Record], stated: Sequence[Sequence[str]]
    ) -> None:
        """Notice where feedback marks its lessons: that of two examples does, or of the only one.

        A single one among others may be a word that only looks like a marker.
        """
        memory, marks = self._memory[component], self._marks.setdefault(component, [])
        for record, lessons in zip(told, stated, strict=True):
            if lessons and record["example_id"] not in marks:
                marks[:] = [*marks, record["example_id"]][:2]
        known = {example for lesson in memory.values() for example in lesson.example_ids}
        if len(marks) > 1 or {*marks} == known | {record["example_id"] for record in told}:
            self._is_marked.add(component)

    def _take_fields(self, component: str, records: Sequence[Record]) -> None:
        if component not in self._outputs:
            read = [r["Generated Outputs"] for r in records]
            fields = [name for outputs in read if isinstance(outputs, Mapping) for name in outputs]
            if fields:
                self._outputs[component] = list(dict.fromkeys(fields))

    def _compare(
        self, component: str, near: Near, lesson: Lesson, record: Record, subject: set[str]
    ) -> None:
        """Find out whether a sentence is only a verdict, by the others of its template."""
        found = template_of(lesson.text, record)
        if found is None:
            return
        text, answer = found
        near.retemplate(lesson, text)
        own = sorted(subject & set(text.split()))
        templates = self._templates.setdefault(component, {})
        before = templates[text].is_verdict if text in templates else None
        template = templates.setdefault(text, Template([answer], own))
        if answer not in template.answers:
            template.answers = [*template.answers, answer][:2]
        template.subject = [word for word in template.subject if word in own]
        while len(templates) > MEMORY_SIZE:
            del templates[next(iter(templates))]
        lesson.verdict = template.is_verdict
        if template.is_verdict != before:
            for other in near.of_template(text):
                other.verdict = template.is_verdict

    def _rewrite(self, component: str, instruction: str) -> str:
        memory, rules = self._memory.get(component, {}), self.rules(component)
        tool = tool_in(component)
        if tool is not None:  # all others stand in the instructions, once
            memory = {key: le for key, le in memory.items() if holds(key, key_of(tool))}
            rules = []
        live = {key: lesson for key, lesson in memory.items() if lesson.usable}
        if self.guard is not None:  # else no proposal with such a lesson in it would pass
            live = {k: v for k, v in live.items() if not self.guard.copied(v.text, instruction)}
        said = {key: lesson.subject for key, lesson in live.items()}
        said |= {key_of(rule.text): [rule.cue] for rule in rules}
        every = [] if tool is not None else self._all_rules(component)
        added = self._added.setdefault(component, {})
        # What feedback says goes before what labels tell, and stands where that stood.
        stale = {key_of(r.text): r for r in self._all_rules(component) if r not in rules}
        lines: list[str] = []
        for line in instruction.split("\n") if instruction else []:
            if line in added and (rule := stale.get(key_of(line))):
                same = _ranked([x for key, x in live.items() if restates(key, rule)])[:1]
                lines += [x.text for x in same if x.text not in lines]
                added |= dict.fromkeys(x.text for x in same)
            elif not _outdated(line, memory, said, line in added):
                lines.append(line)
        present = key_of(" ".join(lines))
        missing = _ranked([x for key, x in live.items() if not holds(present, key)])
        if missing and every and not any(holds(present, key_of(rule.text)) for rule in every):
            # Labels are not always what a metric is after, and not all feedback is of use to a
            # model: where both are new they are tried together, and each alone.
            mixes = [(missing, rules), *([(missing, [])] if rules else []), ([], every)]
            turn = self._mixes[component] = self._mixes.get(component, -1) + 1
            missing, rules = mixes[turn % len(mixes)]
            if not missing:
                lines = [line for line, _ in in_short(lines, added, rules)]
        unmarked = [lesson for lesson in missing if not lesson.marked][NEW_UNMARKED:]
        new = [lesson.text for lesson in missing if lesson not in unmarked]
        new += [rule.text for rule in rules if not holds(present, key_of(rule.text))]
        added |= dict.fromkeys(new)
        lines += [line for line in new if line not in lines]
        rank = {key: lesson.rank for key, lesson in memory.items()}
        rank |= {key_of(rule.text): (-1, 0, rule.support) for rule in every}
        lines = self._shorten(lines, added, rank, every)
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

    def _shorten(
        self,
        lines: list[str],
        added: dict[str, None],
        rank: Mapping[str, tuple[int, int, int]],
        rules: Sequence[Rule],
    ) -> list[str]:
        """The lines in as many tokens as they may take.

        What rules of labels tell is said in their words, which are fewer, and then the weakest of
        the lines added are left out.
        """
        own = [line for line in lines if line not in added]
        room = self._tokens(own) + self.instruction_tokens
        if len(own) == len(lines) or self._tokens(lines) <= room:
            return lines
        short = in_short(lines, added, rules)
        lines = [line for line, _ in short]
        learned = {line: rank.get(key_of(was), FORGOTTEN) for line, was in short if was in added}
        added |= dict.fromkeys(learned)
        best_first = sorted(learned, key=lambda line: learned[line], reverse=True)

        def with_best(count: int) -> list[str]:
            dropped = set(best_first[count:])
            return [line for line in lines if line not in dropped]

        def is_too_long(count: int) -> bool:
            return self._tokens(with_best(count)) > room

        # To drop one after the other would count what is left as often as there are lessons.
        return with_best(bisect_left(range(len(best_first) + 1), True, key=is_too_long) - 1)

    def _tokens(self, lines: Sequence[str]) -> int:
        return self.count_tokens(well_formed("\n".join(lines)))


def marked_lessons(feedback: str, inputs: str = "") -> list[str]:
    """The sentences after a marker such as ``Lesson:``, to the end of its line.

    A marker that ends its line holds for the lines up to the next blank one, and one that is a
    heading also for those after a blank one, up to the next.

    Args:
        feedback: What the metric said.
        inputs: What it is about: what that holds, the metric only repeats.
    """
    lessons: list[str] = []
    in_block, is_awaited = False, False
    lines, about = [BULLET.sub("", raw).strip() for raw in feedback.split("\n")], key_of(inputs)
    for number, line in enumerate(lines):
        found = markers(line, "\n".join(lines[number + 1 : number + 3]), about)
        if HEADING.match(line):
            in_block = is_awaited = True
        elif found:
            rest = after_markers(line, found)
            lessons += sentences(rest)
            in_block, is_awaited = not rest, False
        elif in_block and line:
            in_block, is_awaited = not line.startswith("# ") and not line.startswith("##"), False
            lessons += sentences(line) if in_block else []
        elif not line:
            in_block = is_awaited
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
        if length(sentence) >= MIN_WORDS and not VERDICT.search(sentence)
    ]


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


def gaps(key: str) -> list[Gap]:
    """What two keys must have in common for one to contradict the other, as hashes.

    That is all but two neighbouring words, or the last, of the second half.
    """
    parts = key.split()
    before = list(accumulate(parts, lambda known, word: hash((known, word)), initial=0))
    after = list(accumulate(parts[::-1], lambda known, word: hash((known, word)), initial=0))[::-1]
    second_half = range((len(parts) + 1) // 2, len(parts))
    return [(len(parts), before[i], after[min(i + 2, len(parts))]) for i in second_half]


def in_short(
    lines: Sequence[str], added: Collection[str], rules: Sequence[Rule]
) -> list[tuple[str, str]]:
    """Lines in the words of rules of labels, each once, and each as it was.

    Only a lesson that differs from another in its cue and answer alone is one of those rules.
    """
    forms: dict[str, tuple[str, Rule]] = {}
    for line in lines:
        key = key_of(line)
        told = [rule for rule in rules if restates(key, rule)] if line in added else []
        if len(told) == 1 and key != key_of(told[0].text):
            forms[line] = blanked(key, map(key_of, (told[0].cue, told[0].answer))), told[0]
    counts = Counter(form for form, _ in forms.values())
    found, seen = [], set()
    for line in lines:
        form, rule = forms.get(line, ("", None))
        short = rule.text if rule is not None and counts[form] > 1 else line
        if line not in added or short not in seen:
            found.append((short, line))
            seen.add(short)
    return found


def restates(lesson: str, rule: Rule) -> bool:
    """Whether a lesson, by its key, gives the answer of a rule of labels, of the rule's cue."""
    return holds(lesson, key_of(rule.cue)) and holds(lesson, key_of(rule.answer))


class Near:
    """Lessons by what they share with others, so that a new one is compared with few of them."""

    def __init__(self, memory: Mapping[str, Lesson]) -> None:
        self._by_gap: dict[Gap, dict[str, Lesson]] = {}
        self._by_template: dict[str, dict[int, Lesson]] = {}
        for key, lesson in memory.items():
            self.take(key, lesson)
            self.retemplate(lesson, lesson.template)

    def take(self, key: str, lesson: Lesson) -> None:
        """Take a lesson in."""
        for gap in gaps(key):
            self._by_gap.setdefault(gap, {})[key] = lesson

    def opposed(self, key: str, lesson: Lesson) -> Iterator[tuple[str, Lesson]]:
        """The live lessons that may contradict one, with their keys."""
        for gap in gaps(key):
            near = self._by_gap.get(gap, {})
            for other_key, other in [*near.items()]:
                if not other.live:
                    del near[other_key]  # comes back when it is taken in again
                elif other is not lesson:
                    yield other_key, other

    def retemplate(self, lesson: Lesson, template: str) -> None:
        """Give a lesson its template."""
        self._by_template.get(lesson.template, {}).pop(id(lesson), None)
        lesson.template = template
        if template:
            self._by_template.setdefault(template, {})[id(lesson)] = lesson

    def of_template(self, template: str) -> list[Lesson]:
        """The lessons that have a template."""
        return [*self._by_template.get(template, {}).values()]


def _ranked(lessons: Sequence[Lesson]) -> list[Lesson]:
    return sorted(lessons, key=lambda x: (-len(x.failed_ids), -len(x.example_ids), x.first))


def _outdated(
    line: str, memory: Mapping[str, Lesson], said: Mapping[str, Sequence[str]], is_added: bool
) -> bool:
    """Whether a line is no longer true, by what is said now and the subject of each saying.

    Where the proposer added it, it also goes with the lesson that it was.
    """
    key = key_of(line)
    lesson = memory.get(key)
    if lesson is not None and (is_added or lesson.live):
        return is_added and (not lesson.live or lesson.verdict)
    return any(contradicts(other, key, subject) for other, subject in said.items())
