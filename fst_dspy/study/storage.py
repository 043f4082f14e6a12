"""Where a study is kept, and how the trials of killed workers are found and run again.

Any Optuna storage works with any tool that reads Optuna's, such as optuna-dashboard.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy import URL, Connection, event, make_url

from fst_dspy.errors import ConfigError
from fst_dspy.files import path_given

HEARTBEAT_SECONDS = 30
GRACE_SECONDS = 240
SQLITE_WAIT_SECONDS = 60
MAX_RETRIES = 3


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Open a study's storage.

    Args:
        url: ``sqlite:///studies/triage.db``, ``postgresql://user@host/name`` (needs the extra
            ``fst-dspy[postgres]``), or ``journal:///studies/triage.log`` for a journal file, the
            choice for network drives; workers on several machines then share the study's folder as
            well, or none knows of another that died. As in every such URL, three slashes begin a
            relative path and four an absolute one.

    Raises:
        ConfigError: It is none of these, or cannot be opened.
    """
    kind, separator, path = url.partition("://")
    if not separator:
        raise ConfigError(
            f"{url!r} is no storage; give sqlite:///file.db, journal:///file.log or "
            "postgresql://user@host/name"
        )
    if kind == "postgresql":
        url = f"postgresql+psycopg://{path}"  # SQLAlchemy's own choice changed between versions
    patience = {"connect_args": {"timeout": SQLITE_WAIT_SECONDS}} if kind == "sqlite" else {}
    try:
        if kind == "journal":
            file = path_given(path.removeprefix("/"))
            file.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(file)))
        if kind == "sqlite":
            _sqlite_file(url).parent.mkdir(parents=True, exist_ok=True)
        with _no_experimental_warning():
            storage = RDBStorage(
                url,
                engine_kwargs=patience,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=_retry_callback(),
            )
    except ImportError as error:
        raise ConfigError(
            f"the driver for {kind} is missing ({error.__cause__ or error}); "
            "for PostgreSQL: pip install 'fst-dspy[postgres]'"
        ) from error
    except Exception as error:
        raise ConfigError(f"cannot open the storage {url}: {error}") from error
    if kind == "sqlite":
        event.listen(storage.engine, "begin", _begin_writing)
    return storage


def sqlite_url(file: Path) -> str:
    """The URL of a SQLite file, whatever its path holds.

    Options would begin at a ``?``, Optuna fills in what stands in braces, and not every version of
    SQLAlchemy escapes a path: where there is any such character, SQLite is given a URI of its own.
    """
    path, query = str(file), {}
    if set(path) & set("?{}%"):
        path, query = f"file:{quote(path)}", {"uri": "true"}
    return URL.create("sqlite", database=path, query=query).render_as_string(hide_password=False)


def _sqlite_file(url: str) -> Path:
    database = make_url(url).database or ""
    return Path(unquote(database[5:]) if database.startswith("file:") else database)


@contextmanager
def worker_alive(folder: Path) -> Iterator[str]:
    """Hold a lock for as long as this worker lives, whatever ends it; gives the worker's id.

    The kernel lets go of the lock when the process dies, so others on this machine know at once,
    with every storage. Workers on other machines are known by Optuna's heartbeat, which a journal
    does not have.
    """
    worker = uuid.uuid4().hex[:12]
    path = _lock_path(folder, worker)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path):
            yield worker
    finally:
        path.unlink(missing_ok=True)


def retry_lost_trials(study: optuna.Study, folder: Path) -> list[int]:
    """Fail the running trials whose worker is dead, and queue each again in its own run folder.

    Args:
        study: The study.
        folder: The study's folder, which workers on this machine share.

    Returns:
        Numbers of the trials found by their worker's lock.
    """
    lost = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        with _locked_if_dead(folder, trial.user_attrs.get("worker")) as dead:
            if dead and _fail(study, trial.number):
                retry(study, trial.number)
                lost.append(trial.number)
    with _no_experimental_warning():
        optuna.storages.fail_stale_trials(study)
    return lost


def unwatched(study: optuna.Study, url: str, folder: Path) -> list[int]:
    """Running trials whose worker may die without a word: it is elsewhere, as far as can be seen.

    Args:
        study: The study.
        url: Of its storage; all but journals have heartbeats.
        folder: The study's folder, in which workers that can be watched hold a lock.
    """
    if not url.startswith("journal:"):
        return []
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    workers = {trial.number: trial.user_attrs.get("worker") or "none" for trial in running}
    return [number for number, name in workers.items() if not _lock_path(folder, name).exists()]


def retry(study: optuna.Study, number: int, at_most: int | None = MAX_RETRIES) -> None:
    """Queue a failed trial again, with its settings and run folder.

    Args:
        study: The study.
        number: The trial's.
        at_most: Times that it may be, for what ends a worker may be the trial; ``None`` where it is
            known to have been something else.
    """
    _retry_callback(at_most)(study, study.get_trials()[number])


def retried_numbers(study: optuna.Study) -> set[int]:
    """Trials that failed with their worker and were queued again under another number."""
    trials = study.get_trials(deepcopy=False)
    return {n for trial in trials for n in trial.system_attrs.get("retry_history", [])}


@contextmanager
def _locked_if_dead(folder: Path, worker: str | None) -> Iterator[bool]:
    """Whether a worker of this machine is dead; inside the block nobody else will find it so."""
    path = _lock_path(folder, worker or "none")
    if not path.exists():
        yield False
        return
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _fail(study: optuna.Study, number: int) -> bool:
    """Mark a running trial failed; false where somebody else did first."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return False
    return True


def _begin_writing(connection: Connection) -> None:
    # SQLite ignores Optuna's SELECT ... FOR UPDATE: two workers would take the same queued trial.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _lock_path(folder: Path, worker: str) -> Path:
    return folder / "workers" / f"{os.path.basename(worker)}.lock"


def _retry_callback(at_most: int | None = MAX_RETRIES) -> RetryHeartbeatStaleTrialCallback:
    with _no_experimental_warning():
        return RetryHeartbeatStaleTrialCallback(max_retry=at_most)


@contextmanager
def _no_experimental_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
