"""Fifteen mistakes: what is told, and how many seconds after it was made.

    OMP_NUM_THREADS=1 python benchmarks/quality/mistakes.py [--only WORD]

Each is made as a user would make it: on the command line in a process of its own, from its start to
its end; in Python from the call that has the mistake in it to the message, with the packages
imported and the embedded model loaded. Written to ``benchmarks/results/mistakes.json`` and,
as a table, to ``mistakes.md`` beside it. Processor seconds are those of this program and its
children, of all threads: on a machine that others use, the fairer of the two. A row is about the
first message that names the cause.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import dspy
import typer
from dspy import lm15

import fst_dspy
from fst_dspy.files import write_atomically
from fst_dspy.model.generate import generate

RESULTS = Path(__file__).parent.parent / "results"
LONGEST = 420
"""Characters of a message that are kept."""


@dataclass(frozen=True)
class Told:
    """What became of a mistake.

    Attributes:
        mistake: What was done.
        how: As what it was told: an error's name, a warning, or ``nothing``.
        message: Its text, without colours and line ends; long ones are cut.
        seconds: From the mistake to the message.
        cpu_seconds: Of the processor, meanwhile.
    """

    mistake: str
    how: str
    message: str
    seconds: float
    cpu_seconds: float


class Warnings(logging.Handler):
    """What the package warns of, and when."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.came: list[tuple[str, float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.came.append((record.getMessage(), time.monotonic(), cpu_seconds()))


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def plain(text: str) -> str:
    """A message on one line, without colours, boxes and the folders of this machine."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"[│╭╮╰╯─]+", " ", text)
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/[\w.]+/", "", text)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


# --- the task that the mistakes are made on -------------------------------------------------------

TASK = fst_dspy.load_task("triage:train=48,val=16,test=4")
FEW = TASK.trainset[:12]
"""Too few to read rules off their labels, which needs no words."""
SETTINGS = {"max_cycles": 1, "steps_per_cycle": 1, "max_tokens": 40, "val_size": 16}


def compiled(
    metric: Any = TASK.metric, lm: Any = None, train: Any = TASK.trainset, **settings: Any
) -> None:
    given = {**SETTINGS, **settings}
    with dspy.context(lm=lm or fst_dspy.LocalLM("embedded")):
        fst = fst_dspy.FST(metric, **given)
        fst.compile(TASK.program, trainset=train, valset=TASK.valset)


def mostly_failing(gold: Any, pred: Any, trace: Any = None) -> float:
    return float(pred.label == gold.queue)  # the field is called queue


def no_rule(gold: Any, pred: Any, trace: Any = None, **_: Any) -> dspy.Prediction:
    right = float(pred.queue == gold.queue)
    return dspy.Prediction(score=right, feedback="Right." if right else "That was not right.")


def below_zero(gold: Any, pred: Any, trace: Any = None) -> float:
    return float(pred.queue == gold.queue) - 1


def another(gold: Any, pred: Any, trace: Any = None) -> float:
    return float(pred.queue.lower() == gold.queue)


def breaks_later() -> Any:
    lm, batches = fst_dspy.LocalLM("embedded"), iter(range(10**6))

    def generator(policy: Any, requests: Any) -> Any:
        if next(batches) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return generate(policy, requests)

    lm.policy.generator = generator
    return lm


class CutOff:
    """A reflection LM whose answers end at their limit."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CutOff:
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        part = lm15.TextPart("```\nRoute the ticket by its topic and")
        return lm15.Response(
            id="1",
            model=request.model,
            message=lm15.Message(role="assistant", parts=(part,)),
            finish_reason="length",
            usage=lm15.Usage(),
        )


def truncated_reflection() -> None:
    reflection = dspy.LM("scripted/cut-off", engine=CutOff(), cache=False)
    compiled(reflection_lm=reflection)


def other_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        compiled(log_dir=f"{folder}/run", first_cycle_iterations=1)
        restart()
        compiled(another, log_dir=f"{folder}/run", first_cycle_iterations=1)


def wrong_proposer() -> None:
    compiled(instruction_proposer=lambda text: text + " Be brief.")


def load(**options: Any) -> None:
    fst_dspy.LocalLM("embedded", **options)


