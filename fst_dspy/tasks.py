"""Finding and loading task files: a Python file with ``load(seed) -> fst_dspy.Task``."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
        f"load(seed) -> fst_dspy.Task, or one of: {', '.join(known)}. Arguments for load follow a "
        "colon as name=value, such as triage:policy=1,train=50"
    )


def load_task(program: str, seed: int = 0) -> Task:
    """Import a program's file and call its ``load(seed)``. This runs the file's code.

    Args:
        program: The file's path, or the name of a program that comes with the package. Arguments
            for ``load`` may follow: ``"triage:policy=1,train=50"`` calls
            ``load(seed, policy=1, train=50)``. Values are JSON where they can be read as such.
        seed: Seed of the task.

    Raises:
        ProgramError: There is no such file, it has no ``load``, ``load`` does not take the
            arguments, or it returns no ``Task``.
    """
    name, arguments = split_arguments(program)
    path = find_program(name)
    spec = importlib.util.spec_from_file_location(f"fst_program_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes defined in the file can be found again by name
    spec.loader.exec_module(module)
    load = getattr(module, "load", None)
    if not callable(load):
        raise ProgramError(f"{path} has no function load(seed) -> fst_dspy.Task")
    _check_arguments(load, arguments, path)
    task = load(seed, **arguments)
    if not isinstance(task, Task):
        raise ProgramError(f"load(seed) in {path} must return a fst_dspy.Task, got {task!r}")
    return task


def split_arguments(program: str) -> tuple[str, dict[str, Any]]:
    """``"triage:policy=1,train=50"`` as ``("triage", {"policy": 1, "train": 50})``.

    A colon or comma counts only before ``name=``: paths may hold colons, lists commas.
    """
    if Path(program).is_file():
        return program, {}
    name, *rest = re.split(r":(?=[A-Za-z_]\w*=)", program, maxsplit=1)
    pairs = re.split(r",(?=[A-Za-z_]\w*=)", rest[0]) if rest else []
    return name, {key: read_value(text) for key, _, text in (p.partition("=") for p in pairs)}


def read_value(text: str) -> Any:
    """The text as JSON, where it can be read as such; else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _check_arguments(load: Callable[..., Any], arguments: Mapping[str, Any], path: Path) -> None:
    """Check names, and types where a default tells them, before any work is done."""
    parameters = list(inspect.signature(load).parameters.values())
    if not parameters:
        raise ProgramError(f"load in {path} must take the seed: load(seed) -> fst_dspy.Task")
    seed, *others = parameters
    known = {p.name: p.default for p in others if p.kind is not p.VAR_KEYWORD}
    takes_any = len(known) < len(others)
    for name, value in arguments.items():
        if name == seed.name or (name not in known and not takes_any):
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ProgramError(
                f"load in {path} takes no argument {name!r}{hint} beside the seed; "
                f"it takes: {', '.join(known) or 'none'}"
            )
        default = known.get(name)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if default is None or default is inspect.Parameter.empty or isinstance(value, wanted):
            continue
        raise ProgramError(
            f"load in {path}: {name} must be a {type(default).__name__}, got {value!r}"
        )
