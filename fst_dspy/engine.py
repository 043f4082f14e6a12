"""DSPy engines over a policy: lm15 requests in, lm15 responses out, generated in batches.

``LocalEngine`` serves ordinary calls: whatever calls arrive together, from threads or coroutines,
are generated together. ``BarrierBatcher`` serves rollouts: it generates when every live rollout is
blocked on a call, so that batches do not depend on how threads were scheduled.

Engines raise lm15 errors, which DSPy turns into its own and, for these kinds, does not retry.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from dspy import lm15

from fst_dspy.errors import ModelError, PromptTooLongError
from fst_dspy.generate import GenerationRequest, GenerationResult, check_prompt, generate
from fst_dspy.policy import Policy
from fst_dspy.types import Call

DEFAULT_MAX_TOKENS = 512
GATHER_SECONDS = 0.004  # how long the first of some concurrent calls waits for the others


@dataclass
class _Pending:
    """A call on its way: what to generate, with which weights, and what came of it."""

    policy: Policy
    request: lm15.Request
    version: str
    generation: GenerationRequest
    order: tuple[Any, ...] = ()
    slot: Slot | None = None
    predictor: str = ""
    result: GenerationResult | None = None
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    def finish(self, result: GenerationResult) -> None:
        if self.slot is not None:
            call = Call(
                predictor=self.predictor,
                prompt_ids_T=self.generation.prompt_ids_T,
                completion_ids_T=result.completion_ids_T,
                logprobs_T=result.logprobs_T,
                text=result.text,
                finish_reason=result.finish_reason,
                temperature=self.generation.temperature,
            )
            self.slot.calls.append(call)
        self.result = result

    def response(self) -> lm15.Response:
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return _response(self.policy, self.request, self.generation, self.result)


class LocalEngine:
    """Serves ``dspy.LM`` calls from a policy; concurrent calls are generated together.

    ``request.model`` names the weights: a version id, or ``"<name>@live"``. Without a seed in the
    request every call samples afresh.

    Attributes:
        policy: The weights and tokenizer.
        batches: Batches generated so far.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.batches = 0
        self._waiting: list[_Pending] = []
        self._turn = threading.Lock()
        self._guard = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalEngine:
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Generate one answer.

        Raises:
            lm15.ContextLengthError: The prompt leaves no room for an answer.
            lm15.UnsupportedModelError: The weights that ``request.model`` names are not at hand.
            lm15.UnsupportedFeatureError: Images, tools or another thing a local model lacks.
        """
        pending = _prepare(self.policy, request, secrets.randbits(63))
        with self._guard:
            self._waiting.append(pending)
        # Whoever gets the turn serves everybody who is waiting, so the others find theirs done.
        with self._turn:
            if not pending.done:
                time.sleep(GATHER_SECONDS)
                with self._guard:
                    batch, self._waiting = self._waiting, []
                self.batches += _run(self.policy, batch)
        return pending.response()

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Refused: a local model answers whole."""
        raise _no_streaming()

    def dump_state(self) -> dict[str, Any]:
        """Where the weights came from and their base version; no weights."""
        source = self.policy.source
        return {
            "name_or_path": source["name_or_path"],
            "dtype": source["dtype"],
            "base_version": self.policy.base_version,
        }

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> LocalEngine:
        """The engine over the model that a state names; one model serves all who name it alike.

        Raises:
            ModelError: The model cannot be loaded, or its files hold other weights by now.
        """
        key = (state["name_or_path"], state["dtype"], state["base_version"])
        with _loading:
            engine = _loaded.get(key)
            if engine is None:
                # Its folder may bear another name than the one it was saved under.
                name = state["base_version"].rsplit("@", 1)[0]
                engine = cls(Policy.load(state["name_or_path"], dtype=state["dtype"], name=name))
                if engine.policy.base_version != state["base_version"]:
                    raise ModelError(
                        f"saved with the weights {state['base_version']} of "
                        f"{state['name_or_path']!r}, whose files now hold "
                        f"{engine.policy.base_version}"
                    )
                _loaded[key] = engine
            return engine


_loaded: weakref.WeakValueDictionary[Any, LocalEngine] = weakref.WeakValueDictionary()
_loading = threading.Lock()


