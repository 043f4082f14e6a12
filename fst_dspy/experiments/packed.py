"""A store's jobs that have ended, in one file: experiments go on, and are drawn, on other machines.

The file is JSON lines: first what the index says of the store, then a line a job, with its outcome
and its cycles, which is all that tables, figures and the question "has it run?" go by. Weights,
rollouts and logs stay where they are: a job that starts from another's weights cannot go on from
what was unpacked. Streams of tasks are not packed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.experiments.jobs import OUTCOME, Job, job_of, write_json
from fst_dspy.experiments.runner import CYCLES, ExperimentStore, JobStatus
from fst_dspy.files import read_json, read_jsonl, write_atomically

JOBS = "jobs.jsonl"
"""The usual name of such a file, beside a store's tables."""


def pack(store: ExperimentStore, file: Path) -> None:
    """Write what of a store has ended, atomically; nothing where nothing has.

    Args:
        store: A store, which may be at work.
        file: The file.
    """
    ended = [name for name in store.status if store.is_done(name) and not store.job(name).then]
    if not ended:
        return
    about = {"about": store.about, "calls": store.calls, "environment": store.environment}
    _write_lines(file, [about, *(_packed(store, name) for name in ended)])


def unpack(file: Path, folder: Path) -> ExperimentStore:
    """Bring a file's jobs into a store, which may hold some of them, and others, already.

    What the store has itself stays: its jobs, and what its protocol noted down.

    Args:
        file: One that ``pack`` wrote.
        folder: The store; it is made where there is none.

    Returns:
        The store.

    Raises:
        StoreError: The file cannot be read, or the store has other jobs of the same names.
    """
    try:
        first, *rows = read_jsonl(file)
        about, calls, environment = (first[name] for name in ("about", "calls", "environment"))
        jobs = [(_job(row), row) for row in rows]
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise StoreError(f"{file} holds no packed experiments: {error}") from error
    store = ExperimentStore(folder)
    with store.locked():
        store.about = {**about, **store.about}
        store.calls += [call for call in calls if call not in store.calls]
        if not store.status:
            store.environment = environment
        for job, row in jobs:
            if store.is_done(job.name):
                continue
            store.add(job)
            for stage, cycles in row["cycles"].items():
                (folder / job.name / stage).mkdir(parents=True, exist_ok=True)
                _write_lines(folder / job.name / stage / CYCLES, cycles)
            write_json(folder / job.name / OUTCOME, row["outcome"])
            store.status[job.name] = JobStatus(**row["status"])
        store.save()
    return store


def _write_lines(path: Path, rows: Sequence[Any]) -> None:
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(text.encode()))


def _packed(store: ExperimentStore, name: str) -> Mapping[str, Any]:
    folder = store.folder / name
    outcome = read_json(folder / OUTCOME)
    return {
        "job": asdict(store.job(name)),
        "status": {**asdict(store.status[name]), "state": "done"},
        "outcome": outcome,
        "cycles": {stage: list(read_jsonl(folder / stage / CYCLES)) for stage in outcome["stages"]},
    }


def _job(row: Mapping[str, Any]) -> Job:
    """The job of a line, whose names, as they name folders, have been looked at."""
    if not all(re.fullmatch(r"\w[\w.=+-]*", stage) for stage in row["cycles"]):
        raise ValueError(f"a stage names a folder; one of {list(row['cycles'])} cannot")
    JobStatus(**row["status"])
    return job_of(row["job"])
