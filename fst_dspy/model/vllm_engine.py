"""vLLM in place of the decode loop, on the same GPU as training: ``pip install 'fst-dspy[vllm]'``.

Here are the requests, each with its own seed, temperature and stop strings, what comes back, and
how the trained weights get there, which is one of two ways:

- *All weights*: building the engine and writing them into it is TRL's (``VLLMGeneration``).
- *Adapters* are served as such, by vLLM's own ``LoRARequest``, over a base that stays as it is. TRL
  would merge them into the base and take them out again, rounding it each time.

Either way they are brought over when they may have changed since the last call, without hashing.

vLLM gives log-probabilities after ``top_p``, ``top_k`` and penalties. What is learned from is the
whole distribution (``GenerationResult``), so completions of such requests are read once more, by
the policy itself.

The tests hold it to what is asked of any engine with a stand-in for vLLM, whose calls are checked
against vLLM's own signatures, and where there is a GPU with vLLM itself (``make test-gpu``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fst_dspy.config import LoraConfig
from fst_dspy.distributed import refuse_fsdp
from fst_dspy.errors import ConfigError
from fst_dspy.model.endings import eos_ids, kept_tokens, stopped_tokens, texts_of
from fst_dspy.model.generate import (
    GenerationRequest,
    GenerationResult,
    check_prompt,
    room_for,
)
from fst_dspy.model.hardware import global_rng_kept
from fst_dspy.model.logprobs import sampled_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.pretrained.gguf import SUFFIX
from fst_dspy.types import Grammar

MAX_SEED = 2**63 - 1
LOWEST_TEMPERATURE = 0.01
"""vLLM takes a lower one, but 0, for this."""
LONGEST_CONVOLUTION = 4
"""Tokens that vLLM's kernel for short convolutions reads at most; of more, it would ignore some."""
RANKS = (8, 16, 32, 64, 128, 256)
"""Of adapters, that all versions of vLLM can make room for; lower ones fit within."""
BATCHED_TOKENS = 4096
"""Of one pass of vLLM's; its own default makes it expect a larger need of memory than there is."""


