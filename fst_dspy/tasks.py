"""Finding and loading task files: a Python file with ``load(seed) -> fst_dspy.Task``."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fst_dspy.errors import FSTError, ProgramError
from fst_dspy.types import Task

NO_LOAD = (
    "{} has no function load(seed) -> fst_dspy.Task; `fst init` writes a file that has one, to "
    "fill in"
)


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
        if path.suffix != ".py":
            raise ProgramError(
                f"{path} is no Python file; a program is a .py file with "
                "load(seed) -> fst_dspy.Task"
            )
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


def check_program(program: str) -> None:
    """Check what can be seen of a program without running it.

    That is its file, that there is a ``load`` in it, and, where this is a plain function, whether
    it takes the arguments.

    Raises:
        ProgramError: There is no such file, it is not Python, or what else is wrong.
    """
    name, arguments = split_arguments(program)
    path = find_program(name)
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError, OSError) as error:
        raise ProgramError(f"{path} cannot be read as Python: {error}") from error
    binding = [node for node in ast.walk(tree) if _binds_load(node)]
    if not binding:
        raise ProgramError(NO_LOAD.format(path))
    (first, *others) = binding
    if isinstance(first, ast.FunctionDef) and not (others or first.decorator_list):
        _check_arguments(_parameters(first.args), arguments, path)


def _parameters(written: ast.arguments) -> list[inspect.Parameter]:
    """The parameters of a function that was not run; defaults that are no literals are left out."""
    plain = [*written.posonlyargs, *written.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(written.defaults))
    defaults = [*missing, *written.defaults, *written.kw_defaults]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD  # it matters here only that they have names
    found = [
        inspect.Parameter(argument.arg, kind, default=_literal(default))
        for argument, default in zip([*plain, *written.kwonlyargs], defaults, strict=True)
    ]
    if written.kwarg is not None:
        found.append(inspect.Parameter(written.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return found


def _literal(default: ast.expr | None) -> Any:
    try:
        return inspect.Parameter.empty if default is None else ast.literal_eval(default)
    except ValueError:
        return inspect.Parameter.empty


def _binds_load(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name == "load"
    if isinstance(node, ast.ImportFrom | ast.Import):
        return any((name.asname or name.name) in ("load", "*") for name in node.names)
    if isinstance(node, ast.Name):
        return node.id == "load" and isinstance(node.ctx, ast.Store)
    return isinstance(node, ast.Constant) and node.value == "load"  # setattr, globals()["load"]


def load_task(program: str, seed: int = 0) -> Task:
    """Import a program's file and call its ``load(seed)``. This runs the file's code.

    Args:
        program: The file's path, or the name of a program that comes with the package. Arguments
            for ``load`` may follow: ``"triage:policy=1,train=50"`` calls
            ``load(seed, policy=1, train=50)``. Values are JSON where they can be read as such.
        seed: Seed of the task.

    Raises:
        ProgramError: There is no such file, it cannot be imported, it has no ``load``, ``load``
            does not take the arguments, fails, or returns no ``Task`` with a metric.
    """
    name, arguments = split_arguments(program)
    path = find_program(name)
    spec = importlib.util.spec_from_file_location(f"fst_program_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # classes defined in the file can be found again by name
    with _told(f"{path} cannot be imported", path):
        spec.loader.exec_module(module)
    load = getattr(module, "load", None)
    if not callable(load):
        raise ProgramError(NO_LOAD.format(path))
    _check_arguments(list(inspect.signature(load).parameters.values()), arguments, path)
    with _told(f"load({seed}) in {path} failed", path):
        task = load(seed, **arguments)
    if not isinstance(task, Task):
        raise ProgramError(f"load(seed) in {path} must return a fst_dspy.Task, got {task!r}")
    if not callable(task.metric):
        raise ProgramError(
            f"the metric of the Task from {path} must be a function (gold, pred, ...) that returns "
            f"a score, got {task.metric!r}"
        )
    return task


@contextmanager
def _told(what: str, path: Path) -> Iterator[None]:
    """Say where in the user's file something went wrong; our own errors say it themselves."""
    try:
        yield
    except FSTError:
        raise
    except (Exception, SystemExit) as error:  # a script may end itself where it is imported
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f", line {line}" if line else ""
        raise ProgramError(f"{what}{where}: {type(error).__name__}: {error}") from error


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


def _check_arguments(
    parameters: Sequence[inspect.Parameter], arguments: Mapping[str, Any], path: Path
) -> None:
    """Check names, and types where a default tells them, before any work is done."""
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
            f"load in {path}: {name} must be of type {type(default).__name__}, got {value!r}"
        )
