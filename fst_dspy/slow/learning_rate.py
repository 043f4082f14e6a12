"""The learning rate where none is given, by the size of the model.

A rate that suits a small model ruins a large one. The rule goes through rates that are known to
work for GRPO with AdamW, straight between them on logarithmic axes:

========== ================ ==========================================================
parameters full fine-tuning source
========== ================ ==========================================================
2 M        3e-4             the embedded model (0.95 M) on this package's programs
135 M      5e-5             SmolLM2-135M, 24 steps: it learns, and at 1e-5 hardly does
7 B        1e-6             DeepSeekMath (Shao et al., 2024), and TRL's own default
========== ================ ==========================================================

Low-rank adapters want ten times the rate of full fine-tuning, whatever their rank (Schulman et
al., 2025, "LoRA Without Regret"); but for the smallest models, where 3e-4 is high already.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

from fst_dspy.config import SlowConfig
from fst_dspy.model.sizes import parameter_count

FULL = ((2e6, 3e-4), (135e6, 5e-5), (7e9, 1e-6))
LORA = ((2e6, 3e-4), (135e6, 5e-4), (7e9, 1e-5))
"""Parameters and rates; below the first and above the last the rate stays."""


def default_learning_rate(parameters: int, lora: bool) -> float:
    """The peak learning rate for a model of a size, to two digits.

    Args:
        parameters: Of the whole model without adapters, also where only these are trained.
        lora: Whether adapters are trained.
    """
    known = LORA if lora else FULL
    rate = known[-1][1]
    if parameters <= known[0][0]:
        rate = known[0][1]
    for (fewer, before), (more, after) in pairwise(known):
        if fewer < parameters <= more:
            share = math.log(parameters / fewer) / math.log(more / fewer)
            rate = before * (after / before) ** share
    return float(f"{rate:.1e}")


def with_learning_rate(slow: SlowConfig, model: Any) -> SlowConfig:
    """The settings with the learning rate that they leave to the model, a causal LM.

    It is the same before and after the model has got its adapters.
    """
    if slow.learning_rate is not None:
        return slow
    rate = default_learning_rate(parameter_count(model), lora=slow.adapters is not None)
    return replace(slow, learning_rate=rate)