def use_vllm(
    policy: Policy, *, lora: bool | LoraConfig = False, gpu_memory_utilization: float = 0.3
) -> None:
    """Generate with vLLM from here on; training stays where it is.

    Args:
        policy: On a GPU, in bfloat16 or float16; vLLM must know its architecture.
        lora: Make room for adapters, as ``FST(lora=...)`` is given them, whose default then is
            these; without it all weights are trained.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, weights and caches.

    Raises:
        ConfigError: vLLM is not installed or cannot run the model as the policy has it, there is no
            GPU, or accelerate is set up for FSDP.
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
    if "quantization_config" in policy.source:
        raise ConfigError(
            f"vLLM reads {policy.name} as it is stored, and here it was quantized as it was "
            "loaded: it would sample from other weights than adapters are trained over; leave "
            "quantization_config out, or take the built-in engine"
        )
    place = policy.source["place"]
    if place.endswith(SUFFIX):
        raise ConfigError(
            "vLLM is given folders here, not GGUF files: write one with "
            "policy.model.save_pretrained(folder) and policy.tokenizer.save_pretrained(folder)"
        )
    try:
        import vllm
    except ImportError as error:
        raise ConfigError("vLLM is not installed: pip install 'fst-dspy[vllm]'") from error
    try:
        with global_rng_kept(policy.device):
            weights: Weights
            if lora:
                lora = LoraConfig() if lora is True else lora
                weights = Adapters.over(policy, place, lora, gpu_memory_utilization)
            else:
                weights = AllWeights(_trl_engine(policy, gpu_memory_utilization))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"vLLM cannot run {policy.name} ({type(error).__name__}: {error}); the built-in engine "
            "does without it"
        ) from error
    policy.generator = VllmGenerator(weights, vllm.SamplingParams, gpu_memory_utilization)


def _trl_engine(policy: Policy, gpu_memory_utilization: float) -> Any:
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    made = VLLMGeneration(
        model=policy.model,
        accelerator=Accelerator(),
        processing_class=policy.tokenizer,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_length=policy.context_length,
        trust_remote_code=policy.source["trust_remote_code"],
    )
    # TRL leaves it to vLLM, which goes by config.json and by what the GPU can do.
    own = made.llm.model_config.dtype
    if own != policy.model.dtype:
        own, trained = (str(dtype).removeprefix("torch.") for dtype in (own, policy.model.dtype))
        raise ConfigError(
            f"vLLM samples in {own} from a policy in {trained}; load it with dtype='{own}'"
        )
    return made


class Weights(Protocol):
    """How vLLM gets the weights that the policy has.

    Attributes:
        llm: vLLM's ``LLM``.
        lora: The adapters that it was made for; ``None`` where all weights are trained.
    """

    llm: Any
    lora: LoraConfig | None

    def check(self, lora: LoraConfig | None) -> None:
        """Refuse what is to be trained, where vLLM could not be given it.

        Raises:
            ConfigError: It could not.
        """
        ...

    def bring(self, policy: Policy) -> Any:
        """Let vLLM have the weights now in the model; the caller holds its lock.

        Returns:
            vLLM's ``LoRARequest`` for the adapters; ``None`` without any.
        """
        ...


class AllWeights:
    """They are written into vLLM's model.

    Args:
        vllm: TRL's ``VLLMGeneration``, or what has its ``llm`` and ``sync_weights``.
    """

    def __init__(self, vllm: Any) -> None:
        self.vllm, self.llm = vllm, vllm.llm
        self.lora: LoraConfig | None = None
        self._holds: Any = None  # the mark of the weights that it has

    def check(self, lora: LoraConfig | None) -> None:
        """As ``Weights``."""
        if lora is not None:
            raise ConfigError(
                "this vLLM engine has no room for adapters: call use_vllm(policy, lora=True) "
                "before, or train with lora=False"
            )

    def bring(self, policy: Policy) -> None:
        """As ``Weights``."""
        self.check(policy.lora or policy.lora_in_use)
        mark = policy.mark()
        if mark != self._holds:
            self.vllm.sync_weights()
            self._holds = mark


class Adapters:
    """The base stays, and the adapters in use lie in a folder that vLLM reads.

    Args:
        llm: vLLM's ``LLM``, with room for one set of adapters.
        lora_request: vLLM's ``LoRARequest``.
        lora: The adapters that it was made for, and has room for.
    """

    def __init__(self, llm: Any, lora_request: Callable[..., Any], lora: LoraConfig) -> None:
        self.llm = llm
        self.lora: LoraConfig | None = lora
        self._room = _room_of_rank(lora.rank)
        self._lora_request = lora_request
        self._folder = tempfile.TemporaryDirectory(prefix="fst-adapters-")
        self._served: tuple[Any, Any] | None = None  # the mark of the adapters, and their request
        self._count = 0

    @classmethod
    def over(cls, policy: Policy, place: str, lora: LoraConfig, share: float) -> Adapters:
        """Build vLLM's engine.

        Args:
            place: The folder or hub id of the base.
            share: Of the GPU's memory.

        Raises:
            ConfigError: vLLM has no room for adapters of such a rank.
        """
        from accelerate import Accelerator
        from trl.trainer.utils import ensure_master_addr_port
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        arguments = engine_arguments(policy, place, lora, share)
        # As TRL does it: one engine in each process, beside what trains there.
        own = Accelerator()
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        places = (own.process_index, own.local_process_index, own.num_processes)
        os.environ.update(zip(names, map(str, places), strict=True))
        ensure_master_addr_port()
        return cls(LLM(**arguments), LoRARequest, lora)

    def check(self, lora: LoraConfig | None) -> None:
        """As ``Weights``."""
        if lora is None:
            raise ConfigError(
                "this vLLM engine serves adapters over weights that stay as they are: train "
                "with lora=True, or call use_vllm(policy) without lora"
            )
        if lora.rank > self._room:
            raise ConfigError(
                f"vLLM was given room for adapters of rank {self._room}, these have {lora.rank}: "
                f"call use_vllm(policy, lora=LoraConfig(rank={lora.rank}))"
            )

    def bring(self, policy: Policy) -> Any:
        """As ``Weights``."""
        lora = policy.lora_in_use
        if lora is None and policy.version() == policy.base_version:
            return None
        self.check(lora)
        mark = policy.visiting or policy.mark()
        if self._served is None or self._served[0] != mark:
            # A new number for each: vLLM keeps what it has read under its number.
            self._count += 1
            name = f"{policy.name}-{self._count}"
            where = policy.write_adapter(Path(self._folder.name) / name)
            if self._count > 1:
                shutil.rmtree(Path(self._folder.name) / f"{policy.name}-{self._count - 1}")
            self._served = mark, self._lora_request(name, self._count, str(where))
        return self._served[1]


def engine_arguments(policy: Policy, place: str, lora: LoraConfig, share: float) -> dict[str, Any]:
    """What vLLM's ``LLM`` is given for adapters over a base; arguments as ``Adapters.over``."""
    return {
        "model": place,
        "dtype": policy.source["dtype"],
        "max_model_len": policy.context_length,
        "gpu_memory_utilization": share,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "distributed_executor_backend": "external_launcher",
        "logprobs_mode": "processed_logprobs",
        "enable_lora": True,
        "max_lora_rank": _room_of_rank(lora.rank),
        "max_loras": 1,
        "trust_remote_code": policy.source["trust_remote_code"],
    }


def _room_of_rank(rank: int) -> int:
    """The rank that vLLM makes room for, to serve adapters of this one."""
    room = next((room for room in RANKS if room >= rank), None)
    if room is None:
        raise ConfigError(f"vLLM has room for adapters of rank {RANKS[-1]}, not of {rank}")
    return room


@dataclass(frozen=True)
class _Row:
    """A completion that is read again, by ``sampled_logprobs``."""

    prompt_ids_T: tuple[int, ...]
    completion_ids_T: tuple[int, ...]
    temperature: float
    grammar: Grammar | None


