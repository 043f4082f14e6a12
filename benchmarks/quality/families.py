"""The arms on all program families: ``fst compare`` with its options set, and two figures.

    python benchmarks/quality/families.py --workers 2
    python benchmarks/quality/families.py --draw-only

A family has eight stores below ``runs/families``: ``FAMILY-rl`` for ``fst`` and tuned ``rl_only``,
with what they forget; ``FAMILY-others``, ``FAMILY-rivals``, ``FAMILY-taught`` (weights that learn
from the metric's text) and ``FAMILY-apart`` for the other arms;
``FAMILY-untuned`` for ``rl_only`` at the defaults, and ``FAMILY-same`` for ``fst`` at the settings
that ``rl_only`` was tuned to, where tuning chose others; and ``FAMILY-long`` for ``rl_only`` at
these on five times the budget, on three of the seeds. All families' first stores come first.
Started again, what has run is not run again. The tables go to ``benchmarks/results/families``, in
folders of the same names, each with its jobs in one file (``jobs.jsonl``), so that another machine
runs only what is missing; beside them the figures, ``against.md``, which sets ``fst`` against every
other arm family by family, and ``together.md``, which does so over all that have run. Families of
which more is to be learned get the larger budget.

Two families are there since they ask for both channels, chosen before any result was seen:
``long_policy`` has three times the rules that its instruction may hold, of topics some of which are
frequent, and ``hard_stars`` are wider and longer than what can be guessed. ``long_stars`` are there
for rewards that say nothing: their paths are longer than any that the model has walked, and it
finds none whatever its prompt says. They were chosen after one run of seed 0 was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.console import Console

from fst_dspy.cli.study_report import trial_line
from fst_dspy.experiments import (
    ExperimentStore,
    Plan,
    Run,
    compare,
    load_runs,
    pack,
    unpack,
    write_results,
)
from fst_dspy.experiments.findings.contrasts import mean_curve_on, to_best_cells
from fst_dspy.experiments.findings.over_families import (
    against_best,
    draw_over_families,
    over_families,
)
from fst_dspy.experiments.findings.show import open_store
from fst_dspy.experiments.findings.tables import Table, interval_text
from fst_dspy.experiments.packed import JOBS
from fst_dspy.experiments.runs import by_label, scores_by_seed
from fst_dspy.measures import paired_difference
from fst_dspy.results.notebook_figure import NotebookFigure
from fst_dspy.results.plots import drift_curves, score_curves

STORES = Path("runs/families")
RESULTS = Path(__file__).parent.parent / "results" / "families"
HEADLINE = "headline.png"
NAMES = {"fst": "FST", "gepa_only": "prompts alone", "rl_only": "weights alone (GRPO, tuned)"}
"""The arms of the figure on the first page, and what they are called there."""


@dataclass(frozen=True)
class Family:
    """A program, its budget in rollouts, and settings of its own."""

    program: str
    rollouts: int = 2400
    settings: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "triage": Family("triage"),
    "star_graph": Family("star_graph"),
    "multihop": Family("multihop"),
    "list_program": Family("list_program", 4800),
    "long_policy": Family("triage:topics=36,skew=1.0", 4800, {"instruction_tokens": 160}),
    "hard_stars": Family("star_graph:degree=16,length=4", 4800),
    "long_stars": Family("star_graph:degree=2,length=5", 4800),
}
ORDINARY = ("triage", "star_graph", "multihop", "list_program")
"""What others forget is measured on these."""
RL, UNTUNED, SAME, LONG = "rl", "untuned", "same", "long"
LONGER, LONG_SEEDS = 5, 3
LABELS = {UNTUNED: "rl_only-untuned", SAME: "fst-as-rl", LONG: f"rl_only-{LONGER}x"}
"""What the runs of a store are shown as, where its arms have the names of another store's."""
MARKED = 40
"""Most points of a curve that are marked one by one."""
STORES_OF = {
    RL: "fst,rl_only",
    "others": "gepa_only,sequential",
    "rivals": "sequential_10,sequential_25,sequential_75,fst_blind",
    "taught": "rl_both,sdpo,fst_both",
    UNTUNED: "rl_only",
    SAME: "fst",
    "apart": "sequential_reverse,fst_distill",
    LONG: "rl_only",
}
"""The arms of each store of a family."""
SETTINGS = {"max_tokens": 64}
TEST_SIZE = 100
console = Console()

COLOURS = {
    "fst": "C0",
    "gepa_only": "C1",
    "rl_only": "C3",
    "sequential": "C4",
    "sequential_reverse": "C8",
    "fst_distill": "C5",
    LABELS[SAME]: "C2",
    "reuse=off": "C1",
    "demos=on": "C2",
    "demos=off": "C1",
}


