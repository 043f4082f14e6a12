"""What the workers of a study wait for, so that a test can kill one of two that are at work."""

import os
from pathlib import Path

from helpers import wait_for

from fst_dspy import LocalLM


def held_model(model: str, folder: Path) -> LocalLM:
    """A trial's model, which may have to wait.

    A worker's first one waits until two workers have a trial to run, for one of them might run
    all; its second one until one of the two was killed.
    """
    first, second = (folder / name / str(os.getpid()) for name in ("first", "second"))
    if not first.exists():
        _mark(first)
        wait_for(lambda: len(os.listdir(first.parent)) == 2)
    else:
        _mark(second)
        wait_for((folder / "killed").exists)
    return LocalLM(model)


def held(folder: Path) -> list[int]:
    """Processes of the workers that wait to be killed."""
    return [int(path.name) for path in (folder / "second").glob("*")]


def _mark(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch()
