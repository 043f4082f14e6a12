"""A guard against instructions that copy training examples: what is learned by heart is no rule.

A copy is a run of 50 characters, about eight words, that the inputs of a training example hold and
the instruction did not hold before. What many examples hold is no copy of one of them: a question
that is always the same, a list that every prompt begins with. Case, and all between words, do not
count. Short inputs, of one word or a label, cannot be copied by this measure.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import dspy
import numpy as np

from fst_dspy.fast.proposers.protocol import ProposalError
from fst_dspy.student.candidate import texts_in

RUN = 50
"""Characters of a training example, in a row, that an instruction may not hold."""
PIECE = RUN // 2
"""Examples are cut into pieces of this length: a run of one holds one of them whole."""
FEW = 0.05
"""Share of the examples up to which a run is that of few; and two always are, of six."""


class CopyGuard:
    """Refuses instructions that copy the inputs of training examples."""

    def __init__(self) -> None:
        self._text, self._starts, self._few = "", [0], 0
        self._studied: list[dspy.Example] = []
        # Where the examples' pieces are, and their hashes, in the order of these: to go through
        # the text for each run takes seconds where there are 100,000 examples.
        self._places = self._hashes = np.empty(0, np.int64)

    def study(self, trainset: Sequence[dspy.Example]) -> None:
        """Take the training examples; the same objects again cost nothing."""
        if [*map(id, trainset)] == [*map(id, self._studied)]:
            return
        self._studied = list(trainset)
        texts = [_normal(" \n ".join(_texts(e.inputs().toDict()))) for e in trainset]
        texts = list(dict.fromkeys(text for text in texts if len(text) >= RUN))
        self._starts = [0, *accumulate(len(text) + 1 for text in texts)]
        self._text = "\n".join(texts)
        places = [
            place
            for start, text in zip(self._starts, texts, strict=False)
            for place in range(start, start + len(text) - PIECE + 1, PIECE)
        ]
        hashes = np.fromiter((hash(self._text[p : p + PIECE]) for p in places), np.int64)
        order = np.argsort(hashes, kind="stable")
        self._places, self._hashes = np.array(places, np.int64)[order], hashes[order]
        few = max(2, int(len(trainset) * FEW))
        self._few = max(1, min(few, len(trainset) // 3))

    def check(self, changed: Mapping[str, str], components: Mapping[str, str]) -> None:
        """Check new texts.

        Args:
            changed: Those that are new, by component.
            components: All texts of the candidate that they are made from.

        Raises:
            ProposalError: An instruction is a copy, of kind ``"copied_example"``.
        """
        for name in texts_in(changed):
            text = changed[name]
            run = self.copied(text, components.get(name, ""))
            if run is not None:
                raise ProposalError(
                    "copied_example",
                    f"the new text of {name} copies a training example ({run!r}); "
                    "copy_guard=False lets it",
                )

    def copied(self, text: str, before: str) -> str | None:
        """A run of the text that few examples hold, and the text before did not; or ``None``."""
        text, before = _normal(text), _normal(before)
        pieces = [self._holding(text[at : at + PIECE]) for at in range(len(text) - PIECE + 1)]
        for start in range(len(text) - RUN + 1):
            # Wherever a run of an example begins, one of the example's pieces is whole in it.
            inside = [
                place - within
                for within, places in enumerate(pieces[start : start + RUN - PIECE + 1])
                for place in places
            ]
            run = text[start : start + RUN]
            if inside and run not in before and 0 < self._holders(run, inside) <= self._few:
                return run
        return None

    def _holding(self, piece: str) -> list[int]:
        """Where the examples have a text of a piece's length for one of their pieces."""
        own = hash(piece)
        first, last = (np.searchsorted(self._hashes, own, side) for side in ("left", "right"))
        return self._places[first:last].tolist() if first < last else []

    def _holders(self, run: str, places: Iterable[int]) -> int:
        """How many examples hold a run, at one of the places; of more than few, as many as tell."""
        found = set[int]()
        for place in places:
            if place >= 0 and self._text.startswith(run, place):
                found.add(bisect_right(self._starts, place))
                if len(found) > self._few:
                    break
        return len(found)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, those in lists and mappings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