class AsyncLocalEngine:
    """The awaited face of an engine: each call waits in a thread, so that calls batch."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncLocalEngine:
        return self

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """As ``LocalEngine.complete``."""
        # A pool of the loop's would cap the batch at its size, so every call has its own thread.
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                pool, self.engine.complete, request
            )
        finally:
            pool.shutdown(wait=False)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Refused: a local model answers whole."""
        raise _no_streaming()

    def dump_state(self) -> dict[str, Any]:
        """As the engine's."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncLocalEngine:
        """As ``LocalEngine.load_state``."""
        return cls(LocalEngine.load_state(state))


@dataclass
class Slot:
    """One live rollout.

    Attributes:
        key: Sorts the slots of a batch; no two slots of a batcher share one.
        seed: Every call's seed is derived from it.
        calls: The finished calls, in order.
    """

    key: tuple[Any, ...]
    seed: int
    calls: list[Call] = field(default_factory=list)


class BarrierBatcher:
    """Generates when every live slot is blocked on at least one call.

    All slots are live from the start until ``leave``. The rows of a batch are sorted by slot, and
    a call's seed is derived from its slot's seed, its prompt and how often the slot has asked that
    very prompt: so neither depends on thread timing, even where one rollout makes calls at once.

    Attributes:
        batches: Batches generated so far.
    """

    def __init__(self, policy: Policy, slots: Sequence[Slot]) -> None:
        self.policy = policy
        self.batches = 0
        self._changed = threading.Condition()
        self._live = {slot.key: slot for slot in slots}
        if len(self._live) != len(slots):
            raise ValueError("two slots share a key")
        self._blocked: dict[tuple[Any, ...], list[_Pending]] = {slot.key: [] for slot in slots}
        self._asked: Counter[tuple[Any, ...]] = Counter()

    def leave(self, slot: Slot) -> None:
        """The rollout has ended or was given up; its blocked calls, if any, fail. Idempotent."""
        with self._changed:
            if self._live.pop(slot.key, None) is not None:
                for pending in self._blocked.pop(slot.key):
                    pending.error = _left()
                self._changed.notify_all()

    def engine_for(self, slot: Slot, predictor: str, *, version: str | None = None) -> SlotEngine:
        """An engine for one predictor of one rollout.

        Args:
            slot: One of the batcher's slots.
            predictor: The name recorded in ``slot.calls``.
            version: The weights to use; ``None`` takes those that the request names.
        """
        return SlotEngine(self, slot, predictor, version)

    def complete(self, engine: SlotEngine, request: lm15.Request) -> lm15.Response:
        """Block until the barrier opens; one of the blocked threads then generates for all."""
        pending = _prepare(self.policy, request, 0, engine.version)
        with self._changed:
            self._enqueue(pending, engine)
            self._changed.notify_all()
            while not pending.done:
                batch = self._take_if_all_blocked()
                if not batch:
                    self._changed.wait()
                    continue
                self._changed.release()
                try:
                    batches = _run(self.policy, batch)
                finally:
                    self._changed.acquire()
                    self._changed.notify_all()
                self.batches += batches
        return pending.response()

    def _enqueue(self, pending: _Pending, engine: SlotEngine) -> None:
        slot, generation = engine.slot, pending.generation
        if slot.key not in self._live:
            raise _left()
        asked = (slot.key, generation.prompt_ids_T)
        pending.order = (slot.key, generation.prompt_ids_T, self._asked[asked])
        # A seed in the request is mixed in only: taken as it is, it would make a group's rollouts
        # copies of each other.
        parts = (slot.seed, pending.request.config.seed, *pending.order[1:])
        digest = hashlib.sha256(repr(parts).encode()).digest()
        pending.generation = replace(generation, seed=int.from_bytes(digest[:8], "big"))
        pending.slot, pending.predictor = slot, engine.predictor
        self._asked[asked] += 1
        self._blocked[slot.key].append(pending)

    def _take_if_all_blocked(self) -> list[_Pending]:
        if not self._live or not all(self._blocked.values()):
            return []
        batch = [pending for calls in self._blocked.values() for pending in calls]
        self._blocked = {key: [] for key in self._live}
        return sorted(batch, key=lambda pending: pending.order)


class SlotEngine:
    """The engine of one predictor in one rollout; made by ``BarrierBatcher.engine_for``."""

    def __init__(
        self, batcher: BarrierBatcher, slot: Slot, predictor: str, version: str | None
    ) -> None:
        self.batcher, self.slot = batcher, slot
        self.predictor, self.version = predictor, version
        self.async_engine = AsyncLocalEngine(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotEngine:
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        """As ``LocalEngine.complete``, once every live slot is blocked."""
        return self.batcher.complete(self, request)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Refused: a local model answers whole."""
        raise _no_streaming()


def prompt_ids(policy: Policy, request: lm15.Request) -> tuple[int, ...]:
    """The token ids of a request's messages under the model's chat template.

    Raises:
        lm15.UnsupportedFeatureError: Tools, or parts of messages other than text.
        lm15.InvalidRequestError: The chat template refuses the messages.
    """
    if request.tools:
        raise lm15.UnsupportedFeatureError("a local model takes no tools", feature="tools")
    messages = [
        {"role": _ROLES.get(m.role, m.role), "content": _text_of(m.parts)} for m in request.messages
    ]
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _text_of(request.system)
        messages.insert(0, {"role": "system", "content": system})
    try:
        ids = policy.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:
        raise lm15.InvalidRequestError(
            f"the chat template of {policy.name} refuses these messages: {error}"
        ) from error
    return tuple(ids)


_ROLES = {"developer": "system"}


def _text_of(parts: Sequence[Any]) -> str:
    kinds = {part.type for part in parts} - {"text"}
    if kinds:
        raise lm15.UnsupportedFeatureError(
            f"a local model reads text only, not {', '.join(sorted(kinds))}", feature="messages"
        )
    return "".join(part.text for part in parts)


def _prepare(
    policy: Policy, request: lm15.Request, seed: int, version: str | None = None
) -> _Pending:
    """Turn a request into what ``generate`` takes, or raise what is wrong with it."""
    config = request.config
    _refuse_unknown(config)
    ids = prompt_ids(policy, request)
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
    return _Pending(policy, request, version, generation)


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


def _run(policy: Policy, batch: Sequence[_Pending]) -> int:
    """Generate for a batch, one set of weights after the other; errors go to their own calls.

    Returns the number of ``generate`` calls.
    """
    versions = dict.fromkeys(pending.version for pending in batch)
    for version in versions:
        group = [pending for pending in batch if pending.version == version]
        try:
            with policy.at(version):
                results = generate(policy, [pending.generation for pending in group])
            for pending, result in zip(group, results, strict=True):
                pending.finish(result)
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
        provider_data={
            "prompt_ids": list(generation.prompt_ids_T),
            "completion_ids": list(result.completion_ids_T),
            "logprobs": list(result.logprobs_T),
        },
    )


def _left() -> lm15.LM15Error:
    return lm15.InvalidRequestError("this rollout has ended; it cannot call the model any more")


def _no_streaming() -> lm15.LM15Error:
    return lm15.UnsupportedFeatureError(
        "a local model does not stream: it answers whole; call the program without dspy.streamify",
        feature="stream",
    )
