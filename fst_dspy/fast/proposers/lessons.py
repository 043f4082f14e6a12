"""A proposer without a language model: it puts the lessons that feedback states into the prompt.

Feedback often says in so many words what the model did not know ("Lesson: visa tickets go to
silver."). Such sentences are collected over all training rollouts of a run, counted by the examples
they came from, and appended to the instruction, one a line. Feedback without any such marker is
searched for sentences that hold beyond their own example. What it has not stated yet is read off
the examples' inputs and labels (``fst_dspy.fast.proposers.labels``), where these tell rules: the
labels of all examples are known before the first rollout, lessons come minibatch by minibatch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from fst_dspy.fast.proposers.copying import CopyGuard
from fst_dspy.fast.proposers.labels import Rule, answers_in, read_rules
from fst_dspy.fast.proposers.lesson import Lesson, Near, Template, contradicts, ranked
from fst_dspy.fast.proposers.lines import (
    Rank,
    in_short,
    outdated,
    reordered,
    restates,
    within,
)
from fst_dspy.fast.proposers.protocol import Findings, Record, well_formed
from fst_dspy.fast.proposers.stated import marked_lessons, unmarked_sentences
from fst_dspy.fast.proposers.verdicts import quotes_example, template_of
from fst_dspy.fast.proposers.words import holds, key_of, words
from fst_dspy.student.candidate import texts_in, tool_in

NEW_UNMARKED = 4
"""Sentences without a marker that one proposal may add: most of them are chatter."""
ORDERS = 3
"""Other orders of the same lessons to propose: how well a model finds a rule depends on its place,
and candidates of a population that know as much should still differ."""
MEMORY_SIZE = 512
"""Lessons remembered for a component; the least supported are forgotten first."""
MOST_ADDED = 8 * MEMORY_SIZE
"""Lines of proposals remembered as the proposer's own, those that were in use last."""
FORGOTTEN = (-2, 0, 0)
"""The rank of a line that was a lesson, or a rule of labels, and is none that is known now."""


@dataclass(frozen=True)
class Known:
    """What an instruction may say.

    Attributes:
        memory: All lessons, by their keys.
        usable: Those that may be said.
        rules: Rules of labels that no lesson says anything of.
        all_rules: All rules of labels.
    """

    memory: Mapping[str, Lesson]
    usable: Mapping[str, Lesson]
    rules: Sequence[Rule]
    all_rules: Sequence[Rule]


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
        return [lesson.text for lesson in ranked(known)]

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
                component: {key: _plain(template) for key, template in templates.items()}
                for component, templates in self._templates.items()
            },
            "memory": {
                component: [_plain(lesson) for lesson in memory.values()]
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
        known, before = self._known(component, instruction), self._added.get(component, {})
        added = dict(before)
        lines = self._still_true(instruction, known, added)
        lines = self._with_new(component, lines, known, added)
        rank = {key: lesson.rank for key, lesson in known.memory.items()}
        rank |= {key_of(rule.text): (-1, 0, rule.support) for rule in known.all_rules}
        lines = self._shortened(lines, known, added, rank)
        used = dict.fromkeys(line for line in lines if line in added)
        others = [line for line in before if line not in used]
        self._added[component] = dict.fromkeys([*others, *used][-MOST_ADDED:])
        text = "\n".join(lines)
        if text != instruction or self._orders.get(component, 0) >= ORDERS:
            return text
        turn = self._orders[component] = self._orders.get(component, 0) + 1
        # Rules of labels stand still while the clock does: each turn has an order of its own.
        seed = f"{self._clock}|{turn}" if known.rules else self._clock
        return "\n".join(reordered(lines, rank, random.Random(seed)))

    def _known(self, component: str, instruction: str) -> Known:
        """What an instruction of a component may say by now."""
        memory, tool = self._memory.get(component, {}), tool_in(component)
        rules, all_rules = self.rules(component), self._all_rules(component)
        if tool is not None:  # all others stand in the instructions, once
            memory = {key: le for key, le in memory.items() if holds(key, key_of(tool))}
            rules, all_rules = [], []
        usable = {key: lesson for key, lesson in memory.items() if lesson.usable}
        if self.guard is not None:  # else no proposal with such a lesson in it would pass
            usable = {k: v for k, v in usable.items() if not self.guard.copied(v.text, instruction)}
        return Known(memory, usable, rules, all_rules)

    def _still_true(self, instruction: str, known: Known, added: dict[str, None]) -> list[str]:
        """The lines of an instruction that hold by what is known.

        What feedback says goes before what labels tell, and stands where that stood.
        """
        said = {key: lesson.subject for key, lesson in known.usable.items()}
        said |= {key_of(rule.text): [rule.cue] for rule in known.rules}
        stale = {key_of(rule.text): rule for rule in known.all_rules if rule not in known.rules}
        lines: list[str] = []
        for line in instruction.split("\n") if instruction else []:
            if line in added and (rule := stale.get(key_of(line))):
                same = ranked([x for key, x in known.usable.items() if restates(key, rule)])[:1]
                lines += [x.text for x in same if x.text not in lines]
                added |= dict.fromkeys(x.text for x in same)
            elif not outdated(line, known.memory, said, line in added):
                lines.append(line)
        return lines

    def _with_new(
        self, component: str, lines: list[str], known: Known, added: dict[str, None]
    ) -> list[str]:
        """The lines, and after them what is known and not in them yet."""
        present, rules = key_of(" ".join(lines)), known.rules
        missing = ranked([x for key, x in known.usable.items() if not holds(present, key)])
        is_told = any(holds(present, key_of(rule.text)) for rule in known.all_rules)
        if missing and known.all_rules and not is_told:
            # Labels are not always what a metric is after, and not all feedback is of use to a
            # model: where both are new they are tried together, and each alone.
            mixes = [(missing, rules), *([(missing, [])] if rules else []), ([], known.all_rules)]
            turn = self._mixes[component] = self._mixes.get(component, -1) + 1
            missing, rules = mixes[turn % len(mixes)]
            if not missing:
                lines = [line for line, _ in in_short(lines, added, rules)]
        unmarked = [lesson for lesson in missing if not lesson.marked][NEW_UNMARKED:]
        new = [lesson.text for lesson in missing if lesson not in unmarked]
        new += [rule.text for rule in rules if not holds(present, key_of(rule.text))]
        added |= dict.fromkeys(new)
        return [*lines, *(line for line in new if line not in lines)]

    def _shortened(
        self, lines: list[str], known: Known, added: dict[str, None], rank: Mapping[str, Rank]
    ) -> list[str]:
        """The lines in as many tokens as they may take.

        What rules of labels tell is said in their words, which are fewer, and then the weakest of
        the lines added are left out.
        """
        own = [line for line in lines if line not in added]
        room = self._tokens(own) + self.instruction_tokens
        if len(own) == len(lines) or self._tokens(lines) <= room:
            return lines
        short = in_short(lines, added, known.all_rules)
        learned = {line: rank.get(key_of(was), FORGOTTEN) for line, was in short if was in added}
        added |= dict.fromkeys(learned)
        return within(room, [line for line, _ in short], learned, self._tokens)

    def _tokens(self, lines: Sequence[str]) -> int:
        return self.count_tokens(well_formed("\n".join(lines)))


def _plain(known: Lesson | Template) -> dict[str, Any]:
    """Its fields, as they are now; ``dataclasses.asdict`` takes ten times as long, every step."""
    return {name: [*v] if isinstance(v, list) else v for name, v in vars(known).items()}
