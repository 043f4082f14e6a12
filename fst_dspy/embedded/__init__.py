"""The language model that comes with the package: small, offline, steerable by its prompt.

It speaks the formats of DSPy's adapters, follows rules, uses tools and acts in small worlds.

``python -m fst_dspy.embedded.pretrain`` makes it; see that module for the recipe.
"""

from pathlib import Path


def path() -> Path:
    """The folder of the packaged model, in the format that ``AutoModelForCausalLM`` loads."""
    return Path(__file__).parent / "model"
