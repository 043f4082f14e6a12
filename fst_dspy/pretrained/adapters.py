"""Adapters in peft's format, which are no model: transformers would load one with them inside.

Adapters that are trained here would take the place of those, without a word.
"""

from __future__ import annotations

import json
from pathlib import Path

from fst_dspy.errors import ModelError

CONFIG = "adapter_config.json"


def refuse_adapters(where: str | Path) -> None:
    """Refuse a folder with adapters, which ``refused`` tells how to use.

    Raises:
        ModelError: There are adapters in it.
    """
    file = Path(where) / CONFIG
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    raise refused(where, base)


def refused(where: str | Path, base: str | None = None) -> ModelError:
    """The error that tells of adapters over some model."""
    over = f" over {base!r}" if base else ""
    return ModelError(
        f"{where} holds adapters{over} ({CONFIG}), and models are trained from whole weights: put "
        f"them together with peft.AutoPeftModelForCausalLM.from_pretrained({str(where)!r})"
        ".merge_and_unload(), save_pretrained that and its tokenizer to a new folder, and give "
        "that one"
    )
