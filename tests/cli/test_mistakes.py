"""What people get wrong: the message names the cause, and says what to do."""

import json
import os
import subprocess
import sys

import dspy
import pytest
from helpers import Echo, questions, vowels
from tiny_compile import SETTINGS, raw_adapter  # noqa: F401
from typer.testing import CliRunner

from fst_dspy import FST, LocalLM
from fst_dspy.cli import app
from fst_dspy.cli.checks import check_same_run
from fst_dspy.cli.options import console
from fst_dspy.errors import ConfigError, DataError, MetricError, ProgramError

FILES = {
    "no_load.py": "x = 1",
    "broken.py": "def load(:",
    "notes.txt": "",
    "fails.py": "def load(seed):\n    return 1 / 0",
    "ends.py": "import sys\nsys.exit(3)\ndef load(seed): ...",
    "none.py": "from fst_dspy import Task\n"
    "def load(seed):\n    return Task('none', None, print, [], [], [])",
    "silent.py": "from fst_dspy import Task\n"
    "def load(seed):\n    return Task('silent', None, None, [], [], [])",
}

NO_HUB = "http://127.0.0.1:9"

EARLY = {
    "no such program": ("compile nosuch.py", "no program at 'nosuch.py'", "give the path of"),
    "no load": ("compile no_load.py", "no function load(seed)", "fst init"),
    "not Python": ("compile broken.py", "invalid syntax", "broken.py, line 1"),
    "not a .py file": ("compile notes.txt", "notes.txt is no Python file", ".py file with load"),
    "second program": ("plasticity triage nosuch", "no program at 'nosuch'", "one of: "),
    "load fails": (
        "compile fails.py",
        "load(0) in",
        "fails.py failed, line 2: ZeroDivisionError",
    ),
    "ends itself": ("compile ends.py", "ends.py cannot be imported, line 2", "SystemExit: 3"),
    "a name of the system's": (f"compile {'x' * 300}", "File name too long", "xxx"),
    "no such preset": ("compile triage --set auto=huge", "auto must be one of", "huge"),
    "no examples": ("compile none.py", "the trainset of none is empty", "must be examples"),
    "no metric": ("compile silent.py", "metric of the Task from", "must be a function"),
    "setting's name": ("compile triage --set grup_size=4", "'grup_size'", "mean 'group_size'"),
    "setting's type": (
        "compile triage --set group_size=many",
        "group_size must be a whole number",
        "got 'many' (str)",
    ),
    "setting's range": ("compile triage --set temperature=0", "temperature must be above 0", "got"),
    "settings that do not fit": (
        "compile triage --set group_size=7",
        "group_size (7) must be a multiple",
        "try group_size=8",
    ),
    "setting of an experiment": (
        "compare triage --set reuse=maybe",
        "reuse must be True or False",
        "got 'maybe' (str)",
    ),
    "no model folder": ("compile triage --model ./nosuch", "no model folder", 'give "embedded"'),
    "a folder without a model": (
        "compile triage --model empty",
        "empty holds no model",
        "save_pretrained",
    ),
    "no such model": (
        "compile triage --model no/such-model",
        "the Hugging Face hub cannot be reached",
        '"embedded"',
    ),
    "a file as model": ("compile triage --model notes.txt", "notes.txt is a file", "the folder"),
    "plan of no model": ("plan triage --model ./nosuch", "no model folder", 'give "embedded"'),
    "a file as folder": ("compile triage --out notes.txt/run", "cannot write", "another --out"),
    "limit of a study": ("tune triage --at-most foo", "--at-most takes name=value", "'foo'"),
    "arm": ("compile triage --arm rl", "'rl' is not one of", "'rl_only'"),
    "arm of an experiment": ("compare triage --arms fst,rl_onl", "no arm 'rl_onl'", "'rl_only'"),
    "axis": ("ablate triage --axes Q", "no axis 'Q'", "known: K, T"),
    "preset": ("compile triage --auto tiny", "'tiny' is not one of", "'light'"),
    "seed": ("compile triage --seed x", "--seed", "valid integer"),
    "negative seed": ("compile triage --seed -1", "--seed", "greater than or equal to 0"),
    "tracker": ("compile triage --report-to neptune", "'neptune' is not one of", "'mlflow'"),
    "reflection LM": (
        "compile triage --reflection-lm gpt-5",
        "names no provider",
        "openai/gpt-5-mini",
    ),
    "store": ("experiments show empty", "no store of experiments", "give the --out"),
    "argument of load": (
        "compile triage:polcy=1",
        "takes no argument 'polcy'",
        "mean 'policy'",
    ),
    "type of an argument": ("compile triage:policy=x", "policy must be of type int", "got 'x'"),
    "limit": ("tune triage --at-most kl_to_base=low", "--at-most kl_to_base", "must be a number"),
    "measure": ("tune triage --objective scor", "no measure 'scor'", "mean 'score'"),
    "search space": ("tune triage --space nosuch.yaml", "no file nosuch.yaml", "YAML"),
    "nothing to export": ("export empty there", "neither a bundle nor a run", "fst compile --out"),
    "name of a new program": ("init 3x", "'3x' is no name", "letters, digits"),
}
"""Mistakes that text and files tell: the command, the cause, and what to do."""

