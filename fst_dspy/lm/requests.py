"""DSPy's calls on their way through a local model: lm15 requests in, lm15 responses out.

Raises lm15 errors, which DSPy turns into its own and, for these kinds, does not retry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dspy
from dspy import lm15
from dspy.signatures.signature import ensure_signature

from fst_dspy.errors import ConfigError, ModelError, PromptTooLongError
from fst_dspy.lm.answers import (
    Answer,
    fills_context,
    opens_thought,
    read_answer,
    tool_call_parts,
)
from fst_dspy.lm.asked import calling_predictor, grammar_of_format, held_to
from fst_dspy.lm.templates import (
    EFFORT,
    Prompt,
    call_of,
    chat_format,
    check_options,
    cut_thought_advice,
    thinks,
    tokens_of,
)
from fst_dspy.model.endings import End
from fst_dspy.model.generate import GenerationRequest, GenerationResult, check_prompt, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.sampling import vocabulary
from fst_dspy.student.adapter import end_lines, end_marker
from fst_dspy.types import Grammar

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 512

EXTRA = "fst_dspy"
"""Where a request's ``metadata`` holds what has no field of its own; see ``LocalLM``."""
ROLLOUT = "fst_rollout"
"""The DSPy setting that holds the rollout that is running."""
OWN = ("chat_template_kwargs", "repetition_penalty", "structured")
"""Settings of a ``LocalLM`` that no field of a request is for."""

PENALTIES = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0}
"""Settings that sample from another distribution than the policy's, and what leaves them out."""


def penalty_in(settings: Mapping[str, Any]) -> str | None:
    """The first penalty that some settings of a language model have."""
    return next(
        (n for n, none in PENALTIES.items() if settings.get(n, none) not in (none, None)), None
    )


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
        response = _response(self, self.answer())
        return replace(response, provider_data=self._data()) if ids else response

    def answer(self) -> Answer:
        """What was said, taken apart; once done, and where nothing went wrong."""
        assert self.result is not None
        return read_answer(
            self.policy,
            self.generation.prompt_ids_T,
            self.result.completion_ids_T,
            self.result.text,
            stop=self.generation.stop,
            end=self.generation.end,
            tools=_tools(self.request),
        )

    def seed_from(self, *parts: Any) -> None:
        """Sample with a seed that is drawn from all of these."""
        digest = hashlib.sha256(repr(parts).encode()).digest()
        seed = int.from_bytes(digest[:8], "big")
        self.generation = replace(self.generation, seed=seed)

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
        lm15.UnsupportedFeatureError: What the template cannot say, or parts other than text.
        lm15.InvalidRequestError: The chat template refuses the messages.
    """
    return encode(policy, prompt_of(policy, request))


def encode(policy: Policy, prompt: Prompt) -> tuple[int, ...]:
    """The token ids of a conversation under the model's chat template; errors as ``prompt_ids``."""
    try:
        return tuple(tokens_of(policy.tokenizer, prompt))
    except Exception as error:
        raise lm15.InvalidRequestError(
            f"the chat template of {policy.name} refuses these messages: {error}"
        ) from error


def prompt_of(policy: Policy, request: lm15.Request) -> Prompt:
    """A request's conversation as chat templates take it; errors as ``prompt_ids``."""
    found = chat_format(policy.tokenizer)
    tools = _tools(request)
    messages = [message for m in request.messages for message in _messages_of(m, found.tools)]
    if tools and not found.tools:
        raise lm15.UnsupportedFeatureError(
            f"{policy.name} has no tools: its chat template does not show them, or how it calls "
            "them is not known; leave use_native_function_calling=False on the adapter, which "
            "then puts the tools into the prompt",
            feature="tools",
        )
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _text_of(request.system)
        messages.insert(0, {"role": "system", "content": system})
    return Prompt.of(messages, tools, _options(policy, request))


_ROLES = {"developer": "system", "tool": "user"}


def _messages_of(message: lm15.Message, tools: bool) -> Iterator[dict[str, Any]]:
    """A message as chat templates take it; calls of tools as text where a template has none."""
    if tools and message.role == "tool":
        for part in message.parts:
            text = _text_of(part.content)
            yield {"role": "tool", "tool_call_id": part.id, "content": text} | (
                {"name": part.name} if part.name else {}
            )
        return
    called = [part for part in message.parts if part.type == "tool_call"] if tools else []
    calls = [call_of(part.id, part.name, dict(part.input)) for part in called]
    thoughts = [part.text for part in message.parts if part.type == "thinking"]
    said = [part for part in message.parts if part.type != "thinking" and part not in called]
    rendered: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": _text_of(said),
    }
    if calls:
        rendered["tool_calls"] = calls
    if thoughts:
        rendered["reasoning_content"] = "".join(thoughts)
    yield rendered


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


