"""A cache over objects that need no hash, and that may be equal to others."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

from fst_dspy.student.by_identity import cached_by_identity


@dataclass
class Named:
    """Equal to others by its name, and without a hash."""

    name: str


class Counted:
    """A cached function that notes what it was run for."""

    def __init__(self, most: int) -> None:
        self.runs: list[tuple[str, int]] = []

        @cached_by_identity(most)
        def length(subject: Named, factor: int = 1) -> int:
            """Of the name, so many times."""
            self.runs.append((subject.name, factor))
            return factor * len(subject.name)

        self.length = length


def test_each_object_has_results_of_its_own_though_it_equals_another() -> None:
    counted, one, other = Counted(8), Named("ab"), Named("ab")
    assert one == other and [counted.length(x) for x in (one, other, one, other)] == [2] * 4
    assert counted.runs == [("ab", 1)] * 2
    assert counted.length(one, 3) == 6 and counted.length(one, 3) == 6
    assert counted.runs[2:] == [("ab", 3)]
    assert counted.length.__doc__ == "Of the name, so many times."


def test_no_more_results_are_kept_than_it_says() -> None:
    counted, subjects = Counted(2), [Named("a" * n) for n in range(3)]
    for subject in [*subjects, *reversed(subjects)]:
        counted.length(subject)
    assert len(counted.runs) == 4  # of the second three only the first had been let go


def test_objects_are_not_kept_alive_and_their_ids_may_come_again() -> None:
    counted = Counted(10_000)
    subject = Named("first")
    gone = weakref.ref(subject)
    assert counted.length(subject) == 5
    del subject
    gc.collect()
    assert gone() is None
    for n in range(2000):  # each where the one before it was
        assert counted.length(Named("a" * (n % 7))) == n % 7
