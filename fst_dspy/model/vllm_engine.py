"""vLLM in place of the decode loop, on the same GPU as training: ``pip install 'fst-dspy[vllm]'``.

Building vLLM's engine and bringing it the trained weights is TRL's (``VLLMGeneration``); here are
only the requests, each with its own seed, temperature and stop strings, and what comes back. The
weights are brought over when they may have changed since the last call; they are not hashed.

The tests hold it to what is asked of any engine with a stand-in for vLLM, and where there is a GPU
with vLLM itself (``make test-gpu``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fst_dspy.distributed import refuse_fsdp
from fst_dspy.errors import ConfigError
from fst_dspy.model.endings import eos_ids, kept_tokens, texts_of
from fst_dspy.model.generate import (
    GenerationRequest,
    GenerationResult,
    check_prompt,
    room_for,
)
from fst_dspy.model.hardware import global_rng_kept
from fst_dspy.model.policy import Policy

MAX_SEED = 2**63 - 1
LOWEST_TEMPERATURE = 0.01
"""vLLM takes a lower one, but 0, for this."""
LONGEST_CONVOLUTION = 4
"""Tokens that vLLM's kernel for short convolutions reads at most; of more, it would ignore some."""


def use_vllm(policy: Policy, *, gpu_memory_utilization: float = 0.3) -> None:
    """Generate with vLLM from here on; training stays where it is.

    Args:
        policy: On a GPU, in bfloat16 or float16, without adapters; vLLM must know its architecture.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, weights and caches.

    Raises:
        ConfigError: vLLM is not installed or cannot run the model, there is no GPU, or accelerate
            is set up for FSDP.
    """
    refuse_fsdp("the vLLM engine")
    if policy.device.type != "cuda":
        raise ConfigError("vLLM runs on a GPU; the built-in engine runs anywhere")
    if policy.model.dtype == torch.float32:
        raise ConfigError(
            "vLLM would sample in bfloat16 from a policy in float32; load it with dtype='bfloat16'"
        )
    if getattr(policy.model.config, "conv_L_cache", 0) > LONGEST_CONVOLUTION:
        raise ConfigError(
            f"vLLM's convolutions read {LONGEST_CONVOLUTION} tokens, those of {policy.name} "
            f"{policy.model.config.conv_L_cache}; the built-in engine runs it"
        )
    try:
        from vllm import SamplingParams
    except ImportError as error:
        raise ConfigError("vLLM is not installed: pip install 'fst-dspy[vllm]'") from error
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    try:
        with global_rng_kept(policy.device):
            vllm = VLLMGeneration(
                model=policy.model,
                accelerator=Accelerator(),
                processing_class=policy.tokenizer,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_length=policy.context_length,
                trust_remote_code=policy.source["trust_remote_code"],
            )
    except Exception as error:
        raise ConfigError(
            f"vLLM cannot run {policy.name} ({type(error).__name__}: {error}); the built-in engine "
            "does without it"
        ) from error
    policy.generator = VllmGenerator(vllm, SamplingParams)


class VllmGenerator:
    """What ``fst_dspy.model.generate.generate`` does, done by vLLM.

    Args:
        vllm: TRL's ``VLLMGeneration``, or what has its ``llm`` and ``sync_weights``.
        sampling_params: vLLM's ``SamplingParams``.
    """

    def __init__(self, vllm: Any, sampling_params: Callable[..., Any]) -> None:
        self.vllm, self.sampling_params = vllm, sampling_params
        self._holds: Any = None  # the mark of the weights that it has

    def __call__(
        self, policy: Policy, requests: Sequence[GenerationRequest]
    ) -> list[GenerationResult]:
        """Sample a completion for every request, in the requests' order.

        Raises:
            PromptTooLongError: A prompt leaves no room for a completion; nothing is generated.
            ConfigError: Adapters, which TRL would merge into the base and take out again, rounding
                it each time; ``top_p``, ``top_k`` or penalties, which vLLM's log-probabilities
                would take in; or a temperature so low that vLLM takes another one.
        """
        for request in requests:
            check_prompt(policy, request.prompt_ids_T)
            if request.top_p < 1 or request.top_k or request.is_penalised:
                raise ConfigError(
                    "vLLM gives log-probabilities after top_p, top_k and penalties; leave them out"
                )
            if request.grammar is not None and request.grammar.after:
                raise ConfigError(
                    "vLLM holds an answer to its format from its first token on, and this model "
                    "thinks first; use the built-in engine, or structured=False"
                )
            if 0 < request.temperature < LOWEST_TEMPERATURE:
                raise ConfigError(
                    f"vLLM samples at {LOWEST_TEMPERATURE} or above, not at {request.temperature}; "
                    "0 takes the likeliest token"
                )
        if policy.lora is not None:
            raise ConfigError("the vLLM engine has no adapters: use lora=False or no vLLM")
        with policy.lock:
            mark = policy.mark()
            if mark != self._holds:
                self.vllm.sync_weights()
                self._holds = mark
            outputs = self.vllm.llm.generate(
                [{"prompt_token_ids": list(r.prompt_ids_T)} for r in requests],
                sampling_params=[self._params(policy, request) for request in requests],
                use_tqdm=False,
            )
        answers = [output.outputs[0] for output in outputs]
        ids = [list(answer.token_ids) for answer in answers]
        kept = [
            kept_tokens(policy.tokenizer, row, r.end) for row, r in zip(ids, requests, strict=True)
        ]
        uncut_B = [n == len(row) for n, row in zip(kept, ids, strict=True)]
        ids = [row[:n] for n, row in zip(kept, ids, strict=True)]
        texts = texts_of(policy, ids, [r.stop for r in requests], [r.end for r in requests])
        return [
            GenerationResult(
                completion_ids_T=tuple(ids_T),
                logprobs_T=tuple(
                    given[token].logprob
                    for token, given in zip(ids_T, answer.logprobs[: len(ids_T)], strict=True)
                ),
                text=text,
                finish_reason="length" if answer.finish_reason == "length" and uncut else "stop",
            )
            for ids_T, text, answer, uncut in zip(ids, texts, answers, uncut_B, strict=True)
        ]

    def _params(self, policy: Policy, request: GenerationRequest) -> Any:
        held = {}
        if request.grammar is not None:
            from vllm.sampling_params import StructuredOutputsParams

            # vLLM's default backend, "auto", leaves what begins with "%llguidance" to llguidance.
            held["structured_outputs"] = StructuredOutputsParams(grammar=request.grammar.text)
        return self.sampling_params(
            temperature=request.temperature,
            max_tokens=room_for(policy, request),
            seed=request.seed & MAX_SEED,
            stop=[*request.stop, *_closing(request)],
            stop_token_ids=sorted(eos_ids(policy)),
            logprobs=0,  # of the sampled token alone
            detokenize=bool(request.stop or request.end),  # the text is made by ``texts_of``
            **held,
        )


def _closing(request: GenerationRequest) -> list[str]:
    """The end of an answer as a stop string; in a thought it would end nothing but the thought."""
    if request.end is None or request.end.thought is not None:
        return []
    return ["\n" + request.end.marker]