def _tools(request: lm15.Request) -> list[dict[str, Any]]:
    """The tools that the model is shown, in OpenAI's form."""
    choice = request.config.tool_choice
    if choice is not None and choice.mode == "required":
        raise lm15.UnsupportedFeatureError(
            "a local model calls tools where it likes to: leave tool_choice at 'auto'",
            feature="config.tool_choice",
        )
    if choice is not None and choice.mode == "none":
        return []
    builtin = [tool.name for tool in request.tools if tool.type != "function"]
    if builtin:
        raise lm15.UnsupportedFeatureError(
            f"a local model has no {', '.join(builtin)} built in; give it functions",
            feature="tools",
        )
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description or "",
                "parameters": tool.parameters,
            },
        }
        for tool in request.tools
        if choice is None or not choice.allowed or tool.name in choice.allowed
    ]


def _extra(config: lm15.Config) -> dict[str, Any]:
    given = dict(config.extensions or {})
    metadata = given.pop("metadata", None) or {}
    return {**given, **(metadata.get(EXTRA) or {})}


def _options(policy: Policy, request: lm15.Request) -> dict[str, Any]:
    """The variables of the chat template: those asked for, and the effort of reasoning."""
    found, effort = chat_format(policy.tokenizer), request.config.reasoning
    try:
        options = check_options(policy, _extra(request.config).get("chat_template_kwargs") or {})
    except ConfigError as error:
        raise lm15.InvalidRequestError(str(error)) from error
    if effort is None:
        return options
    wanted = effort.effort != "off"
    if found.switch is not None:
        options.setdefault(found.switch, wanted)
    if wanted and found.takes_effort:
        options.setdefault(EFFORT, effort.effort)
    if thinks(policy.tokenizer, options) != wanted:
        raise lm15.UnsupportedFeatureError(
            f"reasoning_effort={effort.effort!r} is asked for, but {policy.name} "
            + (
                "cannot be kept from thinking"
                if not wanted
                else "does not think, or chat_template_kwargs says that it must not; where that is "
                "so for all calls, say it on the LocalLM, and dspy.Reasoning is asked for as text"
            ),
            feature="config.reasoning",
        )
    return options


