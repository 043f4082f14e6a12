"""The commands ``fst compare``, ``fst ablate`` and ``fst experiments show``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_dspy.cli.options import (
    GO_ON,
    RESULTS,
    ForgetOn,
    Model,
    Out,
    Program,
    Quick,
    ReflectionLM,
    Results,
    Rollouts,
    Samples,
    Seeds,
    Settings,
    TestSize,
    Workers,
    console,
    errors_told,
    parse_settings,
)
from fst_dspy.display import as_text

if TYPE_CHECKING:
    from fst_dspy.experiments import Plan

experiments = typer.Typer(no_args_is_help=True, help="Look at what experiments have found.")


def compare(
    program: Program,
    arms: Annotated[
        str | None, typer.Option(help="Comma-separated; all of them if not given.")
    ] = None,
    out: Out = None,
    model: Model = "embedded",
    seeds: Seeds = None,
    rollouts: Rollouts = None,
    workers: Workers = 1,
    settings: Settings = None,
    tune_rl: Annotated[
        int, typer.Option(min=0, help="Trials of a study that tunes rl_only first.")
    ] = 0,
    rl_budget_factor: Annotated[
        int, typer.Option(min=1, help="Run rl_only on so many times the budget too.")
    ] = 1,
    samples: Samples = None,
    test_size: TestSize = None,
    forget_on: ForgetOn = None,
    reflection_lm: ReflectionLM = None,
    quick: Quick = False,
    results: Results = None,
) -> None:
    """Compare FST with RL alone, GEPA alone and others: same model, data, seeds and rollouts."""
    with errors_told(GO_ON):
        with console.status("loading"):
            from fst_dspy.cli.study_report import trial_line
            from fst_dspy.experiments import ARMS, ExperimentStore
            from fst_dspy.experiments import compare as run_comparison
        plan = make_plan(
            program,
            model,
            quick,
            settings,
            seeds=seeds,
            rollouts=rollouts,
            samples=samples,
            test_size=test_size,
            forget_on=forget_on,
            reflection_lm=reflection_lm,
        )
        folder = out or default_folder("compare", (program,), quick)
        failed = run_comparison(
            ExperimentStore(folder),
            plan,
            arms.split(",") if arms else tuple(ARMS),
            workers=workers,
            rl_trials=tune_rl,
            rl_budget_factor=rl_budget_factor,
            console=console,
            on_trial=lambda _study, trial: console.print(f"tuning rl_only: {trial_line(trial)}"),
        )
        finish(folder, results, failed)


def ablate(
    program: Program,
    axes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: K,T,advantage,reuse,first,demos,weights; all if not given."
        ),
    ] = None,
    out: Out = None,
    model: Model = "embedded",
    seeds: Seeds = None,
    rollouts: Rollouts = None,
    workers: Workers = 1,
    settings: Settings = None,
    samples: Samples = None,
    test_size: TestSize = None,
    forget_on: ForgetOn = None,
    reflection_lm: ReflectionLM = None,
    quick: Quick = False,
    results: Results = None,
) -> None:
    """Change one setting of FST at a time, to see what it is worth."""
    with errors_told(GO_ON):
        with console.status("loading"):
            from fst_dspy.experiments import AXES, ExperimentStore
            from fst_dspy.experiments import ablate as run_ablation
        plan = make_plan(
            program,
            model,
            quick,
            settings,
            seeds=seeds,
            rollouts=rollouts,
            samples=samples,
            test_size=test_size,
            forget_on=forget_on,
            reflection_lm=reflection_lm,
        )
        folder = out or default_folder("ablate", (program,), quick)
        chosen = axes.split(",") if axes else tuple(AXES)
        failed = run_ablation(
            ExperimentStore(folder), plan, chosen, workers=workers, console=console
        )
        finish(folder, results, failed)


@experiments.command()
def show(
    store: Annotated[Path, typer.Argument(help="The --out of an experiment.")],
    out: Annotated[Path | None, typer.Option(help=RESULTS)] = None,
) -> None:
    """Write the tables and figures of a store, whatever has ended so far, and print them."""
    with errors_told(GO_ON):
        _show(store, out)


@experiments.callback()
def main() -> None:
    """Keeps ``show`` a subcommand."""


def default_folder(protocol: str, programs: Sequence[str], quick: bool) -> Path:
    """Where a protocol's store goes if nothing is said: ``runs/compare-triage``."""
    from fst_dspy.tasks import find_program, split_arguments

    parts = [protocol]
    for program in programs:
        name, arguments = split_arguments(program)
        parts += [find_program(name).stem, *(f"{k}={v}" for k, v in arguments.items())]
    return Path("runs") / "-".join([*parts, *(["quick"] if quick else [])]).replace("/", "_")


def make_plan(
    program: str, model: str, quick: bool, settings: Sequence[str] | None, **given: Any
) -> Plan:
    """The plan of the options; what was not given is the plan's default, or the quick one's."""
    from fst_dspy.experiments import Plan
    from fst_dspy.experiments.plan import QUICK, QUICK_SETTINGS

    fields = {name: value for name, value in given.items() if value is not None}
    fields["forget_on"] = tuple(fields.get("forget_on", ()))
    own = parse_settings(list(settings or []))
    return Plan(
        program,
        model,
        settings={**QUICK_SETTINGS, **own} if quick else own,
        **{**QUICK, **fields} if quick else fields,
    )


def finish(folder: Path, results: Path | None, failed: Sequence[str]) -> None:
    """Write and print what a store has found; fail where jobs did."""
    _show(folder, results)
    if failed:
        console.print(as_text(f"failed: {', '.join(failed)}", "red"))
        console.print("start it again to try them once more")
        raise typer.Exit(1)


def _show(folder: Path, out: Path | None) -> None:
    with console.status("computing the tables"):
        from fst_dspy.experiments import write_results

        tables, files = write_results(folder, out)
    for table in tables:
        console.print(table.rich(), soft_wrap=True)
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True)
