"""What the commands share: their options, the console, and how errors are told."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from fst_dspy import distributed
from fst_dspy.display import Terminal, as_text, panel, visible
from fst_dspy.errors import CompileInterrupted, FSTError
from fst_dspy.tasks import read_value

console = Terminal(quiet=not distributed.is_main())

Program = Annotated[
    str,
    typer.Argument(
        help="A Python file with load(seed), or the name of a packaged program; arguments for "
        "load may follow, as in triage:policy=1,train=50.",
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option(help='"embedded", "smollm2", a model folder, a GGUF file or a hub id.')
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="The folder to write, of a run or an experiment; started again with the same one, "
        "it goes on."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=2**32 - 1, help="Seed of the task and of everything random."
    ),
]
ArmOption = Annotated[
    Literal["fst", "rl_only", "gepa_only"],
    typer.Option(help="Prompts and weights, weights alone, or prompts alone."),
]
Preset = Annotated[
    Literal["light", "medium", "heavy", "paper"] | None,
    typer.Option(help="How long to run, where --set gives no limit: light if not given."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting of FST as name=value; repeat for more."),
]
ReflectionLM = Annotated[
    str | None,
    typer.Option(help="Model that rewrites instructions, as in openai/gpt-5."),
]


class Tracker(StrEnum):
    """What ``--report-to`` takes."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


ReportTo = Annotated[
    list[Tracker] | None, typer.Option(help="Logs to the run folder; repeat for more.")
]
NoRollouts = Annotated[
    bool,
    typer.Option("--no-rollouts", help="Log neither rollouts nor answers."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the results as one JSON object, all else on stderr.")
]

# --- of experiments -----------------------------------------------------------------------------

Seeds = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Seeds of every arm; 5 if not given.")
]
Rollouts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Budget of a run or stage, all channels counted; 3000 if not given.",
    ),
]
Workers = Annotated[
    int, typer.Option(metavar="N", min=1, help="Processes at once; they share the cores.")
]
Samples = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Rollouts a test example: mean@k; 4 if not given."),
]
TestSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Test examples; all if not given.")
]
ForgetOn = Annotated[
    list[str] | None,
    typer.Option(help="A program to test for forgetting, with its ideal prompts; repeat for more."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Minutes on two cores; says little.")]
RESULTS = "Where results.md and the rest go; the store if not given."
Results = Annotated[Path | None, typer.Option(help=RESULTS)]

GO_ON = "interrupted; start it again with the same --out to go on"

USUAL_ARM_NAMES = ("fst", "rl_only", "gepa_only", "sequential", "sequential_reverse", "fst_distill")
ARM_NAMES = (
    "fst",
    "rl_only",
    "gepa_only",
    "sequential",
    "sequential_10",
    "sequential_25",
    "sequential_75",
    "sequential_reverse",
    "fst_distill",
    "sdpo",
    "rl_both",
    "fst_both",
    "fst_blind",
)
"""Arms of experiments, here as well so that telling a mistake imports nothing heavy."""
ARMS_IN_HELP = (
    "With commas: fst, rl_only, gepa_only, sequential (or sequential_10, _25, _75, _reverse), "
    "fst_distill, sdpo, rl_both, fst_both, fst_blind"
)
"""The same in words that a terminal of 60 columns can break."""
TRAINING_ARM_NAMES = tuple(name for name in ARM_NAMES if name != "gepa_only")
STREAM_ARM_NAMES = ("fst", "rl_only", "gepa_only")
"""Those of ``fst plasticity``, which starts from weights that were trained, and ``continual``."""
AXIS_NAMES = ("K", "T", "advantage", "reuse", "first", "demos", "weights")
"""Axes of ``fst ablate``, likewise."""
MEASURE_NAMES = ("score", "kl_to_base", "rollouts")
"""What ``fst tune`` measures, likewise."""


def completed(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Completes the last of comma-separated names."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return complete


@dataclass(frozen=True)
class Experiment:
    """The options that all experiments have; see ``of_experiments``."""

    out: Out = None
    model: Model = "embedded"
    seeds: Seeds = None
    rollouts: Rollouts = None
    workers: Workers = 1
    settings: Settings = None
    samples: Samples = None
    test_size: TestSize = None
    forget_on: ForgetOn = None
    reflection_lm: ReflectionLM = None
    quick: Quick = False
    results: Results = None


def of_experiments(
    *without: str,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``Experiment``, which it takes as ``options``.

    Args:
        *without: Options that mean nothing to it, and stay at their defaults.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = [field for field in fields(Experiment) if field.name not in without]
        hints = get_type_hints(Experiment, include_extras=True)

        @wraps(command)
        def with_options(**given: Any) -> None:
            of_all = {field.name: given.pop(field.name) for field in shared if field.name in given}
            command(**given, options=Experiment(**of_all))

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in own
            if parameter.name != "options"
        ] + [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in shared
        ]
        # What typer reads, instead of the signature that is written down.
        with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_options

    return decorate


def parse_settings(settings: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """What an option was given as ``name=value``; values are JSON where they can be read as such.

    Raises:
        typer.BadParameter: A setting without ``=``.
    """
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option} takes name=value, got {setting!r}")
        parsed[name] = read_value(text)
    return parsed


@contextmanager
def errors_told(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn what is wrong into a message and exit code 1, and Ctrl-C into exit code 130.

    Args:
        interrupted: Said after Ctrl-C where the interrupt has no words of its own; may be empty.
    """
    try:
        yield
    except (FSTError, OSError) as error:  # the system's own: no rights, a full disk, a long name
        console.print(panel(type(error).__name__, str(error), border="red"))
        if not distributed.is_main():  # whose console is quiet
            words = f"process {distributed.rank()}: {type(error).__name__}: {error}"
            typer.echo(visible(words), err=True)
        raise typer.Exit(1) from None
    except CompileInterrupted as error:
        console.print(as_text(f"\n{_how_to_go_on(error)}"), soft_wrap=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt as error:
        words = str(error) or interrupted
        if words:
            console.print(f"\n{words}")
        raise typer.Exit(130) from None


def _how_to_go_on(error: CompileInterrupted) -> str:
    """What was saved, and the command that goes on from there."""
    if error.folder is None:
        return (
            "stopped; nothing was saved: with --out FOLDER a run can be stopped and taken up again"
        )
    saved = "up to the last checkpoint" if error.at_once else "up to this step"
    command = shlex.join(["fst", *sys.argv[1:]])
    return f"stopped; all {saved} is saved in {error.folder}. To go on:\n  {command}"


@contextmanager
def results_as_json(wanted: bool) -> Iterator[None]:
    """Where JSON is wanted, what else is printed goes to stderr inside the block."""
    before, console.stderr = console.stderr, console.stderr or wanted
    try:
        yield
    finally:
        console.stderr = before


def print_json(results: Any) -> None:
    """Print one JSON object on standard output, once among several processes."""
    if distributed.is_main():
        typer.echo(json.dumps(results, indent=1, ensure_ascii=False))
