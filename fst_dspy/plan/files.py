"""A plan from a model's files, of which ``config.json`` is enough; no weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dspy
from transformers import AutoTokenizer

from fst_dspy.config import FSTConfig
from fst_dspy.errors import ModelError
from fst_dspy.model.hardware import default_dtype, device_named
from fst_dspy.model.sizes import described, parameter_count
from fst_dspy.plan.plan import Plan, make_plan
from fst_dspy.plan.prompts import prompts_of
from fst_dspy.pretrained.gguf import SUFFIX, read_from
from fst_dspy.pretrained.places import model_place
from fst_dspy.types import Arm

MAX_TOKENS = 512
"""Of an answer, as ``LocalLM`` has by default where an eighth of the context is more."""
UNKNOWN_CONTEXT = 2048
SAMPLE = "words"


def plan_of_files(
    model: str | Path,
    program: dspy.Module,
    trainset: Sequence[dspy.Example],
    config: FSTConfig,
    *,
    device: str | None = None,
    arm: Arm = "fst",
    val_examples: int | None = None,
) -> Plan:
    """Plan a compile of a program on a model that is not loaded.

    Args:
        model: ``"embedded"``, ``"smollm2"`` (fetched, if it was not yet), a folder with
            ``config.json``, a GGUF file, or a hub id.
        program: The program.
        trainset: Examples, of which a few are rendered.
        config, arm: As for ``FST``.
        val_examples: As for ``make_plan``.
        device: CUDA where there is one, by default.

    Raises:
        ModelError: There is no such configuration, or no such device.
    """
    name = Path(str(model).rstrip("/")).name.removesuffix(SUFFIX)
    where, described_model = described_by_name(model)
    place = device_named(device)
    dtype = default_dtype(place, lambda: parameter_count(described_model))
    text = described_model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    return make_plan(
        described_model,
        name,
        config,
        prompts_of(program, trainset, _counter(where)),
        dtype=dtype,
        device=place,
        max_tokens=min(MAX_TOKENS, context // 8),
        context=context,
        arm=arm,
        val_examples=val_examples,
    )


def described_by_name(model: str | Path) -> tuple[str, Any]:
    """Where a model's files are, and the model as its configuration describes it, without weights.

    Args:
        model: As for ``plan_of_files``.

    Raises:
        ModelError: There is no such configuration.
    """
    try:
        where = model_place(model)
        return where, described(where)
    except Exception as error:
        raise ModelError(
            f"cannot read the configuration of {str(model)!r} ({type(error).__name__}: {error}); "
            'give "embedded", "smollm2", a folder with config.json, a GGUF file, or a hub id that '
            "this machine can reach"
        ) from error


def _counter(where: str) -> Callable[[str], int] | None:
    """Counts tokens, where there is a tokenizer."""
    try:
        named, more = read_from(where)
        tokenizer = AutoTokenizer.from_pretrained(named, **more)
        # Of a folder without one transformers makes an empty tokenizer of the model's kind.
        if SAMPLE not in tokenizer.decode(tokenizer(SAMPLE)["input_ids"]):
            return None
    except Exception:  # whatever is odd about it: prompts are then estimated, and said so
        return None
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
