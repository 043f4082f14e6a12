"""Whether threads compute or wait, and how much of a rollout's time is its own.

A thread that computes runs, or is ready to; one that waits for a lock, a tool or the network
sleeps, and takes no processor time. Linux tells this of every thread. Elsewhere there is only the
processor time of the whole process to go by.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

RUNNING_SHARE = 0.05
"""Share of the time that threads may run and yet count as waiting: pollers wake now and then."""


def run_seconds(native_id: int) -> tuple[float, int] | None:
    """Processor seconds of a thread of this process, and how often it was given a processor.

    ``None`` where the thread has ended, or this is not Linux.
    """
    try:
        ran, _, times = _read(f"/proc/self/task/{native_id}/schedstat").split()[:3]
    except (OSError, ValueError):
        return None
    return int(ran) / 1e9, int(times)


def is_running(native_id: int) -> bool:
    """Whether a thread runs, would if a processor were free, or waits for a disk."""
    try:
        return _read(f"/proc/self/task/{native_id}/stat").rsplit(b") ", 1)[1][:1] in b"RD"
    except (OSError, IndexError):
        return False


def _read(path: str) -> bytes:
    # Not ``open``: it makes three times as many system calls, and each lets other threads run.
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 512)
    finally:
        os.close(file)


@dataclass
class Quiet:
    """For how long some threads have been waiting.

    Each time they are looked at, the time since the look before counts as waiting if none of them
    is running and together they have hardly run in between.

    Attributes:
        slept: For how many seconds each of the threads has not been given a processor at all. One
            that waits for the interpreter's lock asks for it every few milliseconds, and so is
            given one again and again; one that waits for a tool or another lock is not.
        running: Whether one of them was running as they were looked at.
    """

    slept: dict[int, float] = field(default_factory=dict)
    running: bool = False
    _since: float | None = None
    _looked: float = 0.0
    _before: dict[int, tuple[float, int]] = field(default_factory=dict)
    _asleep: dict[int, float] = field(default_factory=dict)
    _process: float = 0.0

    def reset(self) -> None:
        """Something happened: what was seen before says nothing of now."""
        self._since = None

    def seconds(self, threads: Sequence[int]) -> float:
        """Look at the threads, given by their native ids; how long all of them have waited."""
        before, process = self._before, self._process
        found = {thread: run_seconds(thread) for thread in threads}
        self._before = {thread: ran for thread, ran in found.items() if ran is not None}
        now, self._process = time.monotonic(), time.process_time()
        if threads and not self._before:  # they have all ended, or Linux is not there to ask
            ran = self._process - process
        else:
            ran = sum(s - before.get(t, (0.0, 0))[0] for t, (s, _) in self._before.items())
        self._asleep = {
            thread: self._asleep[thread] if before.get(thread) == seen else now
            for thread, seen in self._before.items()
        }
        self.slept = {thread: now - since for thread, since in self._asleep.items()}
        self.running = any(map(is_running, self._before))
        if ran > RUNNING_SHARE * (now - self._looked) or self.running or self._since is None:
            self._since = now
        self._looked = now
        return now - self._since


@dataclass(frozen=True)
class ThreadTime:
    """Seconds that a thread has run, and those in which it ran or would have, on a free machine."""

    ran: float = 0.0
    busy: float = 0.0


def thread_time(native_id: int) -> ThreadTime | None:
    """The times of a thread of this process; ``None`` where it has ended, or this is not Linux."""
    try:
        ran, waited = _read(f"/proc/self/task/{native_id}/schedstat").split()[:2]
    except (OSError, ValueError):
        return None
    return ThreadTime(int(ran) / 1e9, (int(ran) + int(waited)) / 1e9)


class OwnTime:
    """Seconds that a rollout has used or idled away itself, outside the model.

    Of the time that passes, that in which other rollouts' threads were busy, or generation was, is
    not its own: beside 127 others that run, a rollout waits for its turn. But never less is its own
    than its thread has run for.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread: int | None = None
        self._last = self._seen = ThreadTime()
        self._ended = False

    def begin(self) -> None:
        """Called in the rollout's thread, when it starts."""
        self._thread = threading.get_native_id()
        self._last = self._seen = thread_time(self._thread) or ThreadTime()

    def end(self) -> None:
        """Called in the rollout's thread, when it ends; afterwards nobody can ask about it."""
        if self._thread is not None:
            self._last = thread_time(self._thread) or self._last
        self._ended = True

    def restart(self) -> None:
        """Begin again: a call of the model has returned."""
        self.seconds = 0.0

    def since(self) -> ThreadTime:
        """The times of its thread since this was asked before."""
        if self._thread is not None and not self._ended:
            self._last = thread_time(self._thread) or self._last
        before, self._seen = self._seen, self._last
        return ThreadTime(self._last.ran - before.ran, self._last.busy - before.busy)

    def add(self, passed: float, own: float, others: float) -> None:
        """Some time has passed, in which its thread ran, and others were busy, for so long."""
        self.seconds += max(own, passed - others)
