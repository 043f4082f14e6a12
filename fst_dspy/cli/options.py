"""What the commands share: their options, the console, and how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fst_dspy import distributed
from fst_dspy.display import Terminal, panel, visible
from fst_dspy.errors import FSTError
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
Seed = Annotated[int, typer.Option(help="Seed of the task and of everything random.")]
ArmOption = Annotated[str, typer.Option(help="fst, rl_only or gepa_only.")]
Preset = Annotated[str | None, typer.Option(help="Budget preset: light, medium or heavy.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting of FST as name=value; repeat for more."),
]
ReflectionLM = Annotated[
    str | None,
    typer.Option(help="Model that rewrites instructions, such as openai/gpt-5-mini."),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(help="tensorboard, wandb or mlflow, in the run folder; repeat for more."),
]

# --- of experiments -----------------------------------------------------------------------------

Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds of every arm; 5 if not given.")]
Rollouts = Annotated[
    int | None,
    typer.Option(min=1, help="Budget of a run, all channels counted; 3000 if not given."),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes at once; they share the cores.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Rollouts a test example: mean@k; 4 if not given.")
]
TestSize = Annotated[int | None, typer.Option(min=1, help="Test examples; all if not given.")]
ForgetOn = Annotated[
    list[str] | None,
    typer.Option(help="A program to test for forgetting, with its ideal prompts; repeat for more."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Minutes on two cores; says little.")]
RESULTS = "Where results.md and the rest go; the store if not given."
Results = Annotated[Path | None, typer.Option(help=RESULTS)]

GO_ON = "interrupted; start it again with the same --out to go on"


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Settings given as ``name=value``; values are JSON where they can be read as such.

    Raises:
        typer.BadParameter: A setting without ``=``.
    """
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        name, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set takes name=value, got {setting!r}")
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
    except FSTError as error:
        console.print(panel(type(error).__name__, str(error), border="red"))
        if not distributed.is_main():  # whose console is quiet
            words = f"process {distributed.rank()}: {type(error).__name__}: {error}"
            typer.echo(visible(words), err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        words = str(error) or interrupted
        if words:
            console.print(f"\n{words}")
        raise typer.Exit(130) from None
