"""The arms on all four program families: ``fst compare`` with its options set, and one figure.

    python benchmarks/families.py --workers 2
    python benchmarks/families.py --draw-only

The stores are ``runs/families/FAMILY-BUDGET``; started again, what has run is not run again. The
tables go to ``benchmarks/results/families``, in folders of the same names, and the figure beside
them. List programs are learned last and get the larger budget, but for ``gepa_only``, which stops
rising within 600 rollouts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fst_dspy.cli_experiments import compare
from fst_dspy.experiments import Run, load_runs, write_results
from fst_dspy.experiments.runs import by_label
from fst_dspy.experiments.show import open_store
from fst_dspy.notebook_figure import NotebookFigure
from fst_dspy.plots import drift_curves, score_curves

STORES = Path("runs/families")
RESULTS = Path(__file__).parent / "results" / "families"
ALL = "fst,gepa_only,rl_only"
PLANS = {
    "triage": {2400: ALL},
    "star_graph": {2400: ALL},
    "multihop": {2400: ALL},
    "list_program": {5000: "fst", 2400: "gepa_only,rl_only"},
}
"""By family: the arms of each budget."""
SETTINGS = ["max_tokens=64"]
COLOURS = {"fst": "C0", "gepa_only": "C1", "rl_only": "C3", "reuse=off": "C1", "demos=on": "C2"}


def main(
    families: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PLANS),
    seeds: int = 3,
    workers: int = 2,
    tune_rl: Annotated[int, typer.Option(help="Trials that rl_only is tuned by.")] = 8,
    draw_only: bool = False,
) -> None:
    """Run what has not run yet, then write the tables and the figure."""
    found: dict[str, list[Run]] = {}
    for family in families.split(","):
        found[family] = []
        for budget, arms in PLANS[family].items():
            out, results = STORES / f"{family}-{budget}", RESULTS / f"{family}-{budget}"
            results.mkdir(parents=True, exist_ok=True)
            if draw_only:
                write_results(out, results)
            else:  # which writes them itself
                compare(
                    family,
                    arms,
                    out=out,
                    seeds=seeds,
                    rollouts=budget,
                    workers=workers,
                    settings=SETTINGS,
                    tune_rl=tune_rl if "rl_only" in arms else 0,
                    samples=4,
                    test_size=100,
                    forget_on=[other for other in PLANS if other != family],
                    results=results,
                )
            found[family] += load_runs(open_store(out))
    draw(found).savefig(RESULTS / "families.png", dpi=130)


def draw(found: dict[str, list[Run]]) -> NotebookFigure:
    """Validation score against rollouts above, against KL below; a column a family."""
    figure = NotebookFigure(figsize=(3.1 * len(found), 5.6), layout="constrained")
    panels = figure.subplots(2, len(found), sharey=True, squeeze=False)
    for column, (family, runs) in enumerate(found.items()):
        above, below = panels[0][column], panels[1][column]
        for label, group in by_label(runs).items():
            colour = COLOURS.get(label, "C7")
            records = {f"{label}, {run.job.seed}": run.records for run in group}
            for axes, curves in ((above, score_curves(records)), (below, drift_curves(records))):
                for number, curve in enumerate(curves):
                    name = label if number == 0 else None
                    axes.plot(
                        curve.x, curve.y, ".-", color=colour, label=name, alpha=0.6, markersize=4
                    )
        above.set(title=family, xlabel="rollouts, all channels", ylim=(-0.02, 1.02))
        below.set(xlabel="KL to the base, nats a token")
        below.set_xscale("symlog", linthresh=0.001)
        below.set_xlim(left=-1e-4)
        for axes in (above, below):
            axes.grid(alpha=0.25)
    for row in panels:
        row[0].set(ylabel="validation score")
    for axes in panels[0]:
        axes.legend(frameon=False, fontsize=8, loc="center right")
    return figure


if __name__ == "__main__":
    typer.run(main)
