import io
import json
import os
import signal
import subprocess
import sys

import dspy
import pytest
from helpers import wait_for
from rich.panel import Panel
from rich.text import Text as RichText
from typer.testing import CliRunner

import fst_dspy
from fst_dspy.cli import app
from fst_dspy.cli.options import (
    ARM_NAMES,
    AXIS_NAMES,
    MEASURE_NAMES,
    USUAL_ARM_NAMES,
    Tracker,
    completed,
    parse_settings,
)
from fst_dspy.display import Terminal, visible
from fst_dspy.errors import ProgramError
from fst_dspy.experiments import ARMS, AXES, USUAL_ARMS
from fst_dspy.run.tracker_kinds import KINDS
from fst_dspy.study.objective import DIRECTIONS
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


def test_help_begins_with_what_one_begins_with():
    result = run("--help")
    assert result.exit_code == 0
    places = [result.output.index(word) for word in ("Start here", "│ compile", "│ demo", "│ tune")]
    assert places == sorted(places)


def test_the_version_names_what_results_depend_on():
    result = run("--version")
    assert result.exit_code == 0 and result.output.startswith(f"fst {fst_dspy.__version__} (dspy ")


def test_what_compile_found_can_be_had_as_json(program, tiny_qwen3, tmp_path):
    out = tmp_path / "run"
    result = run(
        "compile", program, "--model", tiny_qwen3, "--out", out, "--json", "--seed", 3, *settings()
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    kept = json.loads((out / "quadrants.json").read_text())
    pair = {"version": found["best"]["weights"], "candidate_id": found["best"]["candidate"]}
    assert kept == {**found["test_scores"], "pair": pair}
    assert found["seed"] == 3 and found["run_folder"] == str(out)
    assert found["rollouts"]["slow"] > 0 and "cycle   1" in result.stderr


def test_a_new_program_runs_as_it_stands(tiny_qwen3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("init", "routing")
    assert done.exit_code == 0 and "fst compile routing.py --out runs/routing" in done.output
    hides = run("init", "json")
    assert hides.exit_code == 1 and "would hide" in hides.output
    again = run("init", "routing")
    assert again.exit_code == 1 and "is there already" in again.output
    task = load_task("routing.py", 1)
    sets = [{one.ticket for one in part} for part in (task.trainset, task.valset, task.testset)]
    assert len(sets[0] | sets[1] | sets[2]) == sum(map(len, sets)) == 48
    gold = task.trainset[0]
    told = task.metric(gold, dspy.Prediction(queue=gold.queue))
    assert told.score == 1.0 and gold.queue in told.feedback
    assert task.metric(gold, dspy.Prediction(queue="?")).score == 0.0
    done = run("compile", "routing.py", "--model", tiny_qwen3, *settings())
    assert done.exit_code == 0, done.output


def test_ctrl_c_is_answered_at_once_and_says_how_to_go_on(program, tiny_qwen3, tmp_path):
    endless = [*settings(), "--set", "max_cycles=10000"]
    arguments = ["compile", program, "--model", tiny_qwen3, "--out", tmp_path / "run", *endless]
    command = [sys.executable, "-m", "fst_dspy", *map(str, arguments)]
    output, log = [], tmp_path / "log"
    places = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.getcwd()])}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=places)
    try:
        wait_for(lambda: "cycle   1" in log.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=240) == 130
    finally:
        process.kill()
        output = log.read_text()
    assert "stopping after this step; press Ctrl-C again to stop now" in output
    assert f"up to this step is saved in {tmp_path / 'run'}. To go on:\n  fst compile" in output
    assert "Traceback" not in output


def test_names_that_are_written_twice_are_the_same():
    assert tuple(ARMS) == ARM_NAMES and USUAL_ARMS == USUAL_ARM_NAMES and tuple(AXES) == AXIS_NAMES
    assert set(Tracker) == set(KINDS)
    assert tuple(DIRECTIONS) == MEASURE_NAMES


def test_the_last_of_several_names_is_completed():
    assert completed(ARM_NAMES)("fst,rl_o") == ["fst,rl_only"]
    assert completed(ARM_NAMES)("seq") == [name for name in ARM_NAMES if name.startswith("seq")]


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


def test_help_can_be_read_in_sixty_columns():
    for known in app.registered_commands:
        name = known.name or known.callback.__name__
        done = CliRunner(env={"COLUMNS": "60"}).invoke(app, [name, "--help"])
        lines = done.output.splitlines()
        assert done.exit_code == 0 and max(map(len, lines)) <= 60, name
        assert not [line for line in lines if "…" in line], name  # a name or word that was cut
