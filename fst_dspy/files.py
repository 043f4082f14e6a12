"""Files written whole and read safely."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic_core import to_jsonable_python
from safetensors import SafetensorError

from fst_dspy.errors import FSTError, StoreError

_NUMBERS = ("b", "i", "u", "f")  # numpy's kinds of them


def path_given(path: str | os.PathLike[str]) -> Path:
    """A file or folder that a user named; it stays the same one wherever the program goes.

    A program may change the working directory, which is that of the whole process. ``~`` is the
    home folder.
    """
    return Path(path).expanduser().absolute()


def folder_given(path: str | os.PathLike[str] | None) -> Path | None:
    """As ``path_given``, where none may be named."""
    return None if path is None else path_given(path)


def shown_folder(path: str | os.PathLike[str]) -> str:
    """A folder as one who is in the working directory names it, where it lies there."""
    folder, here = Path(path), Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)


def left_by_system(name: str) -> bool:
    """Whether a file of that name is none of ours: systems leave them in folders they have shown.

    So do macOS (``.DS_Store``, and ``._name`` beside what is copied), Windows and KDE.
    """
    return name in (".DS_Store", "Thumbs.db", "desktop.ini", ".directory") or name.startswith("._")


def as_plain(row: Any) -> Any:
    """A dataclass (or a dict) as plain values ready for JSON."""
    return dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row  # type: ignore[arg-type]


def plain_json(value: Any) -> Any:
    """A value as JSON would give it back, typed parts as DSPy writes them: by value, in ISO form.

    Raises:
        TypeError, ValueError, RecursionError: A part has no such form.
    """
    return json.loads(json.dumps(_with_plain_keys(value), default=_typed_as_plain))


def _with_plain_keys(value: Any) -> Any:
    """A value whose dicts have keys that JSON has: of others, such as enums, it asks nobody."""
    if type(value) is dict:
        return {
            key if isinstance(key, str) else _plain_key(key): _with_plain_keys(item)
            for key, item in value.items()
        }
    return list(map(_with_plain_keys, value)) if type(value) in (list, tuple) else value


def _plain_key(key: Any) -> str:
    """A dict's key as a text."""
    (text,) = to_jsonable_python({key: None})
    return text


def _typed_as_plain(value: Any) -> Any:
    """Enums, dates, pydantic models, dataclasses and the like; DSPy's examples, numpy's numbers."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind in _NUMBERS and value.shape == ():
        return value.item()
    if isinstance(value, set | frozenset):  # whose order is another in every process
        return sorted(map(plain_json, value), key=json.dumps)
    return (
        _with_plain_keys(value.toDict()) if hasattr(value, "toDict") else to_jsonable_python(value)
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StoreError: It is missing or broken.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read a JSON-lines file; a last line that was cut off by a crash is left out.

    Raises:
        StoreError: It cannot be read, or a line is broken.
    """
    number = 0
    try:
        if not path.exists():
            return
        with open(path, "rb") as file:
            for line in file:
                number += 1
                if line.endswith(b"\n"):
                    yield json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"cannot read {path}, line {number}: {error}") from error


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, flush it to disk and rename it into place."""

    def opened(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            write(file)

    write_through(path, opened)


def write_through(path: Path, write: Callable[[Path], Any]) -> None:
    """As ``write_atomically``, where a library writes the file under the name it is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> int:
    """Flush a file or folder to disk, and return its length in bytes."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return 0
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and the like into a ``StoreError`` that says what to do."""
    try:
        yield
    except FSTError:  # some are errors of the system too, of a model say, and have their own words
        raise
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise StoreError(
            f"cannot write to {folder}: {reason}; what was written before is intact: make room or "
            "fix the rights, then start again"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a file that is missing, damaged or of something else into a ``StoreError``."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
