"""DSPy's calls on their way through a local model: lm15 requests in, lm15 responses out.

Raises lm15 errors, which DSPy turns into its own and, for these kinds, does not retry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dspy import lm15

from fst_dspy.errors import PromptTooLongError
from fst_dspy.model.generate import GenerationRequest, GenerationResult, check_prompt, generate
from fst_dspy.model.policy import Policy

DEFAULT_MAX_TOKENS = 512

Messages = tuple[tuple[str, str], ...]
"""A prompt before tokenization: (role, text) of each message."""


@dataclass
class Pending:
    """A call on its way: what to generate, with which weights, and what came of it."""

    policy: Policy
    request: lm15.Request
    version: str
    generation: GenerationRequest
    result: GenerationResult | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    def response(self, *, ids: bool) -> lm15.Response:
        """The answer, once done; raises what went wrong with the call.

        Args:
            ids: Give token ids and log-probabilities along, as ``provider_data``.
        """
        if self.error is not None:
            raise self.error
        assert self.result is not None
        response = _response(self.policy, self.request, self.generation, self.result)
        return replace(response, provider_data=self._data()) if ids else response

    def _data(self) -> dict[str, Any]:
        assert self.result is not None
        return {
            "prompt_ids": list(self.generation.prompt_ids_T),
            "completion_ids": list(self.result.completion_ids_T),
            "logprobs": list(self.result.logprobs_T),
        }


def prompt_ids(policy: Policy, request: lm15.Request) -> tuple[int, ...]:
    """The token ids of a request's messages under the model's chat template.

    Raises:
        lm15.UnsupportedFeatureError: Tools, or parts of messages other than text.
        lm15.InvalidRequestError: The chat template refuses the messages.
    """
    return encode(policy, _messages(request))


def encode(policy: Policy, messages: Messages) -> tuple[int, ...]:
    """The token ids of messages under the model's chat template; errors as ``prompt_ids``."""
    try:
        ids = policy.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except Exception as error:
        raise lm15.InvalidRequestError(
            f"the chat template of {policy.name} refuses these messages: {error}"
        ) from error
    return tuple(ids)


def _messages(request: lm15.Request) -> Messages:
    if request.tools:
        raise lm15.UnsupportedFeatureError("a local model takes no tools", feature="tools")
    messages = [(_ROLES.get(m.role, m.role), _text_of(m.parts)) for m in request.messages]
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _text_of(request.system)
        messages.insert(0, ("system", system))
    return tuple(messages)


_ROLES = {"developer": "system", "tool": "user"}


def _text_of(parts: Sequence[Any]) -> str:
    kinds = {part.type for part in parts} - _READ.keys()
    if kinds:
        raise lm15.UnsupportedFeatureError(
            f"a local model reads text only, not {', '.join(sorted(kinds))}", feature="messages"
        )
    apart = "\n" if any(part.type != "text" for part in parts) else ""
    return apart.join(_READ[part.type](part) for part in parts)


# JSONAdapter writes the calls of tools that a conversation has had as parts of their own, also for
# models that it asks to write theirs as text.
_READ: dict[str, Callable[[Any], str]] = {
    "text": lambda part: part.text,
    "tool_call": lambda part: json.dumps({"name": part.name, "args": dict(part.input)}),
    "tool_result": lambda part: f"{part.name or part.id}: {_text_of(part.content)}",
}


def prepare(
    policy: Policy,
    request: lm15.Request,
    seed: int,
    version: str | None = None,
    encode: Callable[[Policy, Messages], tuple[int, ...]] = encode,
) -> Pending:
    """Turn a request into what ``generate`` takes.

    Args:
        policy: Who answers.
        request: The call.
        seed: Of the sampling, where the request names none.
        version: The weights to use; ``None`` takes those that the request names.
        encode: ``encode``, or what remembers its results.

    Raises:
        lm15.ContextLengthError: The prompt leaves no room for an answer.
        lm15.UnsupportedModelError: The weights are not at hand.
        lm15.UnsupportedFeatureError: Images, tools or another thing a local model lacks.
        lm15.InvalidRequestError: The chat template refuses the messages.
    """
    config = request.config
    _refuse_unknown(config)
    ids = encode(policy, _messages(request))
    try:
        check_prompt(policy, ids)
    except PromptTooLongError as error:
        raise lm15.ContextLengthError(str(error)) from error
    version = version or request.model
    if not policy.has(version):
        raise lm15.UnsupportedModelError(
            f"the weights {version} are not at hand; the model serves {policy.base_version}, the "
            f"live {policy.version()} and what policy.keep() has kept"
        )
    generation = GenerationRequest(
        prompt_ids_T=ids,
        max_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p,
        stop=config.stop,
        seed=seed if config.seed is None else config.seed,
    )
    return Pending(policy, request, version, generation)


def _refuse_unknown(config: lm15.Config) -> None:
    """Refuse settings that would change the answer elsewhere, rather than drop them."""
    wanted = [name for name in _UNKNOWN if getattr(config, name) is not None]
    wanted += sorted(config.extensions or {})
    if config.logprobs:
        wanted.append("logprobs of other tokens than the sampled ones")
    if wanted:
        raise lm15.UnsupportedFeatureError(
            f"a local model has no {', '.join(wanted)}; it takes temperature, top_p, max_tokens, "
            "stop, seed and logprobs",
            feature=f"config.{wanted[0]}",
        )


_UNKNOWN = (
    "top_k",
    "response_format",
    "tool_choice",
    "reasoning",
    "frequency_penalty",
    "presence_penalty",
    "probabilities",
)


def run_batch(policy: Policy, batch: Sequence[Pending]) -> int:
    """Generate for a batch, one set of weights after the other; errors go to their own calls.

    Returns the number of ``generate`` calls.
    """
    versions = dict.fromkeys(pending.version for pending in batch)
    for version in versions:
        group = [pending for pending in batch if pending.version == version]
        try:
            with policy.at(version):
                engine = policy.generator or generate
                results = engine(policy, [pending.generation for pending in group])
            for pending, result in zip(group, results, strict=True):
                pending.result = result
        except BaseException as error:
            for pending in batch if not isinstance(error, Exception) else group:
                pending.error = error
            if not isinstance(error, Exception):
                raise
    return len(versions)


def _response(
    policy: Policy,
    request: lm15.Request,
    generation: GenerationRequest,
    result: GenerationResult,
) -> lm15.Response:
    scored = zip(result.completion_ids_T, result.logprobs_T, strict=True)
    return lm15.Response(
        id=None,
        model=request.model,
        message=lm15.Message(role="assistant", parts=(lm15.TextPart(result.text),)),
        finish_reason=result.finish_reason,
        usage=lm15.Usage(
            input_tokens=len(generation.prompt_ids_T), output_tokens=len(result.completion_ids_T)
        ),
        logprobs=None
        if request.config.logprobs is None
        else tuple(
            lm15.TokenLogprob(policy.tokenizer.decode([token]), logprob, token_id=token)
            for token, logprob in scored
        ),
    )


def no_streaming() -> lm15.LM15Error:
    """What asking a local model for a stream raises."""
    return lm15.UnsupportedFeatureError(
        "a local model does not stream: it answers whole; call the program without dspy.streamify",
        feature="stream",
    )
