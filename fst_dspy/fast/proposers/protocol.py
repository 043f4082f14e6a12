"""What proposes new texts for a candidate from rollouts and their feedback.

A proposer has one method. ``fst_dspy.fast.proposers.reflection.ReflectionLMProposer`` asks a
language model, any that ``dspy.LM`` reaches; ``fst_dspy.fast.proposers.lessons.LessonProposer``
needs none; ``fst_dspy.fast.proposers.demos.DemoProposer`` proposes demos.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import dspy

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
"""One rollout as one predictor saw it.

``"Inputs"``, ``"Generated Outputs"``, ``"Feedback"`` and ``"score"`` are for the reader of a
reflection prompt, and so is ``"Program Trajectory"`` where ``reflection_context`` asks for it: all
steps of the program, each with ``"Step"``, ``"Inputs"`` and ``"Generated Outputs"``.
``"example_id"``, ``"labels"`` (the example's, as a dict) and ``"failure"`` (the kind, or ``None``)
are for programs.
"""
TRAJECTORY = "Program Trajectory"
"""The key of all steps in a record."""
FEEDBACK = "Feedback"
"""The key of what the metric said, whole: a proposer may read all of it."""
MAX_TEXT = 4000
"""Characters of one field that a language model is shown; longer texts lose their middle."""


def well_formed(text: str) -> str:
    """The text without lone surrogates, which no tokenizer or provider takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def clipped(text: str, limit: int = MAX_TEXT) -> str:
    """The text, without its middle where it is long."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def both_ends(text: str, limit: int = MAX_TEXT) -> str:
    """As ``clipped``, without a word on it: for what looks at the words of a text."""
    return text if len(text) <= limit else f"{text[: limit // 2]} {text[-(limit // 2) :]}"


def shown(record: Record, keys: Sequence[str]) -> dict[str, Any]:
    """What a language model is shown of a record, of the keys that it has; feedback is clipped."""
    own = {key: record[key] for key in keys if key in record}
    return {key: clipped(value) if key == FEEDBACK else value for key, value in own.items()}


def own_copy(proposer: Any) -> Any:
    """A user's proposer for one compile of several, without what others have taught it.

    One that holds a client, a lock or the like cannot be copied: it is given to all of them.
    """
    try:
        return copy.deepcopy(proposer)
    except Exception as error:  # whatever its class raises
        logger.warning(
            "the instruction_proposer cannot be copied (%s), so that all compiles share what it "
            "remembers",
            error,
        )
        return proposer


class ProposalError(Exception):
    """A proposal that cannot be used; the fast phase counts it under ``kind`` and goes on."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Proposer(Protocol):
    """Proposes new texts for some components of a candidate (gepa's ``ProposalFn``)."""

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """New texts by component name; a component left out keeps its text.

        Args:
            components: All texts of the candidate to improve.
            records: For each of ``names``, every rollout of a minibatch under that candidate.
            names: The components to propose for.

        Raises:
            ProposalError: There is no usable proposal, and why. Other errors are counted too,
                under the names of their types, but for those that tell of a mistake in the
                proposer, such as ``TypeError``: they end the run.
        """
        ...


@runtime_checkable
class LearnsFromRecords(Protocol):
    """A proposer that also learns from rollouts it is not asked to propose from."""

    def observe(self, component: str, records: Sequence[Record]) -> None: ...


@runtime_checkable
class StudiesExamples(Protocol):
    """A proposer that also learns from the inputs and labels of training examples."""

    def study(self, examples: Mapping[str, dspy.Example]) -> None:
        """Take the training examples, by id; called again where they are others."""
        ...


@dataclass(frozen=True)
class Findings:
    """What a proposer found to learn.

    Attributes:
        rollouts: Rollouts that it was shown and that the metric has scored.
        with_feedback: Those whose metric said something.
        lessons: Lessons that it knows by now, those of labels included.
        sample: One text of feedback.
    """

    rollouts: int
    with_feedback: int
    lessons: int
    sample: str


@runtime_checkable
class TellsFindings(Protocol):
    """A proposer that depends on what feedback states."""

    def findings(self) -> Findings: ...


@runtime_checkable
class CountsFaults(Protocol):
    """A proposer that makes some failures good by itself, and tells of them."""

    def take_faults(self) -> Counter[str]: ...


@runtime_checkable
class HasState(Protocol):
    """A proposer with a memory, which a resumed run must get back."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...
