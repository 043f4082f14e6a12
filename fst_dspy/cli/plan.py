"""``fst plan``: what a compile will take, without running it."""

from __future__ import annotations

from typing import Annotated

import typer

from fst_dspy.cli.checks import check_arguments, check_settings
from fst_dspy.cli.options import (
    ArmOption,
    Json,
    Model,
    Preset,
    Program,
    Seed,
    Settings,
    console,
    errors_told,
    parse_settings,
    print_json,
)
from fst_dspy.display import table


def plan(
    program: Program,
    model: Model = "embedded",
    seed: Seed = 0,
    arm: ArmOption = "fst",
    auto: Preset = None,
    settings: Settings = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Tell memory, time and settings of a compile, from the model's config.json alone."""
    with errors_told():
        given = parse_settings(settings)
        check_arguments([program], model, given, auto=auto, arm=arm)
        from fst_dspy.tasks import load_task

        task = load_task(program, seed)
        from fst_dspy.plan.files import plan_of_files

        found = plan_of_files(
            model,
            task.program,
            task.trainset,
            check_settings(given, auto, arm),
            device=device,
            arm=arm,
            val_examples=len(task.valset),
        )
        if as_json:
            print_json(found.to_dict())
        else:
            console.print(table(("", ""), list(found.lines()), task.name, left=2))
        if found.problems:
            raise typer.Exit(1)
