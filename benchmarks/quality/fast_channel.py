"""What reusing rollouts and showing demos are worth: ``fst ablate`` twice, and one figure.

    python benchmarks/quality/fast_channel.py --workers 2
    python benchmarks/quality/fast_channel.py --draw-only

Reuse is taken off on triage; demos are taken off, and put on from the start, for list programs and
star graphs whose feedback shows what is right and states no rule. The stores are
``runs/fast_channel/STORE``; tables and figure go to
``benchmarks/results/fast_channel``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from families import SETTINGS, TEST_SIZE, console, draw, runs_of

from fst_dspy.experiments import Plan, Run, ablate

STORES = Path("runs/fast_channel")
RESULTS = Path(__file__).parent.parent / "results" / "fast_channel"
PROGRAMS = {
    "reuse": ("reuse", "triage", 5, 2400),
    "demos": ("demos", "list_program:tell=false", 5, 1600),
    "demos_of_stars": ("demos", "star_graph:tell=false", 5, 1600),
}
"""By store: the axis, the program, how many seeds, and the budget."""


def main(
    stores: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PROGRAMS),
    workers: int = 2,
    draw_only: bool = False,
    out: Annotated[Path, typer.Option(help="Where the jobs are kept.")] = STORES,
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = RESULTS,
) -> None:
    """Run what has not run yet, then write the tables and the figure."""
    found: dict[str, list[Run]] = {}
    for store in stores.split(","):
        axis, program, seeds, rollouts = PROGRAMS[store]
        plan = Plan(program, rollouts=rollouts, seeds=seeds, settings=SETTINGS, test_size=TEST_SIZE)
        run = partial(ablate, plan=plan, axes=[axis], workers=workers, console=console)
        runs = runs_of(run, out / store, results / store, draw_only)
        found[f"{axis}: {program}"] = runs
    draw(found).savefig(results / "fast_channel.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
