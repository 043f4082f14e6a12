"""The run folder: what a compile writes, and how a killed one goes on.

Layout::

    config.json        settings, seed, arm, program, versions
    cycles.jsonl       one CycleRecord a line
    steps.jsonl        one StepRecord a line
    population.jsonl   the candidates at the end of a cycle, one cycle a line
    rollouts.jsonl     one rollout a line, with its text, reward and feedback
    proposals.jsonl    one candidate that was tried a line: texts, scores, whether it was accepted
    answers.jsonl      one answer to a validation example a line
    checkpoints/N/     all that the loop needs to go on, N counting up
    versions/X.safetensors   weights worth keeping: the best on the validation set
    result.json        the outcome, once the run has ended

Every file that is read again is written to a temporary name, flushed to disk and renamed, so a
half-written one is never picked up. Each checkpoint remembers how long the logs were; resuming
cuts them back to that length, so nothing is recorded twice. Files of other names are not the run's,
and are left alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from filelock import FileLock, Timeout

from fst_dspy.config import BudgetConfig, without_removed
from fst_dspy.errors import ConfigError, StoreError
from fst_dspy.files import (
    flush,
    left_by_system,
    read_json,
    read_jsonl,
    sha256,
    write_atomically,
    writing_to,
)

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
KEPT_CHECKPOINTS = 2
LOGS = ("answers", "cycles", "population", "proposals", "rollouts", "steps")
"""The ``.jsonl`` files of a run, in the order of their names."""
HASHES = "hashes.json"
"""In a checkpoint: the SHA-256 of every other file."""
ADDED_LATER = ("program", "adapter", "lm", "metric")
"""What the ``config.json`` of earlier versions may lack."""
CODE = ("metric", "program")
"""What is known by its name, and of which it is told what else has changed."""
OF_CODE = ("source", "values")
"""What that is."""
DIFFERENCES = 5
"""Named at most, where a folder holds another run."""
NOT_COMPARED = ("environment", "loaded")
"""Told for whoever reads the folder; what of it matters is in the version of the weights."""
MAY_CHANGE = ("micro_batch_size", "num_threads", "max_reflection_cost", "max_reflection_tokens")
"""Settings that a run may go on with other values of: how much memory is taken, and what reflection
may cost. A step that is cut otherwise is the same one but for rounding."""
SHOWN = 40
"""Characters of a value that differs."""


class RunStore:
    """One run folder, locked for this process until ``close``.

    Raises:
        StoreError: The folder cannot be created or written, or another process holds it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _refuse_links(self.folder)
            self._lock: FileLock | None = FileLock(self.folder / ".lock", blocking=False)
            try:
                self._lock.acquire()
            except Timeout:
                raise StoreError(
                    f"another process is writing to the run folder {self.folder}; "
                    "wait for it or choose another folder"
                ) from None

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``, or check that the folder's own says the same.

        What earlier versions did not write is added. A budget may change, so that a run can be
        extended, but for the cycles that the learning rate decays over, and so may ``MAY_CHANGE``,
        so that one can go on for which there was too little memory. A metric or program of the same
        name whose source or values have changed is told of: the scores of before are the old one's.
        A run that ended before it had anything to keep, by a mistake that is mended now, binds
        nobody.

        Raises:
            StoreError: The folder holds a run with other settings, data or program, a run without
                its ``config.json``, or such a file of something else.
        """
        path = self.folder / "config.json"
        wanted = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **config}))
        own = (
            *self._logs(),
            *map(self.folder.joinpath, ("checkpoints", "versions", "result.json")),
        )
        there = [found.name for found in own if found.exists()]
        if not there:
            if path.exists() and "schema_version" not in self.config():
                raise StoreError(f"{path} is not a run's, but your own; choose another folder")
            self.write_json("config.json", wanted)
            return
        if not path.exists():
            raise StoreError(
                f"the run folder {self.folder} holds a run ({', '.join(there)}), but not its "
                "config.json, without which nothing tells whether it is this one; put the "
                "file back, or choose another folder"
            )
        if (self.folder / "result.json").exists() and not self._checkpoints():
            raise StoreError(
                f"the run in {self.folder} has ended and its checkpoints were deleted, so that it "
                "cannot go on; choose another folder"
            )
        found = self.config()
        changed = differences(found, wanted)
        if not changed:
            for change in _changes_of_code(found, wanted):
                logger.warning(
                    f"{change} since the run in {self.folder} began; the scores of before are the "
                    "old one's"
                )
            if found != wanted:
                self.write_json("config.json", {**found, **wanted})
        if changed:
            raise another_run(self.folder, changed)

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says, which must be there.

        Raises:
            StoreError: It cannot be read, or is damaged.
        """
        path = self.folder / "config.json"
        found = read_json(path)
        if not isinstance(found, dict):
            raise StoreError(f"{path} is damaged: it holds no object; choose another folder")
        return found

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in the folder, atomically."""
        with writing_to(self.folder):
            write_atomically(
                self.folder / name, lambda file: file.write(json.dumps(value, indent=1).encode())
            )

    def append(self, name: str, rows: Sequence[Any]) -> None:
        """Append rows, dataclasses or dicts that may hold some, to ``<name>.jsonl``.

        What a program puts into its fields may be anything; what JSON cannot hold is written as its
        ``repr``.

        Raises:
            ValueError: It is none of ``LOGS``: resuming would not cut it back.
        """
        if name not in LOGS:
            raise ValueError(f"a run has no log {name!r}, it has {', '.join(LOGS)}")
        lines = b"".join(map(_line, rows))
        with writing_to(self.folder), open(self.folder / f"{name}.jsonl", "ab") as file:
            file.write(lines)

    def read(self, name: str) -> list[dict[str, Any]]:
        """All rows of ``<name>.jsonl``, oldest first; none when there is no such file."""
        return list(read_jsonl(self.folder / f"{name}.jsonl"))

    def checkpoint(self, state: Mapping[str, Any], write_weights: Callable[[Path], None]) -> None:
        """Write the next checkpoint whole, then prune the oldest.

        Args:
            state: Plain values and dataclasses of such; kept in ``state.json``.
            write_weights: Called with an empty folder that becomes part of the checkpoint.
        """
        self.prepared(state)(write_weights)

    def prepared(self, state: Mapping[str, Any]) -> Callable[[Callable[[Path], None]], None]:
        """A checkpoint of the state and the logs as they are now, to be written while they go on.

        Returns:
            What writes it, as ``checkpoint``; from another thread if need be, but one at a time.
        """
        with writing_to(self.folder):
            whole = {**state, "lengths": self._lengths()}
            text = json.dumps(whole, default=_fields, check_circular=False)
        return partial(self._write_checkpoint, text)

    def _write_checkpoint(self, text: str, write_weights: Callable[[Path], None]) -> None:
        number = max(self._checkpoints(), default=-1) + 1
        root = self.folder / "checkpoints"
        temporary = root / f"{number}.tmp"
        with writing_to(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "weights").mkdir(parents=True)
            write_weights(temporary / "weights")
            (temporary / "state.json").write_text(text)
            names = {_name(p, temporary): sha256(p) for p in _files_in(temporary)}
            (temporary / HASHES).write_text(json.dumps(names))
            for path in (*sorted(temporary.rglob("*")), temporary):
                flush(path)
            os.replace(temporary, root / str(number))
            flush(root)
            for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(root / str(old), ignore_errors=True)

    def latest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that is whole, after cutting the logs back to it.

        One that is damaged is passed over with a word, and deleted.

        Returns:
            Its state, with the weights' folder; ``None`` when there is no checkpoint.

        Raises:
            StoreError: None is whole.
        """
        damage = ""
        for number in reversed(self._checkpoints()):
            folder = self.folder / "checkpoints" / str(number)
            try:
                state, lengths = self._whole(folder)
            except StoreError as error:
                damage = damage or str(error)
                logger.warning("checkpoint %d is damaged and left out: %s", number, error)
                continue
            with writing_to(self.folder):
                for later in self._checkpoints():
                    if later > number:
                        shutil.rmtree(self.folder / "checkpoints" / str(later))
                for path in self._logs():
                    # A log that was begun after the checkpoint is cut back to nothing.
                    os.truncate(path, lengths.get(path.name, 0))
            return state, folder / "weights"
        if damage:
            raise StoreError(
                f"no checkpoint in {self.folder} is whole ({damage}); put the files back, or "
                "delete the folder to start over"
            )
        return None

    def _whole(self, folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
        """A checkpoint's state, and how long the logs were.

        Raises:
            StoreError: A file is missing, or is not as it was written, or a log is too short.
        """
        hashes, own = folder / HASHES, {path: sha256(path) for path in _files_in(folder)}
        if hashes.exists():  # versions before did not write them
            wanted = read_json(hashes)
            if isinstance(wanted, dict):  # versions before wrote names as the system does
                wanted = {name.replace("\\", "/"): digest for name, digest in wanted.items()}
            del own[hashes]
            found = {_name(path, folder): digest for path, digest in own.items()}
            if wanted != found:
                raise StoreError(f"the files in {folder} are not as they were written")
        state = read_json(folder / "state.json")
        lengths = state.pop("lengths", None) if isinstance(state, dict) else None
        if not isinstance(lengths, dict):
            raise StoreError(f"{folder / 'state.json'} is not a checkpoint's")
        for name, length in lengths.items():
            path = self.folder / name
            size = path.stat().st_size if path.name == name and path.exists() else -1
            if type(length) is not int or not 0 <= length <= size:
                raise StoreError(f"{path} is shorter than {folder} says, {size} of {length} bytes")
        return state, lengths

    def clear_logs(self) -> None:
        """Delete the logs of a run that was killed before its first checkpoint."""
        for path in self._logs():
            path.unlink()

    def version_path(self, version: str) -> Path:
        """Where the weights of a version are kept."""
        return self.folder / "versions" / f"{version.rsplit('@', 1)[-1]}.safetensors"

    def keep_versions(self, versions: Sequence[str]) -> None:
        """Delete the weights of every other version."""
        wanted = {self.version_path(version) for version in versions}
        for path in (self.folder / "versions").glob("*.safetensors"):
            if path not in wanted:
                path.unlink()

    def _checkpoints(self) -> list[int]:
        names = [path.name for path in (self.folder / "checkpoints").glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def _lengths(self) -> dict[str, int]:
        return {path.name: flush(path) for path in self._logs()}

    def _logs(self) -> list[Path]:
        paths = (self.folder / f"{name}.jsonl" for name in LOGS)
        return [path for path in paths if path.exists()]


@dataclass(frozen=True)
class Difference:
    """Where two runs differ.

    Attributes:
        name: The field's dotted name; a setting's own name.
        before: Its value in the folder.
        now: Its value in the run that is to be done.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        if isinstance(self.before, list) and isinstance(self.now, list):  # ids of examples
            return f"{self.name} differs ({len(self.before)} there, {len(self.now)} here)"
        return f"{self.name} differs ({_short(self.before)} there, {_short(self.now)} here)"


def free_bytes(folder: Path) -> int:
    """Bytes that a run's checkpoints and weights may take where they are or are to be.

    Those it has are counted; what else is in the folder, such as other runs at work, is not.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    roots = (folder / "checkpoints", folder / "versions")
    own = sum(p.stat().st_size for root in roots for p in root.rglob("*") if p.is_file())
    return shutil.disk_usage(there).free + own


def begun_budget(folder: Path) -> BudgetConfig:
    """The budget of the run in a folder, as it was last given.

    Raises:
        StoreError: Its ``config.json`` cannot be read, or is damaged.
    """
    path = folder / "config.json"
    found = read_json(path)
    try:
        return BudgetConfig(**without_removed(found["settings"])["budget"])
    except (AttributeError, ConfigError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def delete_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run that has ended and that nothing goes on from.

    With the optimizer's state they take 12 to 16 bytes a trained parameter each. The logs, the
    result and the best weights stay.
    """
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Difference]:
    """Where the ``config.json`` of a run folder and that of a run differ in what may not change."""
    return _differences(_comparable(found), _comparable(wanted))


def another_run(folder: Path, changed: Sequence[Difference]) -> StoreError:
    """The error for a folder that holds a run which differs."""
    more = f"; and {len(changed) - DIFFERENCES} more" if len(changed) > DIFFERENCES else ""
    return StoreError(
        f"the run folder {folder} holds another run: {'; '.join(map(str, changed[:DIFFERENCES]))}"
        f"{more}. Give what is there to go on with it, choose another folder, or delete this one "
        "to start over"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for a run to go on."""
    plain = {key: value for key, value in config.items() if key not in NOT_COMPARED}
    settings = plain.get("settings")
    if isinstance(settings, dict):
        settings = without_removed(settings)
        schedule = settings.get("slow", {}).get("lr_scheduler_type", "constant")
        cycles = settings.pop("budget", {}).get("max_cycles")
        if not str(schedule).startswith("constant"):
            settings["budget"] = {"max_cycles": cycles}
        plain["settings"] = {
            part: {name: value for name, value in own.items() if name not in MAY_CHANGE}
            for part, own in settings.items()
        }
    if isinstance(metric := plain.get("metric"), dict):
        plain["metric"] = metric.get("name")
    if isinstance(program := plain.get("program"), dict):
        plain["program"] = {key: value for key, value in program.items() if key not in OF_CODE}
    return plain


def _changes_of_code(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What has changed in the metric and the program of a run, which have their names still.

    It is told, and does not make another run of it: a metric that counts, or a program with the
    time in it, would be another one every time.
    """
    told = []
    for name in CODE:
        before, now = (config.get(name) for config in (found, wanted))
        if not (isinstance(before, dict) and isinstance(now, dict)):
            continue
        known = [key for key in OF_CODE if key in before and key in now]
        if "source" in known and before["source"] != now["source"]:
            told.append(f"the {name}'s source has changed")
        elif "values" in known and before["values"] != now["values"]:
            changed = _differences(before["values"], now["values"], name)
            told.append("; ".join(map(str, changed[:DIFFERENCES])))
    return told


def _differences(found: Any, wanted: Any, name: str = "") -> list[Difference]:
    """Where two plain values differ, by the dotted names of the fields."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        own = re.sub(r"^settings\.\w+\.", "", name)
        return [] if found == wanted else [Difference(own, found, wanted)]
    later = ADDED_LATER if not name else ()
    keys = [k for k in sorted({*found, *wanted}) if k in found or k not in later]
    inside = [_differences(found.get(k), wanted.get(k), f"{name}.{k}" if name else k) for k in keys]
    return [difference for part in inside for difference in part]


_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_APPEND_NEWLINE


def _line(row: Any) -> bytes:
    try:
        return orjson.dumps(row, default=_fields_or_repr, option=_OPTIONS)
    except TypeError:  # halves of surrogate pairs, whole numbers of over 64 bits, odd keys
        return json.dumps(_without_classes(row), default=repr).encode() + b"\n"


def _fields_or_repr(value: Any) -> Any:
    return vars(value) if dataclasses.is_dataclass(value) else repr(value)


def _without_classes(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _without_classes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_classes(item) for item in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields for ``json``, which goes on to what is in them; nothing is copied."""
    if not dataclasses.is_dataclass(value):
        raise TypeError(f"{type(value).__name__} is not JSON")
    return vars(value)


def _name(path: Path, folder: Path) -> str:
    """A file's name within a folder, the same on every system."""
    return path.relative_to(folder).as_posix()


def _files_in(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not left_by_system(path.name))


def _refuse_links(folder: Path) -> None:
    """Deleting and cutting back follow a link to where it points, which is not the run's.

    What others keep beside the run's files, such as a tracker, is not looked at: nothing of it is
    read, cut back or deleted.
    """
    names = {".lock", "checkpoints", "versions", *(f"{name}.jsonl" for name in LOGS)}
    own = [path for path in folder.iterdir() if path.name in names or ".json" in path.suffixes]
    for path in (inner for top in own for inner in (top, *top.rglob("*"))):
        if path.is_symlink():
            raise StoreError(
                f"{path} is a link; a run folder holds its own files alone: put what it points to "
                "in its place, or choose another folder"
            )


def environment() -> dict[str, str]:
    """The versions a result depends on."""
    names = ("fst-dspy", "dspy", "gepa", "torch", "transformers", "trl", "peft")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}
