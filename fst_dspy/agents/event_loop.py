"""The event loop of one environment whose methods are asynchronous."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable
from typing import Any


class EventLoop:
    """A loop in a thread of its own, begun when it is first needed.

    One for an environment's whole life: what ``reset`` has opened, a connection or a task that
    reads from it, still lives when a tool is called. In a thread, as the caller's may have a loop
    that is running (a notebook's has).
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def finished(self, value: Any) -> Any:
        """What a method returned, awaited where it is to be."""
        if not inspect.isawaitable(value):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(_awaited(value), self._loop).result()

    def close(self) -> None:
        """End its tasks and its thread; it may be used again."""
        if self._loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.wait(others, timeout=1) if others else None
