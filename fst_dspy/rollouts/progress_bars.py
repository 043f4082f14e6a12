"""Programs that call ``dspy.Parallel`` while others do.

DSPy empties tqdm's set of open bars at each such call and does not take tqdm's lock for it. A bar
that opens in another thread at that moment looks for itself there and fails (``KeyError``), and so
would the rollout.
"""

from __future__ import annotations

from weakref import WeakSet

from tqdm import tqdm


class _Bars(WeakSet):
    """tqdm's open bars: emptied under its lock, and nothing that has left is missed."""

    def clear(self) -> None:
        with tqdm.get_lock():
            super().clear()

    def remove(self, item: object) -> None:
        self.discard(item)


def share_between_threads() -> None:
    """Let tqdm's bars open, close and be emptied in several threads at once; may be repeated."""
    with tqdm.get_lock():
        if not isinstance(tqdm._instances, _Bars):
            tqdm._instances = _Bars(tqdm._instances)
