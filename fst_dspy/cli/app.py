"""The ``fst`` command. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fst_dspy import distributed
from fst_dspy.cli import experiments as cli_experiments
from fst_dspy.cli import protocols as cli_protocols
from fst_dspy.errors import FSTError
from fst_dspy.tasks import read_value

if TYPE_CHECKING:
    from fst_dspy.results.result import FSTResult
    from fst_dspy.rollouts.evaluate import Quadrants

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Fast-Slow Training: tune a DSPy program's prompts and its model's weights together.",
)
console = Console(quiet=not distributed.is_main())

Program = Annotated[
    str,
    typer.Argument(
        help="A Python file with load(seed), or the name of a packaged program; arguments for "
        "load may follow, as in triage:policy=1,train=50."
    ),
]
Model = Annotated[str, typer.Option(help='"embedded", a model folder or a hub id.')]
Out = Annotated[
    Path | None, typer.Option(help="Run folder; started again with the same one, a run goes on.")
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


app.command()(cli_experiments.compare)
app.command()(cli_experiments.ablate)
app.command()(cli_protocols.plasticity)
app.command()(cli_protocols.continual)
app.add_typer(cli_experiments.experiments, name="experiments")


@app.callback()
def main() -> None:
    """Keeps the commands subcommands."""


@app.command()
def compile(
    program: Program,
    model: Model = "embedded",
    out: Out = None,
    seed: Seed = 0,
    arm: ArmOption = "fst",
    auto: Preset = None,
    settings: Settings = None,
    reflection_lm: ReflectionLM = None,
    report_to: ReportTo = None,
) -> None:
    """Compile a program with FST and report what each channel brought on the test set."""
    try:
        given = parse_settings(settings)
        _compile(program, model, out, seed, arm, auto, given, reflection_lm, report_to)
    except FSTError as error:
        console.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        if not distributed.is_main():  # whose console is quiet
            typer.echo(f"process {distributed.rank()}: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        console.print(f"\n{error or 'interrupted'}")
        raise typer.Exit(130) from None


@app.command()
def demo(out: Out = None, seed: Seed = 0) -> None:
    """Compile the triage program on the embedded model: a few minutes on two cores."""
    compile("triage", out=out or Path("runs") / f"demo-{seed}", seed=seed)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A bundle, or the run folder of a compile.")],
    folder: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    base: Annotated[
        str | None, typer.Option(help="The model that was trained, where it is not at hand.")
    ] = None,
) -> None:
    """Write the trained model as a plain folder that transformers and vLLM load."""
    try:
        with console.status("exporting"):
            from fst_dspy.bundle.saving import export as write_model_folder

            written = write_model_folder(source, folder, base=base)
    except FSTError as error:
        console.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        raise typer.Exit(1) from None
    console.print(f"model folder: {written}")


@app.command()
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

    try:
        if every is None:
            write_report(runs, out, model=model)
        else:
            console.print(f"writing {out} every {every:g} s; Ctrl-C ends it")
            follow(runs, out, every, model=model)
    except FSTError as error:
        console.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    console.print(f"report: {out}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder of a compile that goes on elsewhere.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a run in the terminal while it goes on; it may run in another process."""
    from fst_dspy.report.watch import watch as watch_run

    try:
        watch_run(run, console, every)
    except FSTError as error:
        console.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def tune(
    program: Program,
    model: Model = "embedded",
    out: Annotated[
        Path, typer.Option(help="The study's folder; started again with it, a study goes on.")
    ] = Path("runs/study"),
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, earlier ones counted.")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="Processes that run trials.")] = 1,
    rollouts: Annotated[int, typer.Option(min=1, help="Rollout budget of a trial.")] = 3000,
    objective: Annotated[
        str, typer.Option(help="score, or several of score,kl_to_base,rollouts for a front.")
    ] = "score",
    at_most: Annotated[
        list[str] | None, typer.Option(help="Upper limit, such as kl_to_base=0.1; repeat for more.")
    ] = None,
    at_least: Annotated[
        list[str] | None, typer.Option(help="Lower limit, such as score=0.5; repeat for more.")
    ] = None,
    pruner: Annotated[str, typer.Option(help="median, asha, hyperband or none.")] = "median",
    space: Annotated[Path | None, typer.Option(help="YAML file of the search space.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="sqlite:///..., journal:///... or postgresql://...; SQLite in --out."),
    ] = None,
    study_name: Annotated[str, typer.Option(help="The study's name in the storage.")] = "fst",
    seed: Seed = 0,
    arm: ArmOption = "fst",
    settings: Settings = None,
    reflection_lm: ReflectionLM = None,
) -> None:
    """Tune FST's settings on a program with Optuna; --set holds settings fixed."""
    if distributed.processes() > 1:
        raise typer.BadParameter("a study starts its own processes: use --workers, not torchrun")
    try:
        with console.status("loading"):
            import dspy

            from fst_dspy.cli.tune import tune_and_report
            from fst_dspy.study import Objective, load_space

        upper, lower = (
            {name: float(value) for name, value in parse_settings(limits).items()}
            for limits in (at_most, at_least)
        )
        goal = Objective(tuple(objective.split(",")), rollouts, upper, pruner, lower)
        tune_and_report(
            console,
            program,
            out,
            trials,
            lm=model,
            workers=workers,
            objective=goal,
            space=load_space(space) if space is not None else None,
            storage=storage,
            study_name=study_name,
            seed=seed,
            arm=arm,
            fixed=parse_settings(settings),
            reflection_lm=dspy.LM(reflection_lm) if reflection_lm else None,
        )
    except FSTError as error:
        console.print(Panel(Text(str(error)), title=type(error).__name__, border_style="red"))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; start it again with --out {out} to go on")
        raise typer.Exit(130) from None


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


def _compile(
    program: str,
    model: str,
    out: Path | None,
    seed: int,
    arm: Any,
    auto: Any,
    settings: dict[str, Any],
    reflection_lm: str | None,
    report_to: list[str] | None,
) -> None:
    with console.status("loading"):
        import dspy

        from fst_dspy.lm.local_lm import LocalLM
        from fst_dspy.loop.progress import RichProgress
        from fst_dspy.optimizer import FST
        from fst_dspy.rollouts.evaluate import quadrants
        from fst_dspy.rollouts.runner import RolloutRunner
        from fst_dspy.tasks import load_task

        task = load_task(program, seed)
        lm = LocalLM(model)
    fst = FST(
        metric=task.metric,
        reflection_lm=dspy.LM(reflection_lm) if reflection_lm else None,
        auto=auto,
        arm=arm,
        seed=seed,
        log_dir=out,
        track_stats=True,
        report_to=report_to,
        progress=RichProgress(console),
        **settings,
    )
    console.print(f"[bold]{task.name}[/] on {lm.model}, arm {arm}, seed {seed}")
    with dspy.context(lm=lm):
        compiled = fst.compile(task.program, trainset=task.trainset, valset=task.valset)
        result = compiled.detailed_results
        with console.status(f"testing on {len(task.testset)} examples"):
            runner = RolloutRunner(task.program, task.metric, lm, fst.config.sampling, seed)
            tested = quadrants(
                runner,
                result.seed_candidate,
                result.best.candidate,
                task.testset,
                base_version=result.base_version,
                trained_version=result.best.version,
            )
    if out is not None and distributed.is_main():
        _write_quadrants(out, tested)
    _report(result, tested)


def _write_quadrants(out: Path, tested: Quadrants) -> None:
    from fst_dspy.files import as_plain, write_atomically

    text = json.dumps(as_plain(tested), indent=1).encode()
    write_atomically(out / "quadrants.json", lambda file: file.write(text))


def _report(result: FSTResult, tested: Quadrants) -> None:
    table = Table(title=f"Mean test score, {tested.examples} examples, training temperature")
    table.add_column("weights")
    table.add_column("original context", justify="right")
    table.add_column("evolved context", justify="right")
    table.add_row("base", f"{tested.base_original:.3f}", f"{tested.base_evolved:.3f}")
    table.add_row(
        "trained", f"{tested.trained_original:.3f}", f"[bold]{tested.trained_evolved:.3f}"
    )
    console.print(table)
    for component, text in result.best.candidate.components.items():
        if result.seed_candidate.components.get(component) != text:
            console.print(Panel(Text(text), title=component, border_style="green"))
    counts, last = result.rollouts, result.records[result.best.cycle]
    console.print(
        f"{counts.total:,} rollouts (fast {counts.fast:,}, slow {counts.slow:,}, "
        f"validation {counts.eval:,}); KL to base {last.kl_to_base:.4f} nats a token; "
        f"{sum(result.records[-1].seconds.values()):.0f} s"
    )
    if result.log_dir is not None:
        console.print(f"run folder: {result.log_dir}")
