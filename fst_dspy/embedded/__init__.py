"""The language model that comes with the package: small, offline, steerable by its prompt.

``python -m fst_dspy.embedded.pretrain`` makes it from nothing; see that module for the recipe.
"""

from pathlib import Path


def path() -> Path:
    """The folder of the packaged model, in the format that ``AutoModelForCausalLM`` loads."""
    return Path(__file__).parent / "model"
