"""The DSPy engine of rollouts: generates when every live rollout is blocked on a call.

That is the largest possible batch, and the same one however the threads were scheduled.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dspy import lm15

from fst_dspy.lm.engine import AsyncLocalEngine
from fst_dspy.lm.requests import Pending, encode, no_streaming, prepare, run_batch
from fst_dspy.model.policy import Policy
from fst_dspy.types import Call


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


@dataclass
class _Blocked:
    """A call that waits at the barrier, in the thread that made it.

    ``batch`` is filled on the one call of a batch whose thread is to generate for all.
    """

    pending: Pending
    engine: SlotEngine
    order: tuple[Any, ...]
    awake: threading.Event = field(default_factory=threading.Event)
    batch: list[_Blocked] = field(default_factory=list)

    def record(self) -> None:
        """Keep the finished call with its rollout."""
        generation, result = self.pending.generation, self.pending.result
        if result is not None:
            call = Call(
                predictor=self.engine.predictor,
                prompt_ids_T=generation.prompt_ids_T,
                completion_ids_T=result.completion_ids_T,
                logprobs_T=result.logprobs_T,
                text=result.text,
                finish_reason=result.finish_reason,
                temperature=generation.temperature,
            )
            self.engine.slot.calls.append(call)


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
        self._guard = threading.Lock()
        self._live = {slot.key: slot for slot in slots}
        if len(self._live) != len(slots):
            raise ValueError("two slots share a key")
        self._blocked: dict[tuple[Any, ...], list[_Blocked]] = {}
        self._asked: Counter[tuple[Any, ...]] = Counter()
        self._encode = functools.cache(encode)  # the rollouts of a group ask the same

    def leave(self, slot: Slot) -> None:
        """The rollout has ended or was given up; its blocked calls, if any, fail. Idempotent."""
        with self._guard:
            if self._live.pop(slot.key, None) is None:
                return
            for blocked in self._blocked.pop(slot.key, []):
                blocked.pending.error = _left()
                blocked.awake.set()
            batch = self._take_if_all_blocked()
        if batch:  # the others waited for this slot alone; one of their threads generates
            batch[0].batch = batch
            batch[0].awake.set()

    def engine_for(self, slot: Slot, predictor: str, *, version: str | None = None) -> SlotEngine:
        """An engine for one predictor of one rollout.

        Args:
            slot: One of the batcher's slots.
            predictor: The name recorded in ``slot.calls``.
            version: The weights to use; ``None`` takes those that the request names.
        """
        return SlotEngine(self, slot, predictor, version)

    def complete(self, engine: SlotEngine, request: lm15.Request) -> lm15.Response:
        """Block until the barrier opens; the thread that opens it generates for all."""
        pending = prepare(self.policy, request, 0, engine.version, self._encode)
        with self._guard:
            own = self._enqueue(pending, engine)
            batch = self._take_if_all_blocked()
        if not batch:
            # An event each, and not one condition for all: of n rollouts each would be woken n
            # times, and the threads' changing places would take longer than their work.
            own.awake.wait()
            batch = own.batch
        if batch:
            self._serve(batch)
        return pending.response(ids=False)  # they are in the slot's calls

    def _serve(self, batch: Sequence[_Blocked]) -> None:
        try:
            batches = run_batch(self.policy, [blocked.pending for blocked in batch])
            with self._guard:
                self.batches += batches
        finally:
            for blocked in batch:
                blocked.record()
                blocked.awake.set()

    def _enqueue(self, pending: Pending, engine: SlotEngine) -> _Blocked:
        slot, prompt_ids_T = engine.slot, pending.generation.prompt_ids_T
        if slot.key not in self._live:
            raise _left()
        asked = (slot.key, prompt_ids_T)
        order = (slot.key, prompt_ids_T, self._asked[asked])
        # A seed in the request is mixed in only: taken as it is, it would make a group's rollouts
        # copies of each other.
        parts = (slot.seed, pending.request.config.seed, *order[1:])
        digest = hashlib.sha256(repr(parts).encode()).digest()
        seed = int.from_bytes(digest[:8], "big")
        pending.generation = replace(pending.generation, seed=seed)
        self._asked[asked] += 1
        blocked = _Blocked(pending, engine, order)
        self._blocked.setdefault(slot.key, []).append(blocked)
        return blocked

    def _take_if_all_blocked(self) -> list[_Blocked]:
        if len(self._blocked) < len(self._live):
            return []
        batch = [blocked for calls in self._blocked.values() for blocked in calls]
        self._blocked = {}
        return sorted(batch, key=lambda blocked: blocked.order)


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
        raise no_streaming()


def _left() -> lm15.LM15Error:
    return lm15.InvalidRequestError("this rollout has ended; it cannot call the model any more")
