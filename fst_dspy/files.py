"""Files written whole and read safely."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fst_dspy.errors import StoreError


def as_plain(row: Any) -> Any:
    """A dataclass (or a dict) as plain values ready for JSON."""
    return dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row  # type: ignore[arg-type]


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> int:
    """Flush a file or folder to disk, and return its length in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
