"""Running jobs: worker processes over one store, which can be taken up again.

The store is a folder: an index, and a folder a job (``jobs.py`` has its layout). A job that has an
outcome is not run again; one that was killed goes on from its last checkpoint; one that failed is
reported, the others go on, and the next call tries it again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fst_dspy.display import Terminal, as_text
from fst_dspy.errors import StoreError
from fst_dspy.experiments.jobs import LOG, OUTCOME, Job, read_job, write_job, write_json
from fst_dspy.files import left_by_system, read_json, read_jsonl
from fst_dspy.run.store import delete_checkpoints, environment

INDEX, CYCLES, LOCK = "index.json", "cycles.jsonl", ".lock"
SCHEMA_VERSION = 1
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class JobStatus:
    """A line of the index.

    Attributes:
        label, arm, seed: As in the job.
        state: ``"waiting"``, ``"running"``, ``"done"`` or ``"failed"``.
        error: What a failed one said last.
        attempts: Processes started for it.
        seconds: Wall time of the attempts that have ended.
    """

    label: str
    arm: str
    seed: int
    state: str = "waiting"
    error: str | None = None
    attempts: int = 0
    seconds: float = 0.0


class ExperimentStore:
    """A folder of jobs with an index of them.

    Attributes:
        folder: Where it is.
        about: What the protocol notes down, such as what was tuned; plain values.
        calls: Commands that ran jobs here, with the git revision of each.
        environment: Versions at the first of them.
        status: By job name, in the order in which jobs were added.

    Raises:
        StoreError: The folder is another's, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.about: dict[str, Any] = {}
        self.calls: list[dict[str, str]] = []
        self.environment = environment()
        self.status: dict[str, JobStatus] = {}
        self._read()

    def _read(self) -> None:
        """Take over what the index says, where there is one."""
        path = self.folder / INDEX
        if path.exists():
            plain = read_json(path)
            try:
                self.about, self.calls = plain["about"], plain["calls"]
                self.environment = plain["environment"]
                self.status = {name: JobStatus(**row) for name, row in plain["jobs"].items()}
            except (AttributeError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path} is damaged ({error!r}): take it from a copy, or choose another folder"
                ) from error
        elif self.folder.is_dir() and not all(
            path.name == LOCK or left_by_system(path.name) for path in self.folder.iterdir()
        ):
            raise StoreError(f"{self.folder} is no store of experiments; choose another folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store for this process, as it is now: others may have changed it since.

        Raises:
            StoreError: Another process does, or the folder cannot be made, or is damaged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK, blocking=False)
            lock.acquire()
        except Timeout:
            raise StoreError(f"another process runs experiments in {self.folder}") from None
        except OSError as error:
            raise StoreError(f"cannot write to {self.folder}: {error.strerror}") from error
        try:
            self._read()
            yield
        finally:
            lock.release()

    def begin(self, protocol: str) -> None:
        """Note down what this process was started as, with the store locked.

        Raises:
            StoreError: The store is another protocol's: it takes jobs of one.
        """
        found = self.about.setdefault("protocol", protocol)
        if found != protocol:
            raise StoreError(f"{self.folder} holds a store of {found}, not {protocol}")
        command = [Path(sys.argv[0]).name, *sys.argv[1:]]
        call = {"command": shlex.join(command), "revision": revision()}
        if call not in self.calls:
            self.calls.append(call)
        for name, status in self.status.items():  # as a runner that was killed left them
            if status.state == "running":
                self.status[name] = replace(status, state="waiting")
        self.save()

    def add(self, job: Job) -> None:
        """Take a job in, or recognise it.

        Raises:
            StoreError: The store has another job of that name.
        """
        write_job(self.folder / job.name, job)
        if job.name not in self.status:
            self.status[job.name] = JobStatus(job.label, job.arm, job.seed)

    def is_done(self, name: str) -> bool:
        """Whether a job has its outcome."""
        return (self.folder / name / OUTCOME).exists()

    def job(self, name: str) -> Job:
        """A job by its name."""
        return read_job(self.folder / name)

    def update(self, name: str, **change: Any) -> None:
        """Change a job's line of the index, and write it."""
        self.status[name] = replace(self.status[name], **change)
        self.save()

    def save(self) -> None:
        """Write the index, atomically."""
        plain = {
            "schema_version": SCHEMA_VERSION,
            "about": self.about,
            "calls": self.calls,
            "environment": self.environment,
            "jobs": {name: asdict(status) for name, status in self.status.items()},
        }
        write_json(self.folder / INDEX, plain)


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    started: float
    bar: TaskID


