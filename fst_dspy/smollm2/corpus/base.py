"""What an exercise is: a signature, and turns whose answers follow from what the prompt says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import dspy


@dataclass(frozen=True)
class Turn:
    """One example: values by field name, of the signature's types."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Exercise:
    """A prompt and several questions under it.

    Attributes:
        signature: Its instructions say how to answer, unless the demos do.
        demos: Turns shown before each question.
        turns: The questions, each asked alone after the demos.
        learn_demos: Whether the demos' answers follow from the prompt too.
    """

    signature: type[dspy.Signature]
    demos: tuple[Turn, ...]
    turns: tuple[Turn, ...]
    learn_demos: bool = True

    @property
    def without_rules(self) -> type[dspy.Signature]:
        """The signature with its instructions taken away: what is left cannot decide."""
        return self.signature.with_instructions("Answer.")


class Skill(Protocol):
    """A generator of exercises of one kind."""

    def __call__(self, rng: Random, held_out: bool, reasoning: bool) -> Exercise:
        """One exercise, determined by ``rng``.

        Args:
            rng: All choices are drawn from it.
            held_out: Made of the words and wordings that training never sees, and of these alone.
            reasoning: With a reasoning field, as ``dspy.ChainOfThought`` puts it first.
        """
        ...
