"""Files written beside the work, one job after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class BackgroundWriter:
    """Runs one job at a time in a thread, which a process that ends by itself waits for.

    Attributes:
        seconds: How long the last job took that ended; 0 before the first.
        ended_at: When it ended, by ``time.monotonic``; when this object was made before the first.
    """

    def __init__(self) -> None:
        self.seconds, self.ended_at = 0.0, time.monotonic()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], None], begun: float) -> None:
        """Begin a job, once the one before has ended; what that raised is raised here.

        Args:
            job: What to run.
            begun: Since when, by ``time.monotonic``, its preparation has taken time.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job, begun), name="fst-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the job that is running; what it raised is raised here, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None], begun: float) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
        self.ended_at = time.monotonic()
        self.seconds = self.ended_at - begun
