"""A model read from files that hold all of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from fst_dspy.errors import ModelError
from fst_dspy.pretrained.adapters import refused


def read_whole(where: str | Path, **how: Any) -> Any:
    """As transformers' ``from_pretrained``, which draws weights that are missing at random.

    They would be others every time, and the model none that anybody has trained.

    Args:
        where: A folder or a hub id.
        how: For ``from_pretrained``.

    Raises:
        ModelError: Weights are missing, or there are adapters among them.
    """
    model, told = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **how)
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub; folders are looked into first
        raise refused(where)
    missing = sorted(told["missing_keys"])
    if missing:
        raise ModelError(
            f"its files lack {len(missing)} of its weights ({', '.join(missing[:3])}), which would "
            "be random; they are not all there, or are those of a model without an output layer"
        )
    return model
