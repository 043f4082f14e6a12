"""Ctrl-C during a compile: the step under way is finished and saved, then the run stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fst_dspy.errors import CompileInterrupted

STOPPING = "stopping after this step; press Ctrl-C again to stop now"
"""What the first Ctrl-C is answered with."""


class Interrupt:
    """Holds back the first Ctrl-C until the loop asks for it; the second one stops at once.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Args:
        folder: Where the run can be resumed from; ``None`` without a run folder.
        tell: Called with what is done about the first one, as soon as it comes.
    """

    def __init__(
        self, folder: Path | None, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder = folder
        self.tell = tell
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def stop_if_requested(self) -> None:
        """Raise the ``CompileInterrupted`` that was held back, saying how to go on."""
        if self.requested:
            raise self._error(at_once=False)

    def _error(self, at_once: bool) -> CompileInterrupted:
        return CompileInterrupted(str(self.folder) if self.folder else None, at_once)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise self._error(at_once=True)
        self.requested = True
        # As Python's own handlers do, this runs between two instructions of the main thread, which
        # may hold the lock of a console: a thread of its own waits for it.
        threading.Thread(target=self.tell, args=(STOPPING,), daemon=True).start()
