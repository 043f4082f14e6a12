"""Finding the tokenizer of a run, to show its prompts."""

from __future__ import annotations

from pathlib import Path

from fst_dspy import embedded
from fst_dspy.errors import ModelError
from fst_dspy.pretrained import smollm2
from fst_dspy.report.rollouts import Decoder


def find_decoder(version: str, model: str | None = None) -> Decoder | None:
    """Makes texts of the run's prompts.

    Args:
        version: The model that the run started from, as ``config.json`` has it.
        model: Where its tokenizer is: ``"embedded"``, a folder or a hub id that is on this
            machine already. ``None`` finds the embedded model's own, and SmolLM2's.

    Returns:
        The decoder, or ``None`` where no model was given and the run's is not one of these.

    Raises:
        ModelError: The model that was given has no tokenizer here.
    """
    name = model or version.rsplit("@", 1)[0]
    where = embedded.path() if name == "embedded" else Path(name)
    if name in smollm2.NAMES:
        where = smollm2.cached(name) or where
    known = name == "embedded" or name in smollm2.NAMES
    if model is None and (not known or not where.is_dir()):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where if where.is_dir() else name, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer for {name!r} on this machine ({error}); give --model the folder of the "
            "run's model, or leave it out: the page then shows inputs in place of prompts"
        ) from error
    return lambda ids_T: str(tokenizer.decode(list(ids_T), skip_special_tokens=False))
