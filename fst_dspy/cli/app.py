"""The ``fst`` command. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_dspy import distributed
from fst_dspy.cli.experiments import ablate, compare, experiments
from fst_dspy.cli.options import (
    ArmOption,
    Model,
    Out,
    Preset,
    Program,
    ReflectionLM,
    ReportTo,
    Seed,
    Settings,
    console,
    errors_told,
    parse_settings,
)
from fst_dspy.cli.plan import plan
from fst_dspy.cli.protocols import continual, plasticity
from fst_dspy.cli.tune import tune
from fst_dspy.display import as_text, panel, table

if TYPE_CHECKING:
    from fst_dspy.results.result import FSTResult
    from fst_dspy.rollouts.evaluate import Quadrants

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Fast-Slow Training: tune a DSPy program's prompts and its model's weights together.",
)


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
    with errors_told():
        given = parse_settings(settings)
        _compile(program, model, out, seed, arm, auto, given, reflection_lm, report_to)


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
    with errors_told(), console.status("exporting"):
        from fst_dspy.bundle.saving import export as write_model_folder

        written = write_model_folder(source, folder, base=base)
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

    with errors_told(interrupted=""):
        if every is None:
            write_report(runs, out, model=model)
        else:
            console.print(f"writing {out} every {every:g} s; Ctrl-C ends it")
            follow(runs, out, every, model=model)
    console.print(f"report: {out}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder of a compile that goes on elsewhere.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a run in the terminal while it goes on; it may run in another process."""
    from fst_dspy.report.watch import watch as watch_run

    with errors_told(interrupted=""):
        watch_run(run, console, every)


app.command()(plan)
app.command()(tune)
app.command()(compare)
app.command()(ablate)
app.command()(plasticity)
app.command()(continual)
app.add_typer(experiments, name="experiments")


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
    about = f" on {lm.model}, arm {arm}, seed {seed}"
    console.print(as_text(task.name, "bold").append_text(as_text(about, "not bold")))
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
    best = as_text(f"{tested.trained_evolved:.3f}", "bold")
    rows = (
        ("base", f"{tested.base_original:.3f}", f"{tested.base_evolved:.3f}"),
        ("trained", f"{tested.trained_original:.3f}", best),
    )
    title = f"Mean test score, {tested.examples} examples, training temperature"
    console.print(table(("weights", "original context", "evolved context"), rows, title, left=1))
    for component, text in result.best.candidate.components.items():
        if result.seed_candidate.components.get(component) != text:
            console.print(panel(component, text, border="green"))
    counts, last = result.rollouts, result.records[result.best.cycle]
    console.print(
        f"{counts.total:,} rollouts (fast {counts.fast:,}, slow {counts.slow:,}, "
        f"validation {counts.eval:,}); KL to base {last.kl_to_base:.4f} nats a token; "
        f"{sum(result.records[-1].seconds.values()):.0f} s"
    )
    if result.log_dir is not None:
        console.print(f"run folder: {result.log_dir}")
