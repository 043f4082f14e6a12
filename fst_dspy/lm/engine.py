"""The DSPy engine of ``LocalLM``: whatever calls arrive together, from threads or coroutines, are
generated together.

Within a rollout a call goes to the rollout instead, whichever language model object makes it: to
``fst_dspy.rollouts.scheduler``, whose batches do not depend on timing. Which rollout that is stands
in DSPy's settings, which DSPy hands on to the threads and tasks that it starts.
"""

from __future__ import annotations

import asyncio
import contextvars
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from typing import Any, Protocol

import dspy
from dspy import lm15

from fst_dspy.errors import ModelError
from fst_dspy.lm.requests import Pending, no_streaming, prepare, run_batch
from fst_dspy.model.policy import Policy

GATHER_SECONDS = 0.004  # how long the first of some concurrent calls waits for the others
ROLLOUT = "fst_rollout"
"""The DSPy setting that holds the rollout that is running."""


class Server(Protocol):
    """A rollout, as an engine sees it: it answers the calls that are made in it."""

    @property
    def policy(self) -> Policy:
        """The policy whose calls it answers."""
        ...

    def complete(self, request: lm15.Request) -> lm15.Response:
        """As ``LocalEngine.complete``, whatever weights the request names."""
        ...


def serving(policy: Policy) -> Server | None:
    """The rollout of a policy that the caller is in, if it is in one."""
    rollout = dspy.settings.get(ROLLOUT)
    return rollout if rollout is not None and rollout.policy is policy else None


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
            lm15.UnsupportedFeatureError: Images, tools or another thing a local model lacks.
        """
        if (rollout := serving(self.policy)) is not None:
            return rollout.complete(request)
        pending = prepare(self.policy, request, secrets.randbits(63))
        with self._guard:
            self._waiting.append(pending)
        # Whoever gets the turn serves everybody who is waiting, so the others find theirs done.
        with self._turn:
            if not pending.done:
                time.sleep(GATHER_SECONDS)
                with self._guard:
                    batch, self._waiting = self._waiting, []
                self.batches += run_batch(self.policy, batch)
        return pending.response(ids=True)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Refused: a local model answers whole."""
        raise no_streaming()

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

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """Refused: a local model answers whole."""
        raise no_streaming()

    def dump_state(self) -> dict[str, Any]:
        """As the engine's."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: dict[str, Any]) -> AsyncLocalEngine:
        """As ``LocalEngine.load_state``."""
        return cls(LocalEngine.load_state(state))
