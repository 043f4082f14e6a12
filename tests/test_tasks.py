"""Loading tasks by name, with arguments for their ``load``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fst_dspy.cli import app
from fst_dspy.errors import DataError, ProgramError
from fst_dspy.tasks import load_task, split_arguments

TAKES_ARGUMENTS = """
import dspy
from fst_dspy import Task


def load(seed, words=("a",), rate=0.5, label="x", **others):
    name = f"{seed} {words} {rate} {label} {others}"
    return Task(name, dspy.Predict("q -> a"), lambda *_: 0, [], [], [])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "takes.py"
    path.write_text(TAKES_ARGUMENTS)
    return path


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("triage", ("triage", {})),
        ("triage:policy=1,train=50", ("triage", {"policy": 1, "train": 50})),
        ("C:\\mine\\p.py:a=1", ("C:\\mine\\p.py", {"a": 1})),
        ("p.py:a=[1, 2],b=x:y,c=", ("p.py", {"a": [1, 2], "b": "x:y", "c": ""})),
        ("p.py:a=true,b=1e-3,c=1,2", ("p.py", {"a": True, "b": 1e-3, "c": "1,2"})),
        ("gym:codeio", ("gym:codeio", {})),
    ],
)
def test_arguments_follow_the_name(text: str, split: tuple[str, dict]) -> None:
    assert split_arguments(text) == split


def test_a_file_whose_name_looks_like_arguments_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "odd:a=1.py"
    path.write_text(TAKES_ARGUMENTS)
    assert load_task(str(path)).name.startswith("0 ('a',) 0.5")


def test_load_gets_the_arguments_and_the_seed(program: Path) -> None:
    task = load_task(f"{program}:rate=1,label=y,more=[1,2]", seed=7)
    assert task.name == "7 ('a',) 1 y {'more': [1, 2]}"


def test_a_packaged_program_takes_its_own_arguments() -> None:
    task = load_task("triage:policy=2,train=5,val=3,test=4", seed=1)
    assert task.name == "triage-2"
    assert [len(task.trainset), len(task.valset), len(task.testset)] == [5, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("triage:polciy=1", r"takes no argument 'polciy' \(did you mean 'policy'\?\)"),
        ("triage:seed=1", "takes no argument 'seed'"),
        ("triage:train=many", "train must be of type int, got 'many'"),
        ("{program}:label=3", "label must be of type str, got 3"),
        ("{program}:seed=3", "takes no argument 'seed'"),
        ("triage:policy", "name=value"),
    ],
)
def test_arguments_that_load_cannot_take_are_refused(
    text: str, message: str, program: Path
) -> None:
    with pytest.raises(ProgramError, match=message):
        load_task(text.format(program=program))


def test_load_without_a_seed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.py"
    path.write_text("def load(): ...")
    with pytest.raises(ProgramError, match="must take the seed"):
        load_task(str(path))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="fewer than 0 tickets"):
        load_task("triage:train=-5")
    with pytest.raises(DataError, match="there are 400 of each"):
        load_task("triage:train=9000")


def test_the_command_line_says_what_is_wrong() -> None:
    result = CliRunner().invoke(app, ["compile", "triage:polciy=1"])
    assert result.exit_code == 1
    said = " ".join(result.output.replace("│", " ").split())
    assert "did you mean 'policy'?" in said and "Traceback" not in said