IN_PYTHON: dict[str, tuple[Callable[[], None], str]] = {
    "a metric that fails on most rollouts": (lambda: compiled(mostly_failing), "no attribute"),
    "a model that does not get to the answer's format": (
        lambda: compiled(max_tokens=3),
        "raise max_tokens",
    ),
    "generation that breaks in the middle": (lambda: compiled(lm=breaks_later()), "CUDA error"),
    "feedback that states no rule": (
        lambda: compiled(no_rule, train=FEW, arm="gepa_only"),
        "proposals were accepted|states no rule",
    ),
    "an `instruction_proposer` of another form": (wrong_proposer, "proposer"),
    "a reflection LM whose answers are cut off": (truncated_reflection, "reflection LM"),
    "a metric below zero": (lambda: compiled(below_zero), "below|negative"),
    "a learning rate that diverges": (
        lambda: compiled(learning_rate=1e8, max_cycles=8),
        "learning_rate",
    ),
    "a run folder of another metric": (other_run, "metric"),
    '`device="gpu"` where there is none': (lambda: load(device="gpu"), "gpu|GPU|CUDA"),
    '`dtype="float61"`': (lambda: load(dtype="float61"), "dtype"),
}
"""Mistakes made in Python, and what a message that names the cause has in it."""
IN_THE_SHELL = {
    "a reflection LM without its provider": "compile triage --reflection-lm gpt-5",
    "a setting's name mistyped": "compile triage --set grup_size=4",
    "a setting of the wrong type": "compile triage --set group_size=many",
    "a program that is not there": "compile my_progam.py",
}

_began = 0.0, 0.0


def restart() -> None:
    """The mistake begins here; what came before only led to it."""
    global _began
    _began = time.monotonic(), cpu_seconds()


def in_python(mistake: str) -> Told:
    """Make a mistake in this process."""
    make, cause = IN_PYTHON[mistake]
    handler = Warnings()
    logging.getLogger("fst_dspy").addHandler(handler)
    restart()
    told: list[tuple[str, str, float, float]] = []
    try:
        make()
    except Exception as error:
        told = [(type(error).__name__, str(error), time.monotonic(), cpu_seconds())]
    ended = time.monotonic(), cpu_seconds()
    logging.getLogger("fst_dspy").removeHandler(handler)
    warnings = [("warning", *came) for came in handler.came if came[1] >= _began[0]]
    naming = [one for one in [*warnings, *told] if re.search(cause, one[1])]
    how, text, at, cpu = (naming or told or [("nothing", "", *ended)])[0]
    if told and how == "warning":
        how = f"warning, then {told[0][0]}"
    return Told(mistake, how, plain(text), at - _began[0], cpu - _began[1])


def in_the_shell(mistake: str) -> Told:
    """Make a mistake on the command line."""
    command = [sys.executable, "-m", "fst_dspy", *IN_THE_SHELL[mistake].split()]
    restart()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "COLUMNS": "999"},
        )
    spent = time.monotonic() - _began[0], cpu_seconds() - _began[1]
    how = f"exit {done.returncode}"
    return Told(mistake, how, plain(done.stdout + done.stderr), *spent)


def table(told: list[Told]) -> str:
    rows = [
        f"| {one.mistake} | {one.how} | {one.message.replace('|', '/')} | {one.seconds:.1f} "
        f"| {one.cpu_seconds:.1f} |"
        for one in told
    ]
    head = ["| mistake | told as | message | seconds | of the processor |", "|" + " --- |" * 5]
    return "\n".join([*head, *rows, ""])


def main(
    only: Annotated[str, typer.Option(help="Those with this text in their name alone.")] = "",
    out: Annotated[Path, typer.Option(help="The table; JSON beside it.")] = RESULTS / "mistakes.md",
) -> None:
    """Make the mistakes and write down what was told."""
    fst_dspy.LocalLM("embedded")
    told = []
    for mistake in [*IN_PYTHON, *IN_THE_SHELL]:
        if only in mistake:
            told.append(in_python(mistake) if mistake in IN_PYTHON else in_the_shell(mistake))
            print(json.dumps(asdict(told[-1])), flush=True)
    if not only:
        write_atomically(out, lambda file: file.write(table(told).encode()))
        rows = json.dumps([asdict(one) for one in told], indent=1).encode()
        write_atomically(out.with_suffix(".json"), lambda file: file.write(rows))


if __name__ == "__main__":
    typer.run(main)