def prepare(
    policy: Policy,
    request: lm15.Request,
    seed: int,
    version: str | None = None,
    encode: Callable[[Policy, Prompt], tuple[int, ...]] = encode,
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
        lm15.UnsupportedFeatureError: Images, or another thing that the model lacks.
        lm15.InvalidRequestError: The chat template refuses the messages, or llguidance a grammar.
    """
    config = request.config
    _refuse_unknown(config)
    prompt = prompt_of(policy, request)
    ids = encode(policy, prompt)
    grammar = _grammar(policy, request, prompt, ids)
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
    thought = chat_format(policy.tokenizer).thought
    opened = thought is not None and opens_thought(policy, ids)
    generation = GenerationRequest(
        prompt_ids_T=ids,
        max_tokens=config.max_tokens or DEFAULT_MAX_TOKENS,
        # numpy's are floats as well, and of another precision where tensors are made of them.
        temperature=1.0 if config.temperature is None else float(config.temperature),
        top_p=1.0 if config.top_p is None else float(config.top_p),
        stop=config.stop,
        seed=seed if config.seed is None else config.seed,
        top_k=config.top_k,
        frequency_penalty=float(config.frequency_penalty or 0.0),
        presence_penalty=float(config.presence_penalty or 0.0),
        repetition_penalty=float(_extra(config).get("repetition_penalty") or 1.0),
        end=_end(thought, opened) if grammar is None else None,
        grammar=grammar,
        thought=thought,
        opened=opened,
    )
    return Pending(policy, request, version, generation)


def _grammar(
    policy: Policy, request: lm15.Request, prompt: Prompt, ids: tuple[int, ...]
) -> Grammar | None:
    """What the answer is held to: what the request says, or what its predictor reads.

    Calls of tools are written in the model's own way, which no grammar of ours knows.
    """
    try:
        text = grammar_of_format(request.config.response_format)
    except ValueError as error:
        raise lm15.InvalidRequestError(str(error)) from error
    if text is None and not _tools(request):
        text = _extra(request.config).get("grammar")
    grammar = held_to(policy, text, ids, json.loads(prompt.options))
    if grammar is not None and policy.generator is None:
        try:  # here, where it is this call's own error, and no other's of its batch
            vocabulary(policy).compiled(grammar.text)
        except ModelError as error:
            raise lm15.InvalidRequestError(str(error)) from error
    return grammar


def _end(thought: tuple[str, str] | None, opened: bool) -> End | None:
    """The line that closes an answer of the adapter in use, if its answers have one."""
    marker, predictor = end_marker(dspy.settings.adapter), calling_predictor()
    count = 1
    if marker is not None and predictor is not None:
        count = end_lines(dspy.settings.adapter, ensure_signature(predictor.signature))
    if marker is None or count == 0:
        return None
    return End(marker, thought, opened, count)


def _refuse_unknown(config: lm15.Config) -> None:
    """Refuse settings that would change the answer elsewhere, rather than drop them."""
    wanted = [name for name in _UNKNOWN if getattr(config, name) is not None]
    wanted += sorted(set(config.extensions or {}) - {"metadata", *OWN})
    more = sorted(set((config.extensions or {}).get("metadata") or {}) - {EXTRA})
    wanted += [f"metadata[{name!r}]" for name in more]
    if config.logprobs:
        wanted.append("logprobs of other tokens than the sampled ones")
    if wanted:
        raise lm15.UnsupportedFeatureError(
            f"a local model has no {', '.join(wanted)}; it takes temperature, top_p, top_k, "
            "max_tokens, stop, seed, logprobs, frequency_penalty, presence_penalty, "
            "repetition_penalty, reasoning_effort, response_format and chat_template_kwargs",
            feature=f"config.{wanted[0]}",
        )
    checked_penalty(_extra(config).get("repetition_penalty"))


def checked_penalty(penalty: Any) -> None:
    """Check a ``repetition_penalty``, which lm15 does not know.

    Raises:
        lm15.InvalidRequestError: It is none.
    """
    if penalty is None:
        return
    number = isinstance(penalty, int | float) and not isinstance(penalty, bool)
    if not (number and 0 < penalty < math.inf):
        raise lm15.InvalidRequestError(
            f"repetition_penalty must be a finite number above 0, got {penalty!r}"
        )


_UNKNOWN = ("probabilities",)


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


def _response(pending: Pending, answer: Answer) -> lm15.Response:
    policy, request, result = pending.policy, pending.request, pending.result
    assert result is not None
    prompt_ids_T = pending.generation.prompt_ids_T
    calls = answer.calls
    choice = request.config.tool_choice
    if choice is not None and choice.parallel is False:
        calls = calls[:1]
    parts: list[Any] = [] if answer.thought is None else [lm15.ThinkingPart(answer.thought)]
    parts += [lm15.TextPart(answer.text)] if answer.text or not calls else []
    parts += tool_call_parts(prompt_ids_T, calls)
    why = None
    if fills_context(policy, prompt_ids_T, result.completion_ids_T):
        why = f"at the end of the context window of {policy.context_length}; shorten the prompt"
    elif answer.in_thought:
        why = cut_thought_advice(policy.tokenizer)
    cut_off = result.finish_reason == "length" and why is not None
    if cut_off and dspy.settings.get(ROLLOUT) is None:  # in a rollout it is data, and counted
        logger.warning(
            "the answer was cut off after %d tokens, %s", len(result.completion_ids_T), why
        )
    scored = zip(result.completion_ids_T, result.logprobs_T, strict=True)
    return lm15.Response(
        id=None,
        model=request.model,
        message=lm15.Message(role="assistant", parts=tuple(parts)),
        finish_reason="tool_call" if calls else result.finish_reason,
        usage=lm15.Usage(
            input_tokens=len(prompt_ids_T), output_tokens=len(result.completion_ids_T)
        ),
        logprobs=None
        if request.config.logprobs is None
        else tuple(
            lm15.TokenLogprob(policy.tokenizer.decode([token]), logprob, token_id=token)
            for token, logprob in scored
        ),
    )