NOTHING_HEAVY = """
import sys
from typer.testing import CliRunner
from fst_dspy.cli import app

for command in sys.argv[1:]:
    done = CliRunner().invoke(app, command.split())
    heavy = {"dspy", "torch", "transformers", "optuna", "matplotlib"} & set(sys.modules)
    assert done.exit_code in (1, 2) and not heavy, (command, done.exit_code, heavy)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "empty").mkdir()
    # No hub answers here, whether there is a network or not.
    monkeypatch.setenv("HF_ENDPOINT", NO_HUB)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NO_HUB)
    return tmp_path


def told(command):
    # A path that is longer than a line would be broken within a word.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "_width", 1000)
        done = CliRunner(env={"COLUMNS": "1000"}).invoke(app, command.split())
    assert done.exit_code in (1, 2) and "Traceback" not in done.output
    return " ".join(done.output.replace("│", " ").split())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("mistake", EARLY)
def test_a_mistake_is_told_with_its_cause_and_what_to_do(mistake):
    command, cause, advice = EARLY[mistake]
    message = told(command)
    assert cause in message and advice in message


def test_a_program_cannot_have_the_name_of_the_module_that_runs(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of the command itself
    assert "would hide Python's own or an installed __main__" in told("init __main__")


def test_it_is_told_before_anything_heavy_is_imported(folder):
    commands = [command for command, _, _ in EARLY.values()]
    run = [sys.executable, "-c", NOTHING_HEAVY, *commands]
    done = subprocess.run(run, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_may_not_be_written_to_is_told(folder):
    (folder / "empty").chmod(0o500)
    message = told("compile triage --out empty/run")
    assert "no right to write in empty" in message and "another --out" in message


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["report empty", "watch empty"])
def test_a_folder_without_a_run_is_told(command):
    message = told(command)
    assert "empty is not a run folder" in message and "Give the log_dir" in message


def test_a_run_folder_of_other_settings_is_told_at_once(tmp_path):
    config = FST(vowels, max_cycles=1).config.to_dict()
    config["slow"] |= {"learning_rate": 3e-4, "lora": None}  # as a run settles them
    begun = {"arm": "fst", "seed": 0, "settings": config}
    (tmp_path / "config.json").write_text(json.dumps(begun))
    message = told(f"compile triage --out {tmp_path} --seed 1 --set temperature=0.5")
    assert "seed differs (0 there, 1 here)" in message
    assert "temperature differs (1.0 there, 0.5 here)" in message
    assert "choose another folder" in message
    assert "learning_rate" not in message and "lora" not in message
    sampler = {"max_cycles": 1, "batch_sampler": "epoch_shuffled"}  # is no part of a run's settings
    check_same_run(tmp_path, 0, "fst", None, sampler)


def test_what_can_be_compiled_can_be_planned():
    given = "--arm rl_only --set group_size=6 --set batch_sampler=epoch_shuffled"
    done = CliRunner().invoke(app, f"plan triage {given}".split())
    assert done.exit_code == 0, done.output


def raising(gold, pred, trace=None):
    raise KeyError("label")


def nothing(gold, pred, trace=None):
    return None


NO_INPUTS = [dspy.Example(question="1", answer="")] * 3
LATER = {
    "no examples": ({"trainset": []}, DataError, "trainset is empty", "at least one dspy.Example"),
    "inputs not set": (
        {"trainset": NO_INPUTS},
        DataError,
        "which fields are inputs",
        "with_inputs",
    ),
    "a metric that raises": (
        {"metric": raising},
        MetricError,
        "KeyError: 'label'",
        "run it on one",
    ),
    "a metric that returns nothing": ({"metric": nothing}, MetricError, "None", "a number"),
    "no LM": ({"lm": None}, ProgramError, "needs a local model", "dspy.configure(lm="),
    "a remote LM": ({"lm": dspy.LM("openai/gpt-5")}, ProgramError, "only openai/gpt-5", "LocalLM"),
}
"""Mistakes that need the program: what is changed, the error, the cause, and what to do."""


@pytest.mark.parametrize("mistake", LATER)
def test_a_mistake_in_program_metric_or_data_is_told(mistake, tiny_qwen3):
    change, error, cause, advice = LATER[mistake]
    given = {"metric": vowels, "trainset": questions(6), "lm": ...} | change
    lm = LocalLM(str(tiny_qwen3)) if given["lm"] is ... else given["lm"]
    with dspy.context(lm=lm), pytest.raises(error) as raised:
        FST(given["metric"], **SETTINGS).compile(
            Echo(), trainset=given["trainset"], valset=questions(2, 6)
        )
    assert cause in str(raised.value) and advice in str(raised.value)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, 2**32])
def test_a_bad_seed_is_told(seed):
    with pytest.raises(ConfigError, match="seed must be a whole number from 0"):
        FST(vowels, seed=seed)
