"""The order of the package: what each folder may import, and that nothing goes round in circles.

Imports inside functions and under ``TYPE_CHECKING`` count like any other: they say as well what
one has to know to read a file.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "fst_dspy"
NAME = PACKAGE.name

BASE = "errors kinds display embedded"
TOP = f"{BASE} types config settings settings_help distributed files tasks pretrained"
STUDENT = f"{TOP} student"

ORDER = {
    "errors": "",
    "kinds": "",
    "display": "",
    "embedded": "",
    "types": BASE,
    "config": BASE,
    "distributed": BASE,
    "files": BASE,
    "settings": f"{BASE} config",
    "settings_help": f"{BASE} config",
    "tasks": f"{BASE} types config distributed files",
    "pretrained": f"{BASE} files",
    "student": TOP,
    "grammar": f"{BASE} types",
    "model": f"{TOP} grammar",
    "smollm2": TOP,
    "slow": f"{TOP} model",
    "run": STUDENT,
    "lm": f"{STUDENT} grammar model slow",
    "rollouts": f"{STUDENT} model lm",
    "agents": f"{STUDENT} rollouts",
    "results": f"{STUDENT} run",
    "bundle": f"{STUDENT} model run lm results",
    "fast": f"{STUDENT} run rollouts",
    "plan": f"{STUDENT} model slow run",
    "loop": f"{STUDENT} model slow run lm rollouts results fast plan",
    "optimizer": f"{STUDENT} run lm rollouts results fast bundle loop",
    "measures": f"{STUDENT} model lm rollouts results bundle",
    "litellm_provider": f"{STUDENT} model lm rollouts results bundle",
    "distill": f"{STUDENT} model slow run lm rollouts results bundle fast loop optimizer",
    "study": f"{STUDENT} model slow run lm rollouts results bundle fast loop plan optimizer",
    "continual": f"{STUDENT} model slow run lm rollouts results bundle fast loop optimizer",
    "experiments": f"{STUDENT} model slow run lm rollouts results bundle fast loop optimizer"
    " measures litellm_provider distill study continual",
    "report": f"{STUDENT} model slow run lm rollouts results bundle fast",
    "cli": f"{STUDENT} model slow run lm rollouts results bundle fast loop optimizer"
    " measures litellm_provider distill study continual experiments report plan",
    "__main__": "cli",
}
"""Files and folders of the package, and what each may import beside itself: nothing from below."""

SAVED = {"local_lm": "lm", "engine": "lm"}
"""Files of one line, whose paths programs hold that were saved by earlier versions."""

BARE = "grammar student model slow run lm rollouts agents results bundle fast fast/gepa"
BARE += " fast/proposers loop plan distill continual pretrained smollm2"
BARE += " experiments/findings experiments/protocols"
"""Folders whose ``__init__.py`` is a docstring: to import one file of theirs imports that one."""

FILES_AT_THE_TOP = 13
FILES_IN_A_FOLDER = 16


@cache
def files() -> dict[str, Path]:
    """The package's files by module name; a checkout has no ``programs`` in it, a wheel has."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] != "programs":
            found[".".join((NAME, *parts)).removesuffix(".__init__")] = path
    return found


