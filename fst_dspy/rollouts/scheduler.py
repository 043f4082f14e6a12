"""Which calls of the live rollouts are generated together, and when.

A batch is opened as soon as every live rollout waits for the model: the largest possible batch, and
the same one however the threads were scheduled. A rollout that waits for something else (a lock
that another holds, a slow tool, a pool without a free place) is not waited for: once nothing has
been running for ``GRACE_SECONDS``, or it has slept for as long and nothing runs just now, the batch
is opened without it. Each row is sampled with a seed
of its own, so what it says does not depend on the batch but for rounding; ``early`` counts the
batches of which that may differ from run to run.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspy import lm15

from fst_dspy.lm.requests import Pending, encode, prepare, run_batch
from fst_dspy.model.policy import Policy
from fst_dspy.rollouts.quiet import Quiet
from fst_dspy.types import Call

POLL_SECONDS = 0.01
"""How often threads are looked at while calls wait for a batch to be opened."""
SETTLE_SECONDS = 0.015
"""Waiting of all threads after which a rollout that calls from several has made its calls."""
GRACE_SECONDS = 0.05
"""Waiting of all threads after which a batch is opened without those that do not call."""
PATIENCE_SECONDS = 1.0
"""The same, of the rollouts' own threads, where other threads of the process never rest."""

AWAKE_SECONDS = 0.006
"""Who waits for the interpreter's lock has a processor at least this often, if only to ask."""

LOOK_SECONDS = 0.2
"""The threads are looked at this often, at least, where the process is at work or no call waits."""
LOOK_SHARE = 0.05
"""Share of the time that looking may take where the process is at work and calls wait."""
BUSY_SHARE = 0.5
"""Share of one processor that the process takes, above which it is at work."""


class RolloutEnded(SystemExit):
    """Ends the thread of a rollout that has been given up, silently, whatever it catches."""


@dataclass
class Slot:
    """One live rollout.

    Attributes:
        key: Sorts the slots of a batch; no two slots of a scheduler share one.
        seed: Every call's seed is derived from it.
        calls: The finished calls, in order.
        thread: Native id of the rollout's own thread, once it runs.
    """

    key: tuple[Any, ...]
    seed: int
    calls: list[Call] = field(default_factory=list)
    thread: int | None = None


@dataclass
class _Blocked:
    """A call that waits, in the thread that made it.

    ``batch`` is filled on the one call of a batch whose thread is to generate for all.
    """

    pending: Pending
    slot: Slot
    predictor: str
    order: tuple[Any, ...]
    thread: int
    awake: threading.Event = field(default_factory=threading.Event)
    batch: list[_Blocked] = field(default_factory=list)
    call: Call | None = None

    def record(self) -> None:
        """Keep the finished call with its rollout."""
        generation, result = self.pending.generation, self.pending.result
        if result is not None:
            self.call = Call(
                predictor=self.predictor,
                prompt_ids_T=generation.prompt_ids_T,
                completion_ids_T=result.completion_ids_T,
                logprobs_T=result.logprobs_T,
                text=result.text,
                finish_reason=result.finish_reason,
                # With penalties it was not drawn from the policy, no more than a greedy one.
                temperature=0.0 if generation.is_penalised else generation.temperature,
                grammar=generation.grammar,
            )
            self.slot.calls.append(self.call)