def run_jobs(
    store: ExperimentStore, jobs: Sequence[Job], *, workers: int = 1, console: Console | None = None
) -> list[str]:
    """Run the jobs that have no outcome yet, each in a process of its own.

    The process's threads are the machine's cores divided by ``workers``. Ctrl-C lets every worker
    save the step it is at. A caller holds ``store.locked()``.

    Args:
        store: Where the jobs and their outcomes are.
        jobs: Of different names.
        workers: Processes at once.
        console: Where to tell of it.

    Returns:
        Names of the jobs that failed.

    Raises:
        StoreError: The store holds another job of one of the names.
        KeyboardInterrupt: After Ctrl-C, when the workers have ended.
    """
    console = console or Terminal(stderr=True)
    for job in jobs:
        store.add(job)
    waiting = [job for job in jobs if not store.is_done(job.name)]
    for job in jobs:
        done = store.is_done(job.name)
        store.update(job.name, state="done" if done else "waiting", error=None)
        if done:
            _clear(store.folder / job.name)  # which a runner that was killed did not get to
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    running: dict[str, _Running] = {}
    with bar:
        total = bar.add_task("all", total=len(jobs), unit="jobs")
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    line = bar.add_task(job.name, total=job.rollouts, unit="rollouts")
                    attempts = store.status[job.name].attempts + 1
                    store.update(job.name, state="running", attempts=attempts)
                    process = _start(store.folder / job.name, job, workers)
                    running[job.name] = _Running(process, time.monotonic(), line)
                time.sleep(POLL_SECONDS)
                for name, one in list(running.items()):
                    bar.update(one.bar, completed=rollouts_so_far(store.folder / name))
                    if one.process.poll() is not None:
                        bar.remove_task(one.bar)
                        console.print(_ended(store, name, running.pop(name)))
                left = len(waiting) + len(running)
                bar.update(total, completed=len(jobs) - left)
        except BaseException:
            _stop(running)
            for name, one in running.items():
                _ended(store, name, one)
            raise
    return [job.name for job in jobs if store.status[job.name].state == "failed"]


def rollouts_so_far(folder: Path) -> int:
    """Rollouts that a job has run by its last cycle, over all stages."""
    total = 0
    for stage in _stages(folder):
        rows = list(read_jsonl(stage / CYCLES))
        counts = rows[-1]["total_rollouts"] if rows else {}
        total += sum(counts.get(channel, 0) for channel in ("fast", "slow", "eval"))
    return total


def _stages(folder: Path) -> list[Path]:
    """The run folders of a job, or of a stream of them."""
    return [path.parent for at in ("*", "stages/*") for path in folder.glob(f"{at}/{CYCLES}")]


def _clear(folder: Path) -> None:
    """Delete what only a job that has not ended needs."""
    for stage in _stages(folder):
        delete_checkpoints(stage)


def revision() -> str:
    """The package's git revision, ``-dirty`` with changes on it; without one, its version."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except OSError:  # there is no git on this machine
        described = ""
    return described or environment()["fst-dspy"]


def threads_each(workers: int) -> int:
    """Threads of each of so many processes."""
    return max(1, (os.cpu_count() or 1) // workers)


def _start(folder: Path, job: Job, workers: int) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": str(threads_each(workers)), "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / LOG, "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", job.module, str(folder)],
            stdin=subprocess.PIPE,  # ends when this process does, whatever ends it
            stdout=log,
            stderr=log,
            env={**os.environ, **threads},
            # Ctrl-C reaches the workers once, from here: on Windows by the second of these.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def _ended(store: ExperimentStore, name: str, one: _Running) -> Text:
    """Note down how a process ended; a line to say so."""
    code = one.process.returncode
    seconds = store.status[name].seconds + time.monotonic() - one.started
    if store.is_done(name):
        store.update(name, state="done", seconds=seconds)
        _clear(store.folder / name)
        return as_text(f"{name}: done in {seconds:.0f} s")
    if code == 130:
        store.update(name, state="waiting", seconds=seconds)
        return as_text(f"{name}: interrupted")
    error = f"killed by signal {-code}" if code < 0 else last_line(store.folder / name / LOG)
    store.update(name, state="failed", error=error, seconds=seconds)
    line = as_text(f"{name}: failed: {error}", "red")
    return line.append_text(as_text(f"; see {store.folder / name / LOG}", "default"))


def _stop(running: dict[str, _Running]) -> None:
    """Let the workers save what they are at, and wait for them."""
    for one in running.values():
        assert one.process.stdin is not None
        one.process.stdin.close()  # on which they stop as after Ctrl-C; Windows has no such signal
    for one in running.values():
        try:
            one.process.wait()
        except KeyboardInterrupt:
            one.process.kill()
            one.process.wait()


def last_line(path: Path) -> str:
    """The last line of a file that says anything."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
