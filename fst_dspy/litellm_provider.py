"""Trained models for everything built on litellm: ``model="fst/<bundle>"``.

Example::

    import litellm, fst_dspy.litellm_provider

    fst_dspy.litellm_provider.register()
    litellm.completion(model="fst/runs/triage-bundle", messages=[...], temperature=0)

The bundle's weights answer; the program's prompts are not added to the messages.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import litellm
from dspy import lm15
from litellm.types.utils import Choices, GenericStreamingChunk, Message, ModelResponse, Usage

from fst_dspy.bundle.files import MANIFEST
from fst_dspy.bundle.manifest import Manifest, read_manifest
from fst_dspy.bundle.weights import read_weights
from fst_dspy.errors import FSTError
from fst_dspy.files import path_given
from fst_dspy.lm.engine import AsyncLocalEngine, LocalEngine

PROVIDER = "fst"

_SAMPLING = {"temperature", "top_p", "max_tokens", "stop", "seed"}
_OTHER = {"n", "base", "max_retries", "stream", "stream_options"}
_ROLES = {"system": "developer"}  # lm15's name for it; the engine gives it back to the template


class FSTProvider(litellm.CustomLLM):
    """Serves bundles to litellm. A bundle is loaded at its first call, and again when replaced.

    Takes ``temperature`` (default 1), ``top_p``, ``max_tokens`` (default 512), ``stop``, ``seed``,
    ``n``, and ``base``, the folder of the base model of a bundle that needs one. Everything else is
    refused, not dropped. Where all of the bundle's program was asked under the same
    ``chat_template_kwargs``, so are the messages. Streams come as one chunk, for the model answers
    whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self._engines: dict[tuple[str, str | None], tuple[Any, LocalEngine, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def completion(self, model: str, messages: list, *args: Any, **kwargs: Any) -> ModelResponse:
        """Answer; concurrent calls are generated together.

        Raises:
            litellm.NotFoundError: The bundle cannot be loaded; the message says why.
            litellm.ContextWindowExceededError: The messages leave no room for an answer.
            litellm.BadRequestError: A message or a setting that a local model cannot take.
        """
        try:
            engine, requests = self._prepare(model, messages, kwargs["optional_params"])
            if len(requests) == 1:
                responses = [engine.complete(requests[0])]
            else:
                with ThreadPoolExecutor(len(requests)) as pool:
                    responses = list(pool.map(engine.complete, requests))
        except (FSTError, lm15.LM15Error, ValueError, TypeError) as error:
            raise _for_litellm(error, model) from error
        return _fill(kwargs["model_response"], model, responses)

    async def acompletion(
        self, model: str, messages: list, *args: Any, **kwargs: Any
    ) -> ModelResponse:
        """As ``completion``."""
        try:
            engine, requests = await asyncio.to_thread(
                self._prepare, model, messages, kwargs["optional_params"]
            )
            waiting = AsyncLocalEngine(engine)
            responses = await asyncio.gather(*(waiting.complete(r) for r in requests))
        except (FSTError, lm15.LM15Error, ValueError, TypeError) as error:
            raise _for_litellm(error, model) from error
        return _fill(kwargs["model_response"], model, responses)

    def streaming(
        self, model: str, messages: list, *args: Any, **kwargs: Any
    ) -> Iterator[GenericStreamingChunk]:
        """The whole answer as one chunk."""
        yield _chunk(self.completion(model, messages, *args, **kwargs))

    async def astreaming(
        self, model: str, messages: list, *args: Any, **kwargs: Any
    ) -> AsyncIterator[GenericStreamingChunk]:
        """The whole answer as one chunk."""
        yield _chunk(await self.acompletion(model, messages, *args, **kwargs))

    def _prepare(
        self, model: str, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any]
    ) -> tuple[LocalEngine, list[lm15.Request]]:
        unknown = {k for k in set(params) - _SAMPLING - _OTHER if params[k] is not None}
        if unknown:
            raise ValueError(
                f"a local model takes {', '.join(sorted(_SAMPLING))}, n and base, not "
                f"{', '.join(sorted(unknown))}"
            )
        count = 1 if params.get("n") is None else params["n"]
        if type(count) is not int or count < 1:
            raise ValueError(
                f"n, the number of answers, must be a whole number above 0, not {count!r}"
            )
        if params.get("stream") and count > 1:
            raise ValueError("a stream holds one answer; leave out n")
        engine, own = self._engine(model, params.get("base"))
        lm15_messages = tuple(map(_message, messages))
        sampling = {k: v for k in _SAMPLING if (v := params.get(k)) is not None}
        stop = sampling.pop("stop", ())
        sampling["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        seed = sampling.pop("seed", None)
        return engine, [
            lm15.Request(
                model=engine.policy.version(),
                messages=lm15_messages,
                # With one seed for all, n answers would be n copies of one.
                config=lm15.Config(
                    **sampling, seed=None if seed is None else seed + index, extensions=own
                ),
            )
            for index in range(count)
        ]

    def _engine(self, model: str, base: str | None) -> tuple[LocalEngine, dict[str, Any]]:
        """A bundle's engine, and the settings of its own that no call says."""
        folder = path_given(model)
        with self._lock:
            stamp = _stamp(folder / MANIFEST)
            known = self._engines.get((str(folder), base))
            if known is not None and known[0] == stamp:
                return known[1:]
            manifest = read_manifest(folder)
            engine, own = LocalEngine(read_weights(folder, manifest, base)), _own(manifest)
            self._engines[str(folder), base] = (stamp, engine, own)
            return engine, own


def register() -> None:
    """Make ``fst/<bundle>`` known to litellm; calling it again changes nothing."""
    if not any(item["provider"] == PROVIDER for item in litellm.custom_provider_map):
        litellm.custom_provider_map.append({"provider": PROVIDER, "custom_handler": FSTProvider()})
    litellm.utils.custom_llm_setup()


def _own(manifest: Manifest) -> dict[str, Any]:
    """The variables of the chat template, such as whether to think, that the weights go with."""
    name, settings = "chat_template_kwargs", [one.lm for one in manifest.predictors.values()]
    said = [own.get(name) for own in settings if own is not None]
    return {name: said[0]} if said and said[0] and all(one == said[0] for one in said) else {}


def _stamp(path: Path) -> Any:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _message(message: Mapping[str, Any]) -> lm15.Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a mapping with a role and content, not {message!r}")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant") or message.get("tool_calls"):
        raise ValueError(f"a local model takes no tools, and so no message of the role {role!r}")
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    text = "".join(map(_text_of, pieces))
    return lm15.Message(role=_ROLES.get(role, role), parts=(lm15.TextPart(text),))


def _text_of(piece: Any) -> str:
    if not isinstance(piece, Mapping) or piece.get("type") != "text":
        kind = piece.get("type") if isinstance(piece, Mapping) else piece
        raise ValueError(f"a local model reads text only, not {kind!r}")
    if not isinstance(piece.get("text"), str):
        raise ValueError(f'a part of the type "text" needs a "text", got {dict(piece)!r}')
    return piece["text"]


def _fill(response: ModelResponse, model: str, answers: Sequence[lm15.Response]) -> ModelResponse:
    response.model = f"{PROVIDER}/{model}"
    response.choices = [
        Choices(
            index=index,
            finish_reason=answer.finish_reason,
            message=Message(
                role="assistant", content=answer.text or "", reasoning_content=_thought(answer)
            ),
        )
        for index, answer in enumerate(answers)
    ]
    prompt = answers[0].usage.input_tokens
    completion = sum(answer.usage.output_tokens for answer in answers)
    usage = Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
    response.usage = usage
    return response


def _thought(answer: lm15.Response) -> str | None:
    thoughts = [part.text for part in answer.message.parts if part.type == "thinking"]
    return "".join(thoughts) or None


def _chunk(response: ModelResponse) -> GenericStreamingChunk:
    choice, usage = response.choices[0], response.usage
    return GenericStreamingChunk(
        text=choice.message.content or "",
        is_finished=True,
        finish_reason=choice.finish_reason or "stop",
        index=0,
        tool_use=None,
        usage={
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
    )


def _for_litellm(error: Exception, model: str) -> Exception:
    if isinstance(error, lm15.ContextLengthError):
        return litellm.ContextWindowExceededError(str(error), model, PROVIDER)
    if isinstance(error, FSTError):
        return litellm.NotFoundError(str(error), model, PROVIDER)
    return litellm.BadRequestError(str(error), model, PROVIDER)