def place_of(module: str) -> str:
    """The file at the top, or the folder, that a module is or is in; empty for the package."""
    return module.removeprefix(NAME).lstrip(".").partition(".")[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(module: str) -> list[tuple[str, str | None]]:
    """What a file imports of the package: modules, with the name taken from each where it is one.

    Names of modules that ``import_module`` is given count too.
    """
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(parsed(files()[module])):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relative to itself"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner, None) if inner in files() else (node.module, alias.name))
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found += [(a.value, None) for a in node.args if isinstance(a, ast.Constant)]
    return [(name, taken) for name, taken in found if name.partition(".")[0] == NAME]


@cache
def graph() -> dict[str, set[str]]:
    """The files that each file imports. The package itself loads its names when they are used."""
    return {
        module: {name for name, _ in imports(module) if name in files()} - {NAME, module}
        for module in files()
        if module != NAME
    }


def circles() -> Iterator[list[str]]:
    """Files that reach each other by imports: Tarjan's strongly connected components."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        number[module] = lowest[module] = len(number)
        path.append(module)
        for other in sorted(graph()[module]):
            if other not in number:
                yield from visit(other)
            if other in path:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == number[module]:
            members = path[path.index(module) :]
            del path[-len(members) :]
            if len(members) > 1:
                yield sorted(members)

    for module in graph():
        if module not in number:
            yield from visit(module)


def test_the_order_has_a_row_for_everything_and_looks_up_only() -> None:
    at_the_top = {place_of(module) for module in files() if module != NAME}
    assert at_the_top - set(SAVED) <= set(ORDER), "add it to ORDER, where it belongs"
    rows = list(ORDER)
    below = {row: set(ORDER[row].split()) - set(rows[:n]) for n, row in enumerate(rows)}
    assert not {row: names for row, names in below.items() if names}


@pytest.mark.parametrize("module", [m for m in files() if m != NAME])
def test_a_file_imports_from_its_folder_and_those_above(module: str) -> None:
    own = place_of(module)
    allowed = {own, *ORDER.get(own, SAVED.get(own, "")).split()}
    wrong = sorted({name for name, _ in imports(module) if place_of(name) not in allowed | {""}})
    assert not wrong, f"{own} may import {sorted(allowed - {own})}, but no {wrong}"
    # The package's own names come from every row.
    assert {taken for name, taken in imports(module) if name == NAME} <= {None, "__version__"}


def test_no_two_files_import_each_other() -> None:
    pairs = [f"{a} and {b}" for a in graph() for b in graph()[a] if a < b and a in graph()[b]]
    assert not pairs, "\n".join(pairs)


def test_no_imports_go_round_in_a_circle() -> None:
    found = [", ".join(members) for members in circles()]
    assert not found, "\n".join(found)


def test_private_names_stay_in_their_file() -> None:
    taken = []
    for module, path in files().items():
        names = [f"{name}.{inner}" for name, inner in imports(module) if inner]
        modules = {
            alias.asname or alias.name
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" in files()
        }
        names += [
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
        ]
        last = {name: name.rpartition(".")[2] for name in names}
        taken += [
            f"{module} takes {name}"
            for name, own in last.items()
            if own.startswith("_") and not own.startswith("__")
        ]
    assert not taken, "\n".join(taken)


def test_folders_are_small_enough_to_be_read() -> None:
    sizes: dict[str, int] = {}
    for path in files().values():
        folder = str(path.parent.relative_to(PACKAGE))
        sizes[folder] = sizes.get(folder, 0) + 1
    exempt = {"__init__", "__main__", *SAVED}
    at_the_top = {p.stem for p in PACKAGE.glob("*.py")} - exempt
    assert len(at_the_top) <= FILES_AT_THE_TOP
    del sizes["."]
    assert not {folder: size for folder, size in sizes.items() if size > FILES_IN_A_FOLDER}


@pytest.mark.parametrize("folder", BARE.split())
def test_a_folder_is_imported_at_no_cost(folder: str) -> None:
    (docstring,) = parsed(PACKAGE / folder / "__init__.py").body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


LIGHT = """
import importlib, sys
for module, heavy in {}:
    importlib.import_module(module)
    print(module, sorted(heavy & set(sys.modules)))
"""


def test_what_is_heavy_is_imported_where_it_is_used() -> None:
    """In one process: what a module needs all the same, those after it may have."""
    modules = [
        ("fst_dspy", {"dspy", "torch", "optuna", "matplotlib", "pydantic"}),
        ("fst_dspy.cli", {"dspy", "torch", "optuna", "matplotlib", "pydantic"}),
        ("fst_dspy.slow.advantage", {"trl"}),
        ("fst_dspy.results.result", {"matplotlib", "trl", "optuna"}),
    ]
    code = LIGHT.format(modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{module} []" for module, _ in modules], done.stderr


def test_a_row_of_the_drawing_of_folders_imports_from_rows_above_it_alone() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^ ?\d+ {2,}(.*)$", page, re.MULTILINE)
    row_of = {
        name: number
        for number, row in enumerate(rows)
        for name in re.findall(r"(\w+)(?:\.py|/)", row)
    }
    assert row_of.keys() == ORDER.keys() - {"__main__"}
    for name, imported in ORDER.items():
        if name != "__main__":
            assert [one for one in imported.split() if row_of[one] >= row_of[name]] == [], name