class VllmGenerator:
    """What ``fst_dspy.model.generate.generate`` does, done by vLLM.

    Args:
        weights: How vLLM gets them.
        sampling_params: vLLM's ``SamplingParams``.
        memory_share: Of the GPU's memory, that vLLM has.
    """

    def __init__(
        self, weights: Weights, sampling_params: Callable[..., Any], memory_share: float = 0.0
    ) -> None:
        self.weights, self.sampling_params = weights, sampling_params
        self.memory_share = memory_share

    def __call__(
        self, policy: Policy, requests: Sequence[GenerationRequest]
    ) -> list[GenerationResult]:
        """Sample a completion for every request, in the requests' order.

        Raises:
            PromptTooLongError: A prompt leaves no room for a completion; nothing is generated.
            ConfigError: Adapters that the engine has no room for, or none where it is made for
                them; an answer held to a format behind a thought; or a temperature so low that
                vLLM takes another one.
        """
        for request in requests:
            check_prompt(policy, request.prompt_ids_T)
            if request.grammar is not None and request.grammar.thought is not None:
                raise ConfigError(
                    "vLLM holds an answer to its format from its first token on, and this model "
                    "thinks first; use the built-in engine, or structured=False"
                )
            if 0 < request.temperature < LOWEST_TEMPERATURE:
                raise ConfigError(
                    f"vLLM samples at {LOWEST_TEMPERATURE} or above, not at {request.temperature}; "
                    "0 takes the likeliest token"
                )
        with policy.lock:
            adapters = self.weights.bring(policy)
            outputs = self.weights.llm.generate(
                [{"prompt_token_ids": list(r.prompt_ids_T)} for r in requests],
                sampling_params=[self._params(policy, request) for request in requests],
                use_tqdm=False,
                lora_request=adapters,
            )
            answers = [output.outputs[0] for output in outputs]
            ids = [list(answer.token_ids) for answer in answers]
            kept = [
                min(
                    kept_tokens(policy.tokenizer, row, request.end),
                    stopped_tokens(policy.tokenizer, row, request),
                )
                for row, request in zip(ids, requests, strict=True)
            ]
            uncut_B = [n == len(row) for n, row in zip(kept, ids, strict=True)]
            ids = [row[:n] for n, row in zip(kept, ids, strict=True)]
            logprobs = [
                tuple(
                    given[token].logprob
                    for token, given in zip(ids_T, answer.logprobs[: len(ids_T)], strict=True)
                )
                for ids_T, answer in zip(ids, answers, strict=True)
            ]
            cut = [n for n, request in enumerate(requests) if _is_cut(request)]
            rows = [
                _Row(
                    requests[n].prompt_ids_T,
                    tuple(ids[n]),
                    requests[n].temperature,
                    requests[n].grammar,
                )
                for n in cut
            ]
            for n, whole in zip(cut, _read_again(policy, rows), strict=True):
                logprobs[n] = whole
        texts = texts_of(policy, ids, requests)
        return [
            GenerationResult(
                completion_ids_T=tuple(ids_T),
                logprobs_T=logprobs_T,
                text=text,
                finish_reason="length" if answer.finish_reason == "length" and uncut else "stop",
            )
            for ids_T, logprobs_T, text, answer, uncut in zip(
                ids, logprobs, texts, answers, uncut_B, strict=True
            )
        ]

    def _params(self, policy: Policy, request: GenerationRequest) -> Any:
        held = {}
        if request.grammar is not None:
            from vllm.sampling_params import StructuredOutputsParams

            # vLLM's default backend, "auto", leaves what begins with "%llguidance" to llguidance.
            held["structured_outputs"] = StructuredOutputsParams(grammar=request.grammar.text)
        return self.sampling_params(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or 0,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            repetition_penalty=request.repetition_penalty,
            max_tokens=room_for(policy, request),
            seed=request.seed & MAX_SEED,
            stop=_stops(request),
            stop_token_ids=sorted(eos_ids(policy)),
            logprobs=0,  # of the sampled token alone
            detokenize=bool(request.stop or request.end),  # the text is made by ``texts_of``
            **held,
        )


def _is_cut(request: GenerationRequest) -> bool:
    """Whether a token is drawn from another distribution than the one that is learned from."""
    return request.top_p < 1 or request.top_k is not None or request.is_penalised


def _read_again(policy: Policy, rows: Sequence[_Row]) -> list[tuple[float, ...]]:
    """The log-probabilities of completions under the whole distribution."""
    was_training = policy.model.training
    policy.model.eval()
    try:
        return sampled_logprobs(policy, rows)
    finally:
        policy.model.train(was_training)


def _stops(request: GenerationRequest) -> list[str]:
    """What is to end an answer, as stop strings; in a thought they would end nothing but that.

    Nor can the end's pass over a field's header that is the same.
    """
    if request.thought is not None:
        return []
    end = request.end
    closing = [] if end is None or end.count > 1 else ["\n" + end.marker]
    return [*request.stop, *closing]
