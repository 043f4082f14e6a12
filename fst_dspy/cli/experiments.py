"""The commands ``fst compare``, ``fst ablate`` and ``fst experiments show``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fst_dspy.cli.checks import check_arguments, check_names
from fst_dspy.cli.options import (
    ARM_NAMES,
    ARMS_IN_HELP,
    AXIS_NAMES,
    GO_ON,
    RESULTS,
    USUAL_ARM_NAMES,
    Experiment,
    Json,
    Program,
    completed,
    console,
    errors_told,
    of_experiments,
    parse_settings,
    print_json,
    results_as_json,
)
from fst_dspy.display import as_text
from fst_dspy.errors import StoreError

if TYPE_CHECKING:
    from fst_dspy.experiments import Plan

experiments = typer.Typer(no_args_is_help=True, help="Look at what experiments have found.")


@of_experiments()
def compare(
    program: Program,
    options: Experiment,
    arms: Annotated[
        str | None,
        typer.Option(
            help=f"{ARMS_IN_HELP}; the usual six if not given.",
            autocompletion=completed(ARM_NAMES),
        ),
    ] = None,
    tune_rl: Annotated[
        int, typer.Option(metavar="N", min=0, help="Trials of a study that tunes rl_only first.")
    ] = 0,
    rl_budget_factor: Annotated[
        int, typer.Option(metavar="N", min=1, help="Run rl_only on so many times the budget too.")
    ] = 1,
) -> None:
    """Compare FST with RL alone, GEPA alone and others: same model, data, seeds and rollouts."""
    with errors_told(GO_ON):
        chosen = USUAL_ARM_NAMES if arms is None else arms.split(",")
        check_names("arm", chosen, ARM_NAMES)
        check_experiment([program], options)
        with console.status("loading"):
            from fst_dspy.cli.study_report import trial_line
            from fst_dspy.experiments import ExperimentStore
            from fst_dspy.experiments import compare as run_comparison
        folder = options.out or default_folder("compare", (program,), options.quick)
        failed = run_comparison(
            ExperimentStore(folder),
            make_plan(program, options),
            chosen,
            workers=options.workers,
            rl_trials=tune_rl,
            rl_budget_factor=rl_budget_factor,
            console=console,
            on_trial=lambda _study, trial: console.print(f"tuning rl_only: {trial_line(trial)}"),
        )
        finish(folder, options.results, failed)


@of_experiments()
def ablate(
    program: Program,
    options: Experiment,
    axes: Annotated[
        str | None,
        typer.Option(
            help=f"With commas: {', '.join(AXIS_NAMES)}; all if not given.",
            autocompletion=completed(AXIS_NAMES),
        ),
    ] = None,
) -> None:
    """Change one setting of FST at a time, to see what it is worth."""
    with errors_told(GO_ON):
        chosen = AXIS_NAMES if axes is None else axes.split(",")
        check_names("axis", chosen, AXIS_NAMES)
        check_experiment([program], options)
        with console.status("loading"):
            from fst_dspy.experiments import ExperimentStore
            from fst_dspy.experiments import ablate as run_ablation
        folder = options.out or default_folder("ablate", (program,), options.quick)
        failed = run_ablation(
            ExperimentStore(folder),
            make_plan(program, options),
            chosen,
            workers=options.workers,
            console=console,
        )
        finish(folder, options.results, failed)


@experiments.command()
def show(
    store: Annotated[Path, typer.Argument(help="The --out of an experiment.")],
    out: Annotated[Path | None, typer.Option(help=RESULTS)] = None,
    as_json: Json = False,
) -> None:
    """Write the tables and figures of a store, whatever has ended so far, and print them."""
    with results_as_json(as_json), errors_told(GO_ON):
        if not (store / "index.json").is_file():
            raise StoreError(f"{store} is no store of experiments; give the --out of one")
        _show(store, out, as_json)


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


def check_experiment(programs: Sequence[str], options: Experiment, *more: Any) -> None:
    """Check what an experiment was given before anything heavy is imported.

    Args:
        programs: All that it runs.
        options: The options that all experiments have.
        *more: Further settings, as they were given.

    Raises:
        FSTError: What cannot work.
    """
    for settings in (options.settings, *more):
        check_arguments(
            [*programs, *(options.forget_on or ())],
            options.model,
            parse_settings(settings),
            reflection_lm=options.reflection_lm,
            out=options.out,
        )


def make_plan(program: str, options: Experiment, **more: Any) -> Plan:
    """The plan of the options; what was not given is the plan's default, or the quick one's."""
    from fst_dspy.experiments import Plan
    from fst_dspy.experiments.plan import QUICK, QUICK_SETTINGS

    given = {
        "rollouts": options.rollouts,
        "seeds": options.seeds,
        "samples": options.samples,
        "test_size": options.test_size,
        "reflection_lm": options.reflection_lm,
        **more,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    fields["forget_on"] = tuple(options.forget_on or ())
    own = parse_settings(options.settings)
    return Plan(
        program,
        options.model,
        settings={**QUICK_SETTINGS, **own} if options.quick else own,
        **{**QUICK, **fields} if options.quick else fields,
    )


def finish(folder: Path, results: Path | None, failed: Sequence[str]) -> None:
    """Write and print what a store has found; fail where jobs did."""
    _show(folder, results)
    if failed:
        console.print(as_text(f"failed: {', '.join(failed)}", "red"))
        console.print("start it again to try them once more")
        raise typer.Exit(1)


def _show(folder: Path, out: Path | None, as_json: bool = False) -> None:
    with console.status("computing the tables"):
        from fst_dspy.experiments import write_results

        tables, files = write_results(folder, out)
    if as_json:
        plain = [asdict(table) for table in tables]
        print_json({"tables": plain, "written": [str(file) for file in files]})
        return
    for table in tables:
        console.print(table.rich(), soft_wrap=True)
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True)
