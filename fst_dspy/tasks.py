"""Finding and loading task files: a Python file with ``load(seed) -> fst_dspy.Task``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from fst_dspy.errors import ProgramError
from fst_dspy.types import Task


def programs_folder() -> Path:
    """The programs that come with the package: inside the wheel, or beside it in a checkout."""
    packaged = Path(__file__).parent / "programs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "programs"


def find_program(name_or_path: str) -> Path:
    """The file of a program, given its path, or the name of one that comes with the package.

    Raises:
        ProgramError: There is no such file.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path.resolve()
    packaged = programs_folder() / f"{path.stem}.py"
    if packaged.is_file() and (path.parent == Path(".") or path.parent.name == "programs"):
        return packaged
    known = sorted(p.stem for p in programs_folder().glob("*.py") if not p.stem.startswith("_"))
    raise ProgramError(
        f"no program at {name_or_path!r}; give the path of a Python file with "
        f"load(seed) -> fst_dspy.Task, or one of: {', '.join(known)}"
    )


def load_task(name_or_path: str, seed: int = 0) -> Task:
    """Import a program's file and call its ``load(seed)``. This runs the file's code.

    Raises:
        ProgramError: There is no such file, it has no ``load``, or ``load`` returns no ``Task``.
    """
    path = find_program(name_or_path)
    name = f"fst_program_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes defined in the file can be found again by name
    spec.loader.exec_module(module)
    load = getattr(module, "load", None)
    if not callable(load):
        raise ProgramError(f"{path} has no function load(seed) -> fst_dspy.Task")
    task = load(seed)
    if not isinstance(task, Task):
        raise ProgramError(f"load(seed) in {path} must return a fst_dspy.Task, got {task!r}")
    return task
