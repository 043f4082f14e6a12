"""The commands ``fst plasticity`` and ``fst continual``."""

from __future__ import annotations

from typing import Annotated

import typer

from fst_dspy.cli.checks import check_names
from fst_dspy.cli.experiments import check_experiment, default_folder, finish, make_plan
from fst_dspy.cli.options import (
    ARMS_IN_HELP,
    GO_ON,
    STREAM_ARM_NAMES,
    TRAINING_ARM_NAMES,
    Experiment,
    completed,
    console,
    errors_told,
    of_experiments,
    parse_settings,
)

TrainingArms = Annotated[
    str,
    typer.Option(
        help=f"{ARMS_IN_HELP.replace(' gepa_only,', '')}.",
        autocompletion=completed(TRAINING_ARM_NAMES),
    ),
]
StreamArms = Annotated[
    str,
    typer.Option(
        help=f"With commas: {', '.join(STREAM_ARM_NAMES)}.",
        autocompletion=completed(STREAM_ARM_NAMES),
    ),
]
RLSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--rl-set",
        help="A setting of rl_only alone, such as fst compare --tune-rl found; repeat for more.",
    ),
]


@of_experiments()
def plasticity(
    first: Annotated[
        str, typer.Argument(help="The program that every arm learns first.", show_default=False)
    ],
    second: Annotated[
        str, typer.Argument(help="The program that rl_only learns then.", show_default=False)
    ],
    options: Experiment,
    arms: TrainingArms = "fst,rl_only",
    second_rollouts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Budget of a run on the second program; --rollouts if not given.",
        ),
    ] = None,
    rl_settings: RLSettings = None,
) -> None:
    """See how well another task is learned afterwards: fresh RL from each arm's weights."""
    with errors_told(GO_ON):
        check_names("arm", arms.split(","), TRAINING_ARM_NAMES)
        check_experiment([first, second], options, rl_settings)
        with console.status("loading"):
            from fst_dspy.experiments import ExperimentStore
            from fst_dspy.experiments import plasticity as run_plasticity
        folder = options.out or default_folder("plasticity", (first, second), options.quick)
        failed = run_plasticity(
            ExperimentStore(folder),
            make_plan(first, options),
            second,
            arms.split(","),
            second_rollouts=second_rollouts,
            rl_settings=parse_settings(rl_settings),
            workers=options.workers,
            console=console,
        )
        finish(folder, options.results, failed)


@of_experiments("forget_on")
def continual(
    programs: Annotated[
        list[str],
        typer.Argument(
            help="The stages in order; one that is named again is learned again.",
            show_default=False,
        ),
    ],
    options: Experiment,
    arms: StreamArms = "fst,rl_only",
    rl_settings: RLSettings = None,
    seed_prompt: Annotated[
        str | None,
        typer.Option(help="What every task is instructed with at first; by default nothing much."),
    ] = None,
) -> None:
    """Learn tasks one after another in one run, every task tested at every stage."""
    with errors_told(GO_ON):
        check_names("arm", arms.split(","), STREAM_ARM_NAMES)
        check_experiment(programs, options, rl_settings)
        with console.status("loading"):
            from fst_dspy.experiments import SEED_PROMPT, ExperimentStore
            from fst_dspy.experiments import continual as run_stream
        stages = tuple(dict.fromkeys(programs))
        folder = options.out or default_folder("continual", stages, options.quick)
        failed = run_stream(
            ExperimentStore(folder),
            make_plan(programs[0], options, instructions=seed_prompt or SEED_PROMPT),
            programs[1:],
            arms.split(","),
            rl_settings=parse_settings(rl_settings),
            workers=options.workers,
            console=console,
        )
        finish(folder, options.results, failed)