def main(
    families: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(FAMILIES),
    stores: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(STORES_OF),
    seeds: int = 5,
    workers: int = 2,
    tune_rl: Annotated[int, typer.Option(help="Trials that rl_only is tuned by.")] = 20,
    draw_only: bool = False,
    out: Annotated[Path, typer.Option(help="Where the jobs are kept.")] = STORES,
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = RESULTS,
) -> None:
    """Run what has not run yet, then write the tables and the figure."""
    found: dict[str, list[Run]] = {family: [] for family in families.split(",")}
    for kind, family in product(stores.split(","), found):
        own, store = FAMILIES[family], out / f"{family}-{kind}"
        settings = SETTINGS | own.settings
        if (results / store.name / JOBS).is_file():
            unpack(results / store.name / JOBS, store)
        if draw_only and not store.exists():
            continue
        chosen = tuned(out / f"{family}-{RL}", settings) if kind in LABELS else {}
        if kind in (UNTUNED, SAME) and not chosen:
            continue
        plan = Plan(
            own.program,
            rollouts=own.rollouts * (LONGER if kind == LONG else 1),
            seeds=min(seeds, LONG_SEEDS) if kind == LONG else seeds,
            settings=settings | (chosen if kind in (SAME, LONG) else {}),
            test_size=TEST_SIZE,
            forget_on=tuple(
                name
                for name in ORDINARY
                if kind in (RL, UNTUNED) and name != own.program.partition(":")[0]
            ),
        )
        run = partial(
            compare,
            plan=plan,
            arms=STORES_OF[kind].split(","),
            workers=workers,
            rl_trials=tune_rl if kind == RL else 0,
            console=console,
            on_trial=lambda _study, trial: console.print(f"tuning rl_only: {trial_line(trial)}"),
        )
        runs = runs_of(run, store, results / store.name, draw_only)
        if kind in LABELS:
            runs = [replace(one, job=replace(one.job, label=LABELS[kind])) for one in runs]
        found[family] += runs
    if found := {family: runs for family, runs in found.items() if "fst" in by_label(runs)}:
        draw(found).savefig(results / "families.png", dpi=130)
        (results / "against.md").write_text(against(found).markdown())
        tables = (over_families(found), against_best(found))
        (results / "together.md").write_text("\n".join(one.markdown() for one in tables))
        if all(NAMES.keys() <= by_label(runs).keys() for runs in found.values()):
            headline = draw_over_families(found, NAMES, COLOURS)
            headline.savefig(results.parent / HEADLINE, dpi=130)


def tuned(store: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that ``rl_only`` was tuned to in a store, beside those that were given.

    None where those of the first trial, which are the defaults, were the best.
    """
    study = open_store(store).about["tuned_rl"]["rl_only"]
    chosen = {name: value for name, value in study["settings"].items() if name not in given}
    return {} if chosen == study["trials"][0]["settings"] else chosen


def runs_of(
    run: Callable[[ExperimentStore], list[str]], folder: Path, results: Path, draw_only: bool
) -> list[Run]:
    """Run a protocol on a store, or only write its tables; the runs that are in it."""
    results.mkdir(parents=True, exist_ok=True)
    store = ExperimentStore(folder)
    if not draw_only and (failed := run(store)):
        console.print(f"failed, tried again on the next call: {', '.join(failed)}")
    write_results(folder, results)
    pack(store, results / JOBS)
    return load_runs(store)


def against(found: dict[str, list[Run]]) -> Table:
    """``fst`` against every other arm, on the seeds that both have."""
    rows = []
    for family, runs in found.items():
        groups = by_label(runs)
        ours = groups.pop("fst")
        for label, group in groups.items():
            tests = paired_difference(scores_by_seed(ours), scores_by_seed(group))
            mine, theirs = (mean_curve_on(runs, tests.seeds) for runs in (ours, group))
            x, their_x, times = to_best_cells(mine, theirs)
            test = fmean(scores_by_seed(group)[seed] for seed in tests.seeds)
            cells = (f"{test:.3f}", interval_text(tests.difference), their_x, x, times)
            rows.append((family, label, str(len(tests.seeds)), *cells))
    return Table(
        "fst against every other arm",
        (
            "family",
            "arm",
            "seeds",
            "test",
            "fst minus it",
            "rollouts to its best",
            "fst's",
            "times",
        ),
        tuple(rows),
        "Test: of the arm. fst minus it: paired by seed, 95 % interval. Then the rollouts of all "
        "channels until the mean curve of the validation score is at the best that the arm's comes "
        "to, and those until fst's is there.",
    )


def is_long(run: Run) -> bool:
    """Whether a run had several times the budget of the others."""
    return run.job.label == LABELS[LONG]


def draw(found: dict[str, list[Run]]) -> NotebookFigure:
    """Validation score against rollouts above, against KL below; a column a family.

    Long runs, which would squeeze the others, are left out.
    """
    figure = NotebookFigure(figsize=(3.1 * len(found), 5.6), layout="constrained")
    panels = figure.subplots(2, len(found), sharey=True, squeeze=False)
    for column, (family, runs) in enumerate(found.items()):
        above, below = panels[0][column], panels[1][column]
        for label, group in by_label([run for run in runs if not is_long(run)]).items():
            colour = COLOURS.get(label, "C7")
            records = {f"{label}, {run.job.seed}": run.records for run in group}
            for axes, curves in ((above, score_curves(records)), (below, drift_curves(records))):
                for number, curve in enumerate(curves):
                    name = label if number == 0 else None
                    line = ".-" if len(curve.x) <= MARKED else "-"
                    axes.plot(
                        curve.x, curve.y, line, color=colour, label=name, alpha=0.6, markersize=4
                    )
        above.set(title=family, xlabel="rollouts, all channels", ylim=(-0.02, 1.02))
        below.set(xlabel="KL to the base, nats a token")
        below.set_xscale("symlog", linthresh=0.001)
        below.set_xlim(left=-1e-4)
        for axes in (above, below):
            axes.grid(alpha=0.25)
    for row in panels:
        row[0].set(ylabel="validation score")
    lines = [line for axes in panels[0] for line in axes.get_lines()]
    named = {line.get_label(): line for line in lines if not line.get_label().startswith("_")}
    figure.legend(
        handles=list(named.values()),
        loc="outside lower center",
        ncols=len(named),
        frameon=False,
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    typer.run(main)
