"""What reusing rollouts and showing demos are worth: ``fst ablate`` twice, and one figure.

    python benchmarks/quality/fast_channel.py --workers 2
    python benchmarks/quality/fast_channel.py --draw-only

Reuse is taken off on triage; demos are put on for list programs whose feedback shows only the right
lists. The stores are ``runs/fast_channel/AXIS``; tables and figure go to
``benchmarks/results/fast_channel``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import typer
from families import SETTINGS, TEST_SIZE, console, draw, runs_of

from fst_dspy.experiments import Plan, Run, ablate

STORES = Path("runs/fast_channel")
RESULTS = Path(__file__).parent.parent / "results" / "fast_channel"
PROGRAMS = {"reuse": ("triage", 5, 2400), "demos": ("list_program:tell=false", 3, 1600)}
"""By axis: the program, how many seeds, and the budget."""


def main(workers: int = 2, draw_only: bool = False) -> None:
    """Run what has not run yet, then write the tables and the figure."""
    found: dict[str, list[Run]] = {}
    for axis, (program, seeds, rollouts) in PROGRAMS.items():
        plan = Plan(program, rollouts=rollouts, seeds=seeds, settings=SETTINGS, test_size=TEST_SIZE)
        run = partial(ablate, plan=plan, axes=[axis], workers=workers, console=console)
        runs = runs_of(run, STORES / axis, RESULTS / axis, draw_only)
        found[f"{axis}: {program}"] = runs
    draw(found).savefig(RESULTS / "fast_channel.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
