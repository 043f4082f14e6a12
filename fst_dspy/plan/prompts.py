"""How long a program's prompts are, before it is run."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from fst_dspy.student.adapter import strict_adapter, texts_of_prompt
from fst_dspy.student.modules import every_predictor

logger = logging.getLogger(__name__)

LOOKED_AT = 8
"""Examples that are rendered."""
CHARACTERS_A_TOKEN = 4
"""Of English, where there is no tokenizer to count with."""
OPEN_CHARACTERS = 200
"""Of an input that another predictor makes, which is not known before it is run."""


@dataclass(frozen=True)
class Prompts:
    """What is known of a program's prompts.

    Attributes:
        calls: Model calls of a rollout: its predictors, each once.
        tokens: Of a prompt, the mean over calls.
        counted: Whether a tokenizer counted them.
    """

    calls: int
    tokens: int
    counted: bool


def prompts_of(
    program: dspy.Module,
    examples: Sequence[dspy.Example],
    count: Callable[[str], int] | None = None,
) -> Prompts:
    """Render the program's prompts on a few examples.

    Args:
        program: Its predictors, with their instructions and demos.
        examples: With inputs set; those whose fields a predictor takes are put in.
        count: Counts the tokens of a text; without it they are estimated.
    """
    adapter = strict_adapter(dspy.settings.adapter)
    lengths = []
    predictors = list(every_predictor(program).values())
    for predictor in predictors:
        for example in examples[:LOOKED_AT]:
            text = _rendered(adapter, predictor, dict(example.inputs()))
            lengths.append(count(text) if count else len(text) // CHARACTERS_A_TOKEN)
    tokens = round(statistics.fmean(lengths)) if lengths else 0
    return Prompts(len(predictors), tokens, count is not None)


def _rendered(adapter: dspy.Adapter, predictor: dspy.Predict, given: Mapping[str, Any]) -> str:
    signature = predictor.signature
    inputs = {name: given.get(name, "x" * OPEN_CHARACTERS) for name in signature.input_fields}
    try:
        return "\n".join(texts_of_prompt(adapter.format(signature, list(predictor.demos), inputs)))
    except Exception as error:
        # An input that stands for what is not known yet may have the wrong type for an adapter.
        logger.debug("a prompt cannot be rendered for the plan: %s", error)
        return f"{signature.instructions}\n{inputs}"
