"""One sentence that feedback stated, and what it is compared with.

A lesson is forgotten where a newer one says otherwise, and is none where other examples have the
same sentence with other answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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


def ranked(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Lessons, the best supported first, and of equals the first."""
    return sorted(lessons, key=lambda x: (-len(x.failed_ids), -len(x.example_ids), x.first))


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
