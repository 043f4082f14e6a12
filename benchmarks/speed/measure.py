"""Times in alternation, ratios over repeats, peak memory, and the machine they were taken on."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


class Clock:
    """What times are taken with: the wall, or the work of this process and its children.

    The latter is for a machine that others use as well; waiting does not count in it.
    """

    cpu = False

    @classmethod
    def now(cls) -> float:
        """Seconds since some moment."""
        if not cls.cpu:
            return time.perf_counter()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(own.ru_utime + own.ru_stime for own in used)


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        part: Letter of the part, ``"a"`` to ``"g"``.
        what: What is measured.
        unit: Of the values: ``"x"`` for a ratio, ``"s"``, ``"%"``, ...
        median, low, high: Over the repeats.
        repeats: How many.
        goal: What it should be, such as ``">= 1.3"``; empty where there is none.
        note: Figures that explain it.
    """

    part: str
    what: str
    unit: str
    median: float
    low: float
    high: float
    repeats: int
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; ``None`` where there is none."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.median >= float(bound) if sign == ">=" else self.median <= float(bound)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def row_of(
    part: str, what: str, unit: str, values: Sequence[float], goal: str = "", note: str = ""
) -> Row:
    """The row of some values, one a repeat."""
    return Row(
        part, what, unit, statistics.median(values), min(values), max(values), len(values), goal,
        note,
    )  # fmt: skip


def alternate(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each function, in turn, after a round that is not counted unless told otherwise.

    Every other round runs in reverse, so that none always follows the same one.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    if warm_up:
        for function in functions.values():
            function()
    for repeat in range(repeats):
        for name in list(functions)[:: 1 if repeat % 2 == 0 else -1]:
            gc.collect()
            started = Clock.now()
            functions[name]()
            times[name].append(Clock.now() - started)
    return times


def ratios(times: Mapping[str, Sequence[float]], top: str, bottom: str) -> list[float]:
    """``top`` over ``bottom``, a ratio a repeat."""
    return [a / b for a, b in zip(times[top], times[bottom], strict=True)]


def peak_memory(function: Callable[[], Any]) -> float:
    """MiB by which a call raised the process's resident memory at its highest (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def resident_memory() -> float:
    """MiB of resident memory now (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS") / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    load = os.getloadavg()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in load],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """The commit of this checkout, with ``+`` where it has changes; empty for a mere copy."""
    folder = Path(__file__).parent
    if shutil.which("git") is None:
        return ""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
