"""The command ``fst tune``; what it shows and writes is in ``study_report.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fst_dspy import distributed
from fst_dspy.cli.checks import check_arguments, check_names
from fst_dspy.cli.options import (
    MEASURE_NAMES,
    ArmOption,
    Model,
    Program,
    ReflectionLM,
    Seed,
    Settings,
    completed,
    console,
    errors_told,
    parse_settings,
)
from fst_dspy.errors import ConfigError


def tune(
    program: Program,
    model: Model = "embedded",
    out: Annotated[
        Path, typer.Option(help="The study's folder; started again with it, a study goes on.")
    ] = Path("runs/study"),
    trials: Annotated[
        int, typer.Option(metavar="N", min=1, help="Trials in all, earlier ones counted.")
    ] = 20,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that run trials.")
    ] = 1,
    rollouts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rollout budget of a trial.")
    ] = 3000,
    objective: Annotated[
        str,
        typer.Option(
            help="score, or several with commas, of score, kl_to_base and rollouts, for a front.",
            autocompletion=completed(MEASURE_NAMES),
        ),
    ] = "score",
    at_most: Annotated[
        list[str] | None, typer.Option(help="Upper limit, such as kl_to_base=0.1; repeat for more.")
    ] = None,
    at_least: Annotated[
        list[str] | None, typer.Option(help="Lower limit, such as score=0.5; repeat for more.")
    ] = None,
    pruner: Annotated[
        Literal["median", "asha", "hyperband", "none"],
        typer.Option(help="What ends trials that do badly."),
    ] = "median",
    space: Annotated[Path | None, typer.Option(help="YAML file of the search space.")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Address of an SQLite, journal or PostgreSQL database; SQLite in --out."),
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
    with errors_told(f"interrupted; start it again with --out {out} to go on"):
        fixed = parse_settings(settings)
        check_arguments([program], model, fixed, arm=arm, reflection_lm=reflection_lm, out=out)
        upper, lower = _limits("--at-most", at_most), _limits("--at-least", at_least)
        measures = objective.split(",")
        check_names("measure", [*measures, *upper, *lower], MEASURE_NAMES)
        if space is not None and not space.is_file():
            raise ConfigError(f"there is no file {space}; --space takes a YAML file")
        with console.status("loading"):
            import dspy

            from fst_dspy.cli.study_report import tune_and_report
            from fst_dspy.study import Objective, load_space

        goal = Objective(tuple(measures), rollouts, upper, pruner, lower)
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
            fixed=fixed,
            reflection_lm=dspy.LM(reflection_lm) if reflection_lm else None,
        )


def _limits(option: str, given: list[str] | None) -> dict[str, float]:
    """Limits by measure, such as ``{"kl_to_base": 0.1}``.

    Raises:
        ConfigError: One is no number.
    """
    limits = parse_settings(given, option)
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{option} {name} must be a number, got {value!r}")
    return limits
