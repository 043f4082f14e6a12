"""The run folder: what a compile writes, and how a killed one goes on.

Layout::

    config.json        settings, seed, arm, versions: written once
    cycles.jsonl       one CycleRecord a line
    rollouts.jsonl     one rollout a line, with its text, reward and feedback
    checkpoints/N/     all that the loop needs to go on, N counting up
    versions/X.safetensors   weights worth keeping: the best on the validation set
    result.json        the outcome, once the run has ended

Every file that is read again is written to a temporary name, flushed to disk and renamed, so a
half-written one is never picked up. Each checkpoint remembers how long the ``.jsonl`` files were;
resuming cuts them back to that length, so nothing is recorded twice.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from fst_dspy.config import without_removed
from fst_dspy.errors import StoreError
from fst_dspy.files import flush, read_json, read_jsonl, write_atomically
from fst_dspy.student.candidate import plain_value

SCHEMA_VERSION = 1
KEPT_CHECKPOINTS = 2


class RunStore:
    """One run folder, locked for this process until ``close``.

    Raises:
        StoreError: The folder cannot be created or written, or another process holds it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        with _clear_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] | None = open(self.folder / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StoreError(
                f"another process is writing to the run folder {self.folder}; "
                "wait for it or choose another folder"
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write ``config.json``, or check that the folder's own says the same.

        Raises:
            StoreError: The folder holds a run with other settings, data or program.
        """
        path = self.folder / "config.json"
        wanted = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **config}))
        if not path.exists():
            self.write_json("config.json", wanted)
            return
        found = read_json(path)
        if "settings" in found:
            found["settings"] = without_removed(found["settings"])
        changed = [
            key
            for key in sorted({*wanted, *found})
            if key != "environment" and wanted.get(key) != found.get(key)
        ]
        if changed:
            raise StoreError(
                f"the run folder {self.folder} holds another run: {', '.join(changed)} "
                f"{'differs' if len(changed) == 1 else 'differ'}; choose another folder, or delete "
                "this one to start over"
            )

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in the folder, atomically."""
        with _clear_errors(self.folder):
            write_atomically(
                self.folder / name, lambda file: file.write(json.dumps(value, indent=1).encode())
            )

    def append(self, name: str, rows: Sequence[Any]) -> None:
        """Append rows, dataclasses or dicts that may hold some, to ``<name>.jsonl``.

        What a program puts into its fields may be anything; what JSON cannot hold is written as its
        ``repr``.
        """
        lines = b"".join(map(_line, rows))
        with _clear_errors(self.folder), open(self.folder / f"{name}.jsonl", "ab") as file:
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
        number = max(self._checkpoints(), default=-1) + 1
        root = self.folder / "checkpoints"
        temporary = root / f"{number}.tmp"
        with _clear_errors(self.folder):
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "weights").mkdir(parents=True)
            write_weights(temporary / "weights")
            whole = {**state, "lengths": self._lengths()}
            text = json.dumps(whole, default=_fields, check_circular=False)
            (temporary / "state.json").write_text(text)
            for path in (*sorted(temporary.rglob("*")), temporary):
                flush(path)
            os.replace(temporary, root / str(number))
            flush(root)
            for old in self._checkpoints()[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(root / str(old), ignore_errors=True)

    def latest(self) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint, as its state and weights folder, after cutting the logs back."""
        numbers = self._checkpoints()
        if not numbers:
            return None
        folder = self.folder / "checkpoints" / str(numbers[-1])
        state = read_json(folder / "state.json")
        lengths = state.pop("lengths")
        for path in self.folder.glob("*.jsonl"):
            # A log that was begun after the checkpoint is cut back to nothing.
            with open(path, "a") as file:
                file.truncate(lengths.get(path.name, 0))
        return state, folder / "weights"

    def clear_logs(self) -> None:
        """Delete the logs of a run that was killed before its first checkpoint."""
        for path in self.folder.glob("*.jsonl"):
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
        return {path.name: flush(path) for path in sorted(self.folder.glob("*.jsonl"))}


_OPTIONS = orjson.OPT_NON_STR_KEYS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_APPEND_NEWLINE


def _line(row: Any) -> bytes:
    try:
        return orjson.dumps(row, default=_fields_or_repr, option=_OPTIONS)
    except TypeError:  # halves of surrogate pairs, whole numbers of over 64 bits, odd keys
        return json.dumps(_without_classes(row), default=_fields_or_repr).encode() + b"\n"


def _fields_or_repr(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return vars(value)
    plain = plain_value(value)  # a trace holds the objects that the program was given
    return repr(value) if plain is value else plain


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


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"cannot write to the run folder {folder}: {error.strerror or error}; "
            "what was written before is intact: make room or fix the rights, then start again"
        ) from error


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
