"""The DSPy engine of ``LocalLM``: whatever calls arrive together, from threads or coroutines, are
generated together.

Within a rollout a call goes to the rollout instead, whichever language model object makes it: to
``fst_dspy.rollouts.scheduler``, whose batches do not depend on timing. Which rollout that is stands
in DSPy's settings, which DSPy hands on to the threads and tasks that it starts.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import re
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import methodcaller
from typing import Any, Protocol

import dspy
from dspy import lm15

from fst_dspy.errors import ModelError
from fst_dspy.lm.requests import ROLLOUT, Pending, prepare, run_batch
from fst_dspy.lm.templates import chat_format, thinks
from fst_dspy.model.policy import Policy

SETTINGS = (
    *("temperature", "top_p", "top_k", "max_tokens", "stop", "seed", "logprobs", "n"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "chat_template_kwargs"),
)
"""What every local model takes; some take more."""
GATHER_SECONDS = 0.004  # how long the first of some concurrent calls waits for the others


class Server(Protocol):
    """A rollout, as an engine sees it: it answers the calls that are made in it."""

    @property
    def policy(self) -> Policy:
        """The policy whose calls it answers."""
        ...

    def history(self, lm: Any) -> list[Any]:
        """What it has asked a language model, as DSPy keeps it."""
        ...

    def complete(self, request: lm15.Request) -> lm15.Response:
        """As ``LocalEngine.complete``, whatever weights the request names."""
        ...


def serving(policy: Policy) -> Server | None:
    """The rollout of a policy that the caller is in, if it is in one."""
    rollout = dspy.settings.get(ROLLOUT)
    return rollout if rollout is not None and rollout.policy is policy else None


@dataclass
class _Call:
    """A call of an LM, which asks ``n`` times; the cache tells it from others by ``rollout_id``.

    DSPy asks for one answer after the other. They are generated together, with the first.

    Attributes:
        ahead: Those that have not been asked for yet.
    """

    rollout_id: Any
    n: int
    asked: int = 0
    ahead: list[Pending] = field(default_factory=list)

    def answers(self, request: lm15.Request, make: Callable[[], Pending]) -> list[Pending]:
        """What is to be generated for a request; the first of it is its answer."""
        if self.ahead and self.ahead[0].request is request:
            return [self.ahead.pop(0)]
        made = [self._apart(make()) for _ in range(1 if self.asked else self.n)]
        self.ahead = made[1:]
        return made

    def _apart(self, pending: Pending) -> Pending:
        """Mix into a request's seed which of a call's answers it is for, and the ``rollout_id``.

        As it is, the seed would make all ``n`` of them copies, and what ``dspy.BestOfN`` tries.
        """
        number, self.asked = self.asked, self.asked + 1
        seed = pending.request.config.seed
        if seed is not None and (number or self.rollout_id is not None):
            pending.seed_from(seed, self.rollout_id, number)
        return pending


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("fst_call", default=None)


@contextmanager
def one_call(rollout_id: Any, n: int) -> Iterator[None]:
    """What is asked within belongs to one call of an LM, of ``n`` answers."""
    token = _CALL.set(_Call(rollout_id, n))
    try:
        yield
    finally:
        _CALL.reset(token)


def streamed(response: lm15.Response) -> Iterator[Any]:
    """A response as the events of a stream, its text in pieces of about a token's size.

    DSPy's listeners look for the marks of fields from piece to piece. Log-probabilities come with
    the first.
    """
    for event in lm15.response_to_events(response):
        delta = event.delta if event.type == "delta" else None
        if delta is None or delta.type != "text":
            yield event
            continue
        for number, piece in enumerate(_PIECES.findall(delta.text) or [delta.text]):
            own = {} if number == 0 else {"logprobs": ()}
            yield replace(event, delta=replace(delta, text=piece, **own))


_PIECES = re.compile(r"\s*\w+|\s*[^\w\s]+|\s+")


class LocalEngine:
    """Serves ``dspy.LM`` calls from a policy; concurrent calls are generated together.

    ``request.model`` names the weights: a version id, or ``"<name>@live"``. Without a seed in the
    request every call samples afresh.

    Attributes:
        policy: The weights and tokenizer.
        batches: Batches generated so far.
    """

    # DSPy writes this name into saved programs, so it must not tell where the code lies.
    __module__ = "fst_dspy"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.batches = 0
        self._waiting: list[Pending] = []
        self._turn = threading.Lock()
        self._guard = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle names the model, as a saved program does: it holds no weights. The method by its
        # name, for cloudpickle would take the function along, and its globals with it.
        return methodcaller("load_state", self.dump_state()), (type(self),)

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Generate one answer.

        Raises:
            lm15.ContextLengthError: The prompt leaves no room for an answer.
            lm15.UnsupportedModelError: The weights that ``request.model`` names are not at hand.
            lm15.UnsupportedFeatureError: Images, or another thing that the model lacks.
        """
        if (rollout := serving(self.policy)) is not None:
            return rollout.complete(request)
        call = _CALL.get() or _Call(None, 1)
        answers = call.answers(request, lambda: prepare(self.policy, request, secrets.randbits(63)))
        pending = answers[0]
        if not pending.done:
            with self._guard:
                self._waiting += answers
            # Whoever gets the turn serves all who are waiting, so the others find theirs done.
            with self._turn:
                if not pending.done:
                    time.sleep(GATHER_SECONDS)
                    with self._guard:
                        batch, self._waiting = self._waiting, []
                    self.batches += run_batch(self.policy, batch)
        return pending.response(ids=True)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """The finished answer as a stream, token by token; errors as ``complete``."""
        return streamed(self.complete(request))

    @property
    def supports_function_calling(self) -> bool:
        """Whether the chat template shows tools, and the model's calls of them can be read."""
        return chat_format(self.policy.tokenizer).tools

    @property
    def supports_reasoning(self) -> bool:
        """Whether the model thinks before it answers, where nothing is said about that."""
        return thinks(self.policy.tokenizer, {})

    @property
    def supports_response_schema(self) -> bool:
        """Whether an answer can be held to a JSON schema."""
        return False

    @property
    def supported_params(self) -> frozenset[str]:
        """What ``dspy.LM`` takes as settings, by OpenAI's names."""
        params = {*SETTINGS}
        if self.supports_function_calling:
            params |= {"tools", "tool_choice", "parallel_tool_calls"}
        if self.supports_reasoning:
            params |= {"reasoning_effort"}
        return frozenset(params)

    def dump_state(self) -> dict[str, Any]:
        """Where the weights came from and their base version; no weights."""
        source = self.policy.source
        names = ("name_or_path", "dtype", "quantization_config")
        kept = {name: source[name] for name in names if name in source}
        return {**kept, "base_version": self.policy.base_version}

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> LocalEngine:
        """The engine over the model that a state names; one model serves all who name it alike.

        Raises:
            ModelError: The model cannot be loaded, or its files hold other weights by now.
        """
        quantized = state.get("quantization_config")
        key = (
            *(state[name] for name in ("name_or_path", "dtype", "base_version")),
            json.dumps(quantized, sort_keys=True),
        )
        with _loading:
            engine = _loaded.get(key)
            if engine is None:
                # Its folder may bear another name than the one it was saved under.
                name = state["base_version"].rsplit("@", 1)[0]
                engine = cls(
                    Policy.load(
                        state["name_or_path"],
                        dtype=state["dtype"],
                        quantization_config=quantized,
                        name=name,
                    )
                )
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

    # DSPy writes this name into saved programs, so it must not tell where the code lies.
    __module__ = "fst_dspy"

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncLocalEngine:
        return self

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """As ``LocalEngine.complete``."""
        # A pool of the loop's would cap the batch at its size, so every call has its own thread.
        pool = ThreadPoolExecutor(max_workers=1)
        here = contextvars.copy_context()  # the thread is to see the same settings
        try:
            return await asyncio.get_running_loop().run_in_executor(
                pool, here.run, self.engine.complete, request
            )
        finally:
            pool.shutdown(wait=False)

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """As ``LocalEngine.stream``."""
        for event in streamed(await self.complete(request)):
            yield event

    def dump_state(self) -> dict[str, Any]:
        """As the engine's."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncLocalEngine:
        """As ``LocalEngine.load_state``."""
        return cls(LocalEngine.load_state(state))
