"""Exercises in following instructions, generated: what the adapter of SmolLM2 is trained on.

None of the tasks that the model is measured on is among them, nor their words.
"""

from collections.abc import Mapping

from fst_dspy.smollm2.corpus.base import Skill
from fst_dspy.smollm2.corpus.rules import rules
from fst_dspy.smollm2.corpus.schemas import schemas
from fst_dspy.smollm2.corpus.strategies import strategies
from fst_dspy.smollm2.corpus.tools import tools
from fst_dspy.smollm2.corpus.topics import topics

SKILLS: Mapping[str, Skill] = {
    "rules": rules,
    "topics": topics,
    "strategies": strategies,
    "schemas": schemas,
    "tools": tools,
}
SHARES: Mapping[str, float] = {
    "rules": 0.65,
    "topics": 0.14,
    "strategies": 0.12,
    "schemas": 0.06,
    "tools": 0.03,
}
"""How often each is drawn."""
