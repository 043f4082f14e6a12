"""vLLM's own signatures, as far as it is called, to hold a stand-in to.

Written down from its sources (``vllm/sampling_params.py``, ``vllm/entrypoints/llm.py``,
``vllm/engine/arg_utils.py``, ``vllm/lora/request.py``); where vLLM is installed, a test
marked ``gpu`` compares them with what is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LLM_ARGUMENTS = frozenset(
    {
        "model",
        "tokenizer",
        "trust_remote_code",
        "tensor_parallel_size",
        "dtype",
        "quantization",
        "seed",
        "gpu_memory_utilization",
        "enforce_eager",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "distributed_executor_backend",
        "logprobs_mode",
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "max_cpu_loras",
        "lora_dtype",
    }
)
"""Keywords of ``LLM``, those of its ``EngineArgs`` among them."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``max_lora_rank`` may be."""


@dataclass(frozen=True)
class SamplingParams:
    """``vllm.SamplingParams``: the same names and defaults, and what it checks."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        assert -2 <= self.presence_penalty <= 2 and -2 <= self.frequency_penalty <= 2
        assert self.repetition_penalty > 0 and self.temperature >= 0
        assert 0 < self.top_p <= 1 and (self.top_k >= 1 or self.top_k in (0, -1))
        assert self.max_tokens is None or self.max_tokens >= 1
        assert not self.stop or self.detokenize, "vLLM looks for stop strings in its own text"
        assert self.seed is None or 0 <= self.seed < 2**63


@dataclass(frozen=True)
class LoRARequest:
    """``vllm.lora.request.LoRARequest``, and what it checks."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1 and self.lora_path
