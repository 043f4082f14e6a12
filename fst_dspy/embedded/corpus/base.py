"""What a skill family is: a curriculum of generated chats, and questions to test it by.

To add a family, write a file in this folder with a class that satisfies ``Family`` and name it
in ``corpus/__init__.py``. Nothing else changes: pre-training, the tokenizer and the figures go
over whatever is named there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import dspy

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a training chat.

    Attributes:
        role: Whose turn it is.
        content: Its text.
        weight: Loss weight of its tokens and of the end token; 0 leaves the turn unlearned.
        spans: ``(start, end, weight)`` in characters of ``content``: other weights within it.
    """

    role: Role
    content: str
    weight: float = 0.0
    spans: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Stage:
    """A step of a curriculum.

    Attributes:
        name: For the progress bar and the figures.
        max_steps: Optimizer steps after which pre-training goes on regardless.
        target: Share (0 to 1) of heavily weighted tokens predicted right at which it goes on.
    """

    name: str
    max_steps: int
    target: float


@dataclass(frozen=True)
class Question:
    """A test question.

    Attributes:
        signature: The signature to be rendered; its instruction is the bare one.
        ideal_instructions: An instruction that states all that is needed.
        inputs: The values of the input fields.
        field, answer: The output field that is marked, and the right value of it.
    """

    signature: type[dspy.Signature]
    ideal_instructions: str
    inputs: dict[str, str]
    field: str
    answer: str


STAGES_OF_ALL = ("joint", "polish", "calibrate")
"""The stages that mix all families: chats of all kinds, harder ones, and a last one in which what
the prompt leaves open weighs as much as what it says, so that guesses come as often as they should.
"""


class Family(Protocol):
    """A skill that the embedded model is taught.

    Attributes:
        name: Short identifier.
        warmup: Stages run one after the other before the joint stage, in order.
        share: Weight of this family in the joint stage, in which all families are mixed.
    """

    name: str
    warmup: tuple[Stage, ...]
    share: float

    def sample(self, rng: Random, stage: str) -> list[Message]:
        """A training chat of a stage: of a warm-up by name, or of one of ``STAGES_OF_ALL``."""

    def questions(self, rng: Random, count: int, unseen: bool = False) -> Sequence[Question]:
        """``count`` test questions; ``unseen`` asks for words that no chat holds."""
