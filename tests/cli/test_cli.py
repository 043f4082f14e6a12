import io
import json
import subprocess
import sys

import pytest
from rich.panel import Panel
from rich.text import Text as RichText
from typer.testing import CliRunner

from fst_dspy.cli import app
from fst_dspy.cli.options import parse_settings
from fst_dspy.display import Terminal, visible
from fst_dspy.errors import ProgramError
from fst_dspy.tasks import load_task

pytestmark = pytest.mark.slow

PROGRAM = "from study_program import load"

SMALL = "max_cycles=1 steps_per_cycle=1 group_size=2 population_size=2 problems_per_step=2"
SMALL += " first_cycle_iterations=1 minibatch_size=2 max_tokens=6 val_size=2"


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "echo_program.py"
    path.write_text(PROGRAM)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings():
    return [part for setting in SMALL.split() for part in ("--set", setting)]


def test_compile_reports_quadrants_and_writes_the_run_folder(program, tiny_qwen3, tmp_path):
    out = tmp_path / "run"
    result = run("compile", program, "--model", tiny_qwen3, "--out", out, *settings())
    assert result.exit_code == 0, result.output
    assert "evolved context" in result.output and "rollouts (fast" in result.output
    quadrants = json.loads((out / "quadrants.json").read_text())
    assert quadrants["examples"] == 4
    assert json.loads((out / "result.json").read_text())["arm"] == "fst"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.py",), "no program at"),
        (("{program}", "--model", "./nowhere"), "nowhere"),
        (("{program}", "--model", "{model}", "--set", "group_sise=4"), "group_size"),
        (("{program}", "--model", "{model}", "--arm", "rl"), "arm must be"),
    ],
)
def test_bad_input_ends_with_one_clear_message(program, tiny_qwen3, arguments, message):
    filled = [a.format(program=program, model=tiny_qwen3) for a in arguments]
    result = run("compile", *filled)
    assert result.exit_code == 1
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_settings_are_json_where_they_can_be():
    assert parse_settings(["a=1", "b=1e-4", "c=true", "d=cispo"]) == {
        "a": 1,
        "b": 1e-4,
        "c": True,
        "d": "cispo",
    }
    result = run("compile", "triage", "--set", "learning_rate")
    assert result.exit_code == 2


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0 and "compile" in result.output and "demo" in result.output


def test_a_file_without_load_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1")
    with pytest.raises(ProgramError, match="has no function load"):
        load_task(str(path))
    path.write_text("def load(seed): return 3")
    with pytest.raises(ProgramError, match="must return"):
        load_task(str(path))


HOSTILE = "[/x]\x1b]52;c;aGk=\x07\x1b[2J\u202e[red]"


def test_names_and_prompts_are_shown_as_they_stand(tiny_qwen3, tmp_path):
    path = tmp_path / "hostile_program.py"
    path.write_text(
        f"import dataclasses\n{PROGRAM} as plain\n"
        f"load = lambda seed: dataclasses.replace(plain(seed), name={HOSTILE!r})\n"
    )
    out = tmp_path / "[/nothing]run[red]"
    done = run("compile", path, "--model", tiny_qwen3, "--out", out, *settings())
    assert done.exit_code == 0, done.output
    shown = done.output.replace("\n", "")
    assert "[/x]\u241b]52;c;aGk=\u2407\u241b[2J\ufffd[red]" in shown
    assert "[/nothing]run[red]" in shown
    assert not set(done.output) & set("\x1b\x07\u202e")


def test_an_error_is_shown_as_it_stands():
    done = run("compile", f"{HOSTILE}.py")
    assert done.exit_code == 1 and "[/x]" in done.output and "\x1b" not in done.output
    done = run("watch", HOSTILE)
    assert done.exit_code == 1 and "[/x]" in done.output and "\x1b" not in done.output


def test_a_terminal_does_nothing_a_text_says():
    file = io.StringIO()
    terminal = Terminal(file=file, width=80, force_terminal=True, color_system=None)
    terminal.print(Panel(RichText(HOSTILE)), HOSTILE, ":smile:", "one\ttwo")
    assert not set(file.getvalue()) & set("\x1b\x07\u202e")
    assert ":smile:" in file.getvalue() and "[red]" in file.getvalue()
    assert visible("a\r\nb\tc\x85\ud800") == "a\nb\tc\ufffd\ufffd"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("fst_dspy.cli", {"dspy", "torch", "optuna", "matplotlib", "pydantic"}),
        ("fst_dspy.results.result", {"matplotlib", "trl", "optuna"}),
    ],
)
def test_what_is_not_needed_is_not_imported(module, heavy):
    code = f"import sys, {module}; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
