"""(e) Start-up: importing the package, the command's help, the first rollout; each in a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from benchmarks.speed.measure import Row, alternate, row_of

FIRST_ROLLOUT = """
import dspy, fst_dspy
dspy.configure(lm=fst_dspy.LocalLM("embedded"))
dspy.Predict("question -> answer")(question="where does a visa ticket go?")
"""


def run(quick: bool) -> Iterator[Row]:
    """A row for each, in seconds; the import beside that of DSPy alone."""
    commands = {
        "dspy": ["-c", "import dspy"],
        "fst_dspy": ["-c", "import fst_dspy"],
        "help": ["-m", "fst_dspy", "--help"],
        "rollout": ["-c", FIRST_ROLLOUT],
    }
    runs = {name: lambda command=command: _start(command) for name, command in commands.items()}
    times = alternate(runs, 1 if quick else 7, warm_up=not quick)
    extra = [ours - dspy for ours, dspy in zip(times["fst_dspy"], times["dspy"], strict=True)]
    note = f"{min(times['fst_dspy']):.2f} s against {min(times['dspy']):.2f} s"
    yield row_of("e", "import fst_dspy beyond import dspy", "s", extra, "<= 0.1", note)
    yield row_of("e", "fst --help", "s", times["help"], "<= 1.0")
    yield row_of("e", "a process until its first answer", "s", times["rollout"])


def _start(command: list[str]) -> None:
    # An answer that does not parse is an answer: the exit status is not looked at for that one.
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode and "AdapterParseError" not in done.stderr:
        raise RuntimeError(done.stderr)
