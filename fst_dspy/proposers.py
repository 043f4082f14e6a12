"""What proposes new texts for a candidate from rollouts and their feedback.

A proposer has one method. ``ReflectionLMProposer`` asks a language model, any that ``dspy.LM``
reaches; ``fst_dspy.lessons.LessonProposer`` needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import dspy
from gepa.strategies.instruction_proposal import InstructionProposalSignature

from fst_dspy.candidate import INSTRUCTIONS, split_component

Record = Mapping[str, Any]
"""One rollout as one predictor saw it.

``"Inputs"``, ``"Generated Outputs"``, ``"Feedback"`` and ``"score"`` are for the reader of a
reflection prompt. ``"example_id"``, ``"labels"`` (the example's, as a dict) and ``"failure"`` (the
kind, or ``None``) are for programs.
"""

PROMPT_KEYS = ("Inputs", "Generated Outputs", "Feedback", "score")


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
            ProposalError: There is no usable proposal, and why. Anything else that is raised is
                counted too, under the name of its type.
        """
        ...


@runtime_checkable
class LearnsFromRecords(Protocol):
    """A proposer that also learns from rollouts it is not asked to propose from."""

    def observe(self, component: str, records: Sequence[Record]) -> None: ...


@runtime_checkable
class HasState(Protocol):
    """A proposer with a memory, which a resumed run must get back."""

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class ReflectionLMProposer:
    """Has a language model rewrite the instruction, with GEPA's reflection prompt.

    Args:
        lm: Any ``dspy.LM``. Its own settings hold: temperature, retries, timeout, cache.
        instruction_tokens: Longest instruction to accept.
        count_tokens: Counts the tokens of a text, best with the local model's tokenizer.
    """

    def __init__(
        self, lm: dspy.LM, instruction_tokens: int, count_tokens: Callable[[str], int]
    ) -> None:
        self.lm = lm
        self.instruction_tokens = instruction_tokens
        self.count_tokens = count_tokens
        words = max(1, instruction_tokens * 2 // 3)  # English runs at about 1.5 tokens a word
        self.template = (
            f"{InstructionProposalSignature.default_prompt_template}\n\n"
            f"The new instruction must not be longer than {words} words."
        )

    def propose(
        self,
        components: Mapping[str, str],
        records: Mapping[str, Sequence[Record]],
        names: Sequence[str],
    ) -> dict[str, str]:
        """New instructions, one call of the LM for each; see :class:`Proposer`."""
        return {
            name: self._reflect(components[name], records[name])
            for name in names
            if split_component(name)[1] == INSTRUCTIONS
        }

    def _reflect(self, instruction: str, records: Sequence[Record]) -> str:
        prompt = InstructionProposalSignature.prompt_renderer(
            {
                "current_instruction_doc": instruction,
                "dataset_with_feedback": [
                    {key: record[key] for key in PROMPT_KEYS} for record in records
                ],
                "prompt_template": self.template,
            }
        )
        answers = self.lm(prompt)
        answer = answers[0] if answers else ""
        text = answer.get("text") if isinstance(answer, dict) else answer
        if not isinstance(text, str) or not text.strip():
            raise ProposalError("empty", "the reflection LM answered with no text")
        proposal = InstructionProposalSignature.output_extractor(text)["new_instruction"].strip()
        if not proposal:
            raise ProposalError("empty", "the reflection LM proposed an empty instruction")
        tokens = self.count_tokens(proposal)
        if tokens > self.instruction_tokens:
            raise ProposalError(
                "too_long", f"the proposal has {tokens} tokens, over {self.instruction_tokens}"
            )
        return proposal
