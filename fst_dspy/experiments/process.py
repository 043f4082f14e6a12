"""What every job's process does around its work: one at a time in a folder, and a clean end.

A process whose parent has died stops as after Ctrl-C: it finishes the step under way and saves it.
The parent holds the other end of its standard input.
"""

from __future__ import annotations

import _thread
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fst_dspy.errors import FSTError

LOCK_SECONDS = 60.0


def work(run: Callable[[Path], Any], folder: str) -> int:
    """Do the job of a folder; the process's exit code."""
    try:
        _stop_with_parent()
        run(Path(folder))
    except FSTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for the process of an earlier attempt, which may still be saving its last step.

    Raises:
        FSTError: It is still at work after a minute.
    """
    lock = FileLock(folder / ".lock", timeout=LOCK_SECONDS)
    try:
        lock.acquire(poll_interval=0.2)
    except Timeout:
        raise FSTError(f"another process is at work in {folder}") from None
    try:
        yield
    finally:
        lock.release()


def _interrupt() -> None:
    """Ctrl-C for this process; on Windows ``os.kill`` would end it."""
    if os.name == "nt":
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


def _stop_with_parent() -> None:
    """When standard input ends, a pipe that the parent holds open, interrupt the main thread."""

    def wait() -> Any:
        while os.read(0, 1):  # not sys.stdin, whose lock would be held at exit
            pass
        _interrupt()

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        # Shells have what they start in the background ignore it, and so would we.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=wait, daemon=True).start()
