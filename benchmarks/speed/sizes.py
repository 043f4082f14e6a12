"""The table of ``docs/sizes.md``: memory and time by model size, computed by ``fst_dspy.plan``.

python -m benchmarks.speed.sizes     # a second; loads no weights

Times are for a device of the speed that is given, so that they can be compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from fst_dspy.config import FSTConfig
from fst_dspy.embedded import path as embedded_path
from fst_dspy.model.sizes import described
from fst_dspy.plan.plan import GIB, make_plan
from fst_dspy.plan.prompts import Prompts

REPORT = Path(__file__).parents[2] / "docs" / "sizes.md"
BEGIN, END = "<!-- sizes: made by benchmarks/speed/sizes.py -->", "<!-- sizes: end -->"
FLOPS = 1e14
"""Of the device that times are computed for: a GPU of 100 bfloat16 TFLOP/s in matrix products."""
TOTAL = 192 * GIB
PROMPT, NEW = 350, 24


def qwen3(hidden: int, middle: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    """The shape of one of Qwen3's dense models."""
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=tied,
    )


MODELS: dict[str, Any] = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, True),
    "Qwen3-8B": qwen3(4096, 12_288, 36, 32, False),
}


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| model | trained | parameters | weights | gradients, optimizer | copies | activations, "
        "cache | at most | a step |",
        "| --- " * 9 + "|",
    ]
    models = {"embedded": described(embedded_path())}
    with torch.device("meta"):
        models |= {name: AutoModelForCausalLM.from_config(c) for name, c in MODELS.items()}
    for name, model in models.items():
        dtype = torch.float32 if name == "embedded" else torch.bfloat16
        for lora in (False, True):
            lines.append(_row(name, model, dtype, lora))
    return "\n".join(lines)


def _row(name: str, model: Any, dtype: torch.dtype, lora: bool) -> str:
    plan = make_plan(
        model,
        name,
        FSTConfig.make(max_cycles=1, lora=lora),
        Prompts(1, PROMPT, True),
        dtype=dtype,
        device=torch.device("cpu"),
        max_tokens=NEW,
        context=2048,
        flops=FLOPS,
        total=TOTAL,
    )
    memory = plan.memory
    sizes = (
        memory.weights,
        memory.gradients + memory.optimizer,
        memory.copies,
        memory.activations + memory.cache,
        plan.peak_memory,
    )
    cells = " | ".join(f"{size / GIB:.3g}" for size in sizes)
    trained = "adapters" if lora else "all"
    seconds = f"{plan.seconds_per_step:.2g} s"
    return f"| {name} | {trained} | {plan.parameters / 1e6:,.4g} M | {cells} | {seconds} |"


def main() -> None:
    """Renew the table."""
    before, rest = REPORT.read_text(encoding="utf-8").split(BEGIN)
    REPORT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
