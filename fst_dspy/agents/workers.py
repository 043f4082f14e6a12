"""Environments in processes of their own, which may crash or hang without harm to the rest.

A worker holds one environment at a time and is used again for the next, as starting a process takes
longer than most episodes. One that does not answer in time, or that has died, is ended, and its
rollout lost. The processes are started as programs of their own, not forked, since a fork would
take the locks of other threads along; and not by ``multiprocessing``, which would run the user's
script again in each of them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fst_dspy.agents import contract
from fst_dspy.agents.worker import receive, send
from fst_dspy.errors import ProgramError

MAKING = 60.0
"""Seconds that an environment may take to be made, beyond what a tool of it may take."""


class EnvironmentCrashedError(ConnectionError):
    """The process of an environment has died; an error of what a rollout runs on."""


class Workers:
    """Processes for environments, kept for the next episode once they are idle.

    Args:
        timeout: Seconds that a reset or a tool may take; ``None`` waits for ever. Making the
            environment, for which its libraries are imported, may take ``MAKING`` more.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._started: weakref.WeakSet[_Worker] = weakref.WeakSet()
        weakref.finalize(self, _end_all, self._started)

    def __deepcopy__(self, memo: dict[int, Any]) -> Workers:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.timeout,)

    def make(self, factory: Callable[[], Any]) -> RemoteEnvironment:
        """An environment in a process.

        Raises:
            ProgramError: The factory failed.
            EnvironmentCrashedError, TimeoutError: So did the process.
        """
        environment = RemoteEnvironment(self, self._living() or self._start())
        try:
            environment._begin(factory)
        except BaseException:
            environment.close()
            raise
        return environment

    def _living(self) -> _Worker | None:
        """An idle worker that has not died since, if there is one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.end()
        return None

    def _start(self) -> _Worker:
        worker = _Worker()
        with self._lock:
            self._started.add(worker)
        return worker

    def give_back(self, worker: _Worker) -> None:
        """Take an idle worker back."""
        with self._lock:
            self._idle.append(worker)


class RemoteEnvironment:
    """An environment in a worker, by the contract of ``fst_dspy.agents.contract``.

    ``done``, ``reward`` and ``feedback`` are as they were after the last call.
    """

    def __init__(self, workers: Workers, worker: _Worker) -> None:
        self._workers, self._worker, self._whole = workers, worker, True
        self._tools: dict[str, Any] = {}
        self.done, self.reward, self.feedback = False, None, None

    def reset(self, **fields: Any) -> Any:
        """Begin an episode."""
        return self._ask("reset", fields)

    def get_reward(self) -> float | None:
        """The environment's reward of the episode, in whichever way it gives one."""
        return self._ask("final_reward", {})

    def fst_tools(self) -> dict[str, Callable[..., Any]]:
        """The environment's tools, each of which calls the worker."""
        return {
            name: contract.described(self._caller(name), name, signature, doc)
            for name, (signature, doc) in self._tools.items()
        }

    def close(self) -> None:
        """Close the environment, and keep its process for another unless it has failed."""
        if not self._whole:
            return
        try:
            self._ask("close", {})
        except Exception:
            self._end()
        if self._whole:
            self._whole = False
            self._workers.give_back(self._worker)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            if name in self._tools:
                return self._caller(name)
            found, value = self._ask("get", {}, name)
            if found:
                return value
        raise AttributeError(name)

    def _caller(self, name: str) -> Callable[..., Any]:
        return lambda **arguments: self._ask("call", arguments, name)

    def _begin(self, factory: Callable[[], Any]) -> None:
        try:
            self._tools = self._ask("make", {}, factory)
        except contract.RemoteError as error:
            raise ProgramError(f"the environment cannot be made: {error}") from error

    def _ask(self, what: str, arguments: Mapping[str, Any], *more: Any) -> Any:
        if not self._whole:
            raise EnvironmentCrashedError("the process of the environment has been ended")
        timeout = self._workers.timeout
        if timeout is not None and what == "make":
            timeout += MAKING
        try:
            answer = self._worker.ask((what, dict(arguments), more), timeout)
        except BaseException:  # also Ctrl-C: the answer would be taken for that of the next call
            self._end()
            raise
        kind, value, attributes = answer
        vars(self).update(attributes)
        if kind == "returned":
            return value
        raise (ConnectionError if kind == "lost" else contract.RemoteError)(value)

    def _end(self) -> None:
        self._whole = False
        self._worker.end()


class _Worker:
    def __init__(self) -> None:
        # What the factory was defined in is imported there, from where it was imported here.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fst_dspy.agents.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for the compile, which ends the step under way; Windows has the second.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # A read of a pipe cannot be given up on every platform; waiting for a thread can.
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, question: Any, timeout: float | None) -> Any:
        assert self.process.stdin is not None
        try:
            send(self.process.stdin, question)
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"the environment did not answer within {timeout:g} s") from None
        except OSError:
            answer = None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # of its own accord, as it is
                self.process.wait(timeout=5)
            self.end()
            raise EnvironmentCrashedError(
                f"the process of the environment has died (exit code {self.process.returncode})"
            )
        return answer

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            while True:
                self._answers.put(receive(self.process.stdout))
        except Exception:  # the process has ended
            self._answers.put(None)
            self.process.stdout.close()


def _end_all(started: Iterable[_Worker]) -> None:
    for worker in list(started):
        worker.end()
