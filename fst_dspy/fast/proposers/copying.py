"""A guard against instructions that copy training examples: what is learned by heart is no rule.

A copy is a run of 50 characters, about eight words, that the inputs of a training example hold and
the instruction did not hold before. What many examples hold is no copy of one of them: a question
that is always the same, a list that every prompt begins with. Case, and all between words, do not
count. Short inputs, of one word or a label, cannot be copied by this measure.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dspy

from fst_dspy.fast.proposers.protocol import ProposalError
from fst_dspy.student.candidate import texts_in

RUN = 50
"""Characters of a training example, in a row, that an instruction may not hold."""
PIECE = RUN // 2
"""A run holds one of the text's pieces of this length whole, wherever it begins."""
FEW = 0.05
"""Share of the examples up to which a run is that of few; and two always are, of six."""


class CopyGuard:
    """Refuses instructions that copy the inputs of training examples."""

    def __init__(self) -> None:
        self._text, self._starts, self._few = "", [0], 0
        self._studied: list[dspy.Example] = []

    def study(self, trainset: Sequence[dspy.Example]) -> None:
        """Take the training examples; the same objects again cost nothing."""
        if [*map(id, trainset)] == [*map(id, self._studied)]:
            return
        self._studied = list(trainset)
        texts = [_normal(" \n ".join(_texts(e.inputs().toDict()))) for e in trainset]
        texts = list(dict.fromkeys(text for text in texts if len(text) >= RUN))
        self._starts, self._text = [0], ""
        for text in texts:
            self._starts.append(self._starts[-1] + len(text) + 1)
        self._text = "\n".join(texts)
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
        last = len(text) - RUN
        for at in range(0, len(text) - PIECE + 1, PIECE):
            if text[at : at + PIECE] not in self._text:
                continue
            for start in range(max(0, at + PIECE - RUN), min(at, last) + 1):
                run = text[start : start + RUN]
                if run not in before and 0 < self._holders(run) <= self._few:
                    return run
        return None

    def _holders(self, run: str) -> int:
        """How many examples hold a run; of more than few, as many as tell that."""
        found, at = 0, self._text.find(run)
        while at >= 0 and found <= self._few:
            found += 1
            after = self._starts[bisect_right(self._starts, at)]
            at = self._text.find(run, after)
        return found


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
