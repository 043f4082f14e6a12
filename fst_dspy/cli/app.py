"""The ``fst`` command. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from fst_dspy.cli.checks import check_source
from fst_dspy.cli.compiling import compile
from fst_dspy.cli.experiments import ablate, compare, experiments
from fst_dspy.cli.init import init
from fst_dspy.cli.options import Json, Out, Seed, console, errors_told
from fst_dspy.cli.plan import plan
from fst_dspy.cli.protocols import continual, plasticity
from fst_dspy.cli.tune import tune

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Fast-Slow Training: tune a DSPy program's prompts and its model's weights together.",
)


START, LOOK, EXPERIMENTS = "Start here", "Look at a run, and use it", "Studies and experiments"
"""The panels of the help, in this order."""


def _version(wanted: bool) -> None:
    if wanted:
        versions = (f"{name} {version(name)}" for name in ("dspy", "torch", "transformers", "trl"))
        typer.echo(f"fst {version('fst-dspy')} ({', '.join(versions)})")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    """Keeps the commands subcommands."""


app.command(rich_help_panel=START)(compile)


@app.command(rich_help_panel=START)
def demo(out: Out = None, seed: Seed = 0, as_json: Json = False) -> None:
    """Compile the triage program on the embedded model: a few minutes on two cores."""
    compile("triage", out=out or Path("runs") / f"demo-{seed}", seed=seed, as_json=as_json)


app.command(rich_help_panel=START)(plan)
app.command(rich_help_panel=START)(init)


@app.command(rich_help_panel=LOOK)
def export(
    source: Annotated[Path, typer.Argument(help="A bundle, or the run folder of a compile.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    base: Annotated[
        str | None, typer.Option(help="The model that was trained, where it is not at hand.")
    ] = None,
) -> None:
    """Write the trained model as a plain folder that transformers and vLLM load."""
    with errors_told():
        check_source(source)
    with errors_told(), console.status("exporting"):
        from fst_dspy.bundle.saving import export as write_model_folder

        written = write_model_folder(source, folder, base=base)
    console.print(f"model folder: {written}")


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    model: Annotated[
        str | None,
        typer.Option(help="Model whose tokenizer shows the prompts; embedded's is found."),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option(min=1, help="Write it again every so many seconds until the runs have ended."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, or several laid over one another."""
    from fst_dspy.report import follow, write_report

    with errors_told(interrupted=""):
        if every is None:
            write_report(runs, out, model=model)
        else:
            console.print(f"writing {out} every {every:g} s; Ctrl-C ends it")
            follow(runs, out, every, model=model)
    console.print(f"report: {out}")


@app.command(rich_help_panel=LOOK)
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder of a compile that goes on elsewhere.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a run in the terminal while it goes on; it may run in another process."""
    from fst_dspy.report.watch import watch as watch_run

    with errors_told(interrupted=""):
        watch_run(run, console, every)


for command in (tune, compare, ablate, plasticity, continual):
    app.command(rich_help_panel=EXPERIMENTS)(command)
app.add_typer(experiments, name="experiments", rich_help_panel=EXPERIMENTS)
