"""Ctrl-C during a compile: the step under way is finished and saved, then the run stops."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Holds back the first Ctrl-C until the loop asks for it; the second one stops at once.

    Outside the main thread, where Python delivers no signals, it does nothing.

    Args:
        folder: Where the run can be resumed from; ``None`` without a run folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
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
        """Raise the ``KeyboardInterrupt`` that was held back, saying how to go on."""
        if self.requested:
            how = (
                f"start it again with log_dir={str(self.folder)!r} to go on where it stopped"
                if self.folder is not None
                else "without a log_dir nothing was saved; set one to be able to resume"
            )
            raise KeyboardInterrupt(f"compile interrupted; {how}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt("compile interrupted at once; the last checkpoint stands")
        self.requested = True
