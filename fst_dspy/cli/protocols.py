"""The commands ``fst plasticity`` and ``fst continual``."""

from __future__ import annotations

from typing import Annotated

import typer

from fst_dspy.cli.experiments import default_folder, finish, make_plan
from fst_dspy.cli.options import (
    GO_ON,
    ForgetOn,
    Model,
    Out,
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

Arms = Annotated[str, typer.Option(help="Comma-separated.")]
RLSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--rl-set",
        help="A setting of rl_only alone, such as fst compare --tune-rl found; repeat for more.",
    ),
]


def plasticity(
    first: Annotated[
        str, typer.Argument(help="The program that every arm learns first.", show_default=False)
    ],
    second: Annotated[
        str, typer.Argument(help="The program that rl_only learns then.", show_default=False)
    ],
    arms: Arms = "fst,rl_only",
    out: Out = None,
    model: Model = "embedded",
    seeds: Seeds = None,
    rollouts: Rollouts = None,
    second_rollouts: Annotated[
        int | None,
        typer.Option(min=1, help="Budget of a run on the second program; --rollouts if not given."),
    ] = None,
    workers: Workers = 1,
    settings: Settings = None,
    rl_settings: RLSettings = None,
    samples: Samples = None,
    test_size: TestSize = None,
    forget_on: ForgetOn = None,
    reflection_lm: ReflectionLM = None,
    quick: Quick = False,
    results: Results = None,
) -> None:
    """See how well another task is learned afterwards: fresh RL from each arm's weights."""
    with errors_told(GO_ON):
        with console.status("loading"):
            from fst_dspy.experiments import ExperimentStore
            from fst_dspy.experiments import plasticity as run_plasticity
        plan = make_plan(
            first,
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
        folder = out or default_folder("plasticity", (first, second), quick)
        failed = run_plasticity(
            ExperimentStore(folder),
            plan,
            second,
            arms.split(","),
            second_rollouts=second_rollouts,
            rl_settings=parse_settings(rl_settings),
            workers=workers,
            console=console,
        )
        finish(folder, results, failed)


def continual(
    programs: Annotated[
        list[str],
        typer.Argument(
            help="The stages in order; one that is named again is learned again.",
            show_default=False,
        ),
    ],
    arms: Arms = "fst,rl_only",
    out: Out = None,
    model: Model = "embedded",
    seeds: Seeds = None,
    rollouts: Annotated[
        int | None,
        typer.Option(min=1, help="Budget of a stage, all channels counted; 3000 if not given."),
    ] = None,
    workers: Workers = 1,
    settings: Settings = None,
    rl_settings: RLSettings = None,
    seed_prompt: Annotated[
        str | None,
        typer.Option(help="What every task is instructed with at first; by default nothing much."),
    ] = None,
    samples: Samples = None,
    test_size: TestSize = None,
    reflection_lm: ReflectionLM = None,
    quick: Quick = False,
    results: Results = None,
) -> None:
    """Learn tasks one after another in one run, every task tested at every stage."""
    with errors_told(GO_ON):
        with console.status("loading"):
            from fst_dspy.experiments import SEED_PROMPT, ExperimentStore
            from fst_dspy.experiments import continual as run_stream
        plan = make_plan(
            programs[0],
            model,
            quick,
            settings,
            seeds=seeds,
            rollouts=rollouts,
            samples=samples,
            test_size=test_size,
            reflection_lm=reflection_lm,
            instructions=seed_prompt or SEED_PROMPT,
        )
        folder = out or default_folder("continual", tuple(dict.fromkeys(programs)), quick)
        failed = run_stream(
            ExperimentStore(folder),
            plan,
            programs[1:],
            arms.split(","),
            rl_settings=parse_settings(rl_settings),
            workers=workers,
            console=console,
        )
        finish(folder, results, failed)