class Scheduler:
    """Opens batches for some rollouts that run at once.

    All slots are live from the start until ``leave``. The rows of a batch are sorted by slot, and
    a call's seed is derived from its slot's seed, its prompt and how often the slot has asked that
    very prompt: so neither depends on thread timing, even where one rollout makes calls at once.

    Someone must call ``poll`` every ``POLL_SECONDS`` while rollouts run.

    Args:
        policy: Who answers.
        slots: The rollouts.
        generate: Answers a batch; returns the number of ``generate`` calls it took.

    Attributes:
        batches: Batches generated so far.
        early: Of them, those opened while a rollout waited for something else than the model.
        generating: Seconds spent generating.
        failure: What ended generation, for all rollouts; ``None`` while all is well.
    """

    def __init__(
        self,
        policy: Policy,
        slots: Sequence[Slot],
        generate: Callable[[Policy, Sequence[Pending]], int] = run_batch,
    ) -> None:
        self.policy, self._generate = policy, generate
        self.batches = self.early = 0
        self.generating = 0.0
        self.failure: BaseException | None = None
        self._guard = threading.Lock()
        self._live = {slot.key: slot for slot in slots}
        if len(self._live) != len(slots):
            raise ValueError("two slots share a key")
        self._blocked: dict[tuple[Any, ...], list[_Blocked]] = {}
        self._asked: Counter[tuple[Any, ...]] = Counter()
        self._encode = functools.cache(encode)  # the rollouts of a group ask the same
        self._serving: float | None = None  # since when a batch has been generated
        self._events = 0
        self._own, self._all = Quiet(), Quiet()
        self._look_took = 0.0
        self._seen_events = -1
        self._polled = self._looked = self._ran = 0.0
        self._strangers = {thread.native_id for thread in threading.enumerate()}
        self._callers: set[int] = set()

    def complete(
        self, slot: Slot, predictor: str, request: lm15.Request, version: str
    ) -> tuple[lm15.Response, Call]:
        """Answer a call, once its batch is opened; the thread that opens it generates for all.

        Args:
            slot: The rollout that asks.
            predictor: The name recorded in ``slot.calls``.
            request: The call; its seed, if any, is mixed in.
            version: The weights to use, whatever the request names.

        Raises:
            RolloutEnded: The rollout has left, or generation has failed.
            lm15.LM15Error: The call cannot be answered; see ``fst_dspy.lm.requests.prepare``.
        """
        pending = prepare(self.policy, request, 0, version, self._encode)
        with self._guard:
            own = self._enqueue(pending, slot, predictor)
            batch = self._take_if_all_blocked()
        if not batch:
            # An event each, and not one condition for all: of n rollouts each would be woken n
            # times, and the threads' changing places would take longer than their work.
            own.awake.wait()
            batch = own.batch
        if batch:
            self._serve(batch)
        response = pending.response(ids=False)  # they are in the slot's calls
        assert own.call is not None
        return response, own.call

    def leave(self, slot: Slot) -> None:
        """The rollout has ended or was given up; its blocked calls, if any, end. Idempotent."""
        with self._guard:
            if self._live.pop(slot.key, None) is None:
                return
            self._events += 1
            for blocked in self._blocked.pop(slot.key, []):
                blocked.pending.error = RolloutEnded("this rollout has ended")
                blocked.awake.set()
            batch = self._take_if_all_blocked()
        _hand_over(batch)

    def poll(self) -> bool:
        """Open a batch without the rollouts that wait for something else, where nothing runs.

        Returns:
            Whether nothing runs, as far as was looked.
        """
        with self._guard:
            fresh = self._events != self._seen_events
            self._seen_events = self._events
            if fresh or self._serving is not None:
                self._own.reset()
                self._all.reset()
            if self._serving is not None or self._is_too_early(bool(self._blocked)):
                return False
            (own, others, tools), events = self._threads(), self._events
        own_quiet = self._own.seconds(own)
        quiet = min(own_quiet, self._all.seconds(others))
        gone = self._are_gone(tools)
        self._look_took = time.monotonic() - self._looked
        with self._guard:
            if self._events != events or self._serving is not None:
                return False
            complete = len(self._blocked) == len(self._live)
            wanted = SETTLE_SECONDS if complete else GRACE_SECONDS
            waits = quiet < wanted and own_quiet < PATIENCE_SECONDS
            if not self._blocked or (waits and (complete or not gone)):
                return quiet >= SETTLE_SECONDS
            self.early += not complete
            batch = self._take()
        _hand_over(batch)
        return False

    def generated(self) -> float:
        """Seconds spent generating, those of the batch under way included."""
        since = self._serving
        return self.generating + (time.monotonic() - since if since is not None else 0.0)

    def _is_too_early(self, waited_for: bool) -> bool:
        """Whether not to look at the threads yet.

        To ask for them one by one takes long beside others that run, and while nobody waits for
        the outcome it is no use to ask often.
        """
        now, ran = time.monotonic(), time.process_time()
        at_work = ran - self._ran > BUSY_SHARE * (now - self._polled)
        self._polled, self._ran = now, ran
        pause = min(LOOK_SECONDS, self._look_took / LOOK_SHARE) if waited_for else LOOK_SECONDS
        if (at_work or not waited_for) and now - self._looked < pause:
            return True
        self._looked = now
        return False

    def _are_gone(self, tools: Sequence[int]) -> bool:
        """Whether a rollout waits for something else, and nobody else is about to call.

        Where many have tools, some come back all the time, and so there is hardly ever a time in
        which nothing runs for long. That some rollout is asleep is then enough: the batch will be
        without it in any case. Threads other than the rollouts' own may work for them, so none of
        those may have been awake.

        Args:
            tools: The rollouts' own threads, of those of which no call waits.
        """
        slept = [self._own.slept.get(thread, 0.0) for thread in tools]
        return (
            max(slept, default=0.0) >= GRACE_SECONDS
            and min(slept) >= AWAKE_SECONDS
            and not self._own.running
            and min(self._all.slept.values(), default=GRACE_SECONDS) >= GRACE_SECONDS
        )

    def _threads(self) -> tuple[list[int], list[int], list[int]]:
        """The threads that may be about to call: the rollouts' own, and those started since.

        As the third those of the rollouts' own of which no call waits.
        """
        waiting = {blocked.thread for calls in self._blocked.values() for blocked in calls}
        own = {slot.thread for slot in self._live.values() if slot.thread is not None}
        alive = {t.native_id for t in threading.enumerate() if t.native_id is not None}
        started = (alive - self._strangers) | (alive & self._callers)
        started -= {threading.get_native_id()}
        calling = {self._live[key].thread for key in self._blocked}
        tools = sorted(own - calling)
        return sorted(own - waiting), sorted(started - own - waiting), tools

    def _serve(self, batch: Sequence[_Blocked]) -> None:
        try:
            batches = self._generate(self.policy, [blocked.pending for blocked in batch])
            with self._guard:
                self.batches += batches
        finally:
            with self._guard:
                failed = [b.pending.error for b in batch if b.pending.result is None]
                if failed and self.failure is None:
                    # The calls themselves were sound (see ``prepare``), so it was the engine.
                    self.failure = failed[0] or RuntimeError("the engine gave no answer")
                for blocked in batch:
                    blocked.record()
                    if self.failure is not None:
                        blocked.pending.error = RolloutEnded("generation has failed")
                if self._serving is not None:
                    self.generating += time.monotonic() - self._serving
                self._serving = None
                self._events += 1
                following = self._take_if_all_blocked()
            for blocked in batch:
                blocked.awake.set()
            _hand_over(following)

    def _enqueue(self, pending: Pending, slot: Slot, predictor: str) -> _Blocked:
        if slot.key not in self._live or self.failure is not None:
            raise RolloutEnded("this rollout has ended; it cannot call the model any more")
        prompt_ids_T = pending.generation.prompt_ids_T
        asked = (slot.key, prompt_ids_T)
        order = (slot.key, prompt_ids_T, self._asked[asked])
        # A seed in the request is mixed in only: taken as it is, it would make a group's rollouts
        # copies of each other.
        pending.seed_from(slot.seed, pending.request.config.seed, *order[1:])
        self._asked[asked] += 1
        blocked = _Blocked(pending, slot, predictor, order, threading.get_native_id())
        self._callers.add(blocked.thread)
        self._blocked.setdefault(slot.key, []).append(blocked)
        self._events += 1
        return blocked

    def _take_if_all_blocked(self) -> list[_Blocked]:
        if self._serving is not None or len(self._blocked) < len(self._live):
            return []
        if not all(map(self._is_settled, self._blocked.values())):
            return []  # ``poll`` opens it once it is
        return self._take()

    def _is_settled(self, calls: Sequence[_Blocked]) -> bool:
        """Whether a rollout cannot call again before it is answered: its own thread waits here."""
        own = calls[0].slot.thread
        return own is None or any(blocked.thread == own for blocked in calls)

    def _take(self) -> list[_Blocked]:
        batch = [blocked for calls in self._blocked.values() for blocked in calls]
        if batch:
            self._serving = time.monotonic()
        self._blocked = {}
        return sorted(batch, key=lambda blocked: blocked.order)


def _hand_over(batch: list[_Blocked]) -> None:
    """Let the thread of a batch's first call generate for all of it."""
    if batch:
        batch[0].batch = batch
        batch[0].awake.set()
