"""What a store found, as files: ``results.md``, ``results.json`` and, for arms, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fst_dspy.errors import DataError, StoreError
from fst_dspy.experiments import contrasts, tables
from fst_dspy.experiments.jobs import write_json
from fst_dspy.experiments.runner import INDEX, ExperimentStore
from fst_dspy.experiments.runs import PAIR, QUADRANTS, Run, load_runs
from fst_dspy.experiments.tables import Table
from fst_dspy.store import write_atomically


def open_store(folder: Path) -> ExperimentStore:
    """A store that exists.

    Raises:
        StoreError: There is none.
    """
    if not (folder / INDEX).is_file():
        raise StoreError(f"{folder} is no store of experiments; fst compare makes one")
    return ExperimentStore(folder)


def make_tables(store: ExperimentStore, runs: Sequence[Run]) -> list[Table]:
    """All tables that the store's runs fill."""
    axes = store.about.get("axes")
    if axes is not None:
        own: list[Table | None] = [contrasts.ablations(runs, axes)]
    else:
        own = [tables.summary(runs), contrasts.against_rl(runs), contrasts.asymptotes(runs)]
    shared = [
        tables.quadrant_table(runs),
        tables.forgetting_table(runs),
        tables.tuning(store.about),
        tables.every_seed(runs),
        missing(store),
    ]
    return [table for table in (*own, *shared) if table is not None and table.rows]


def missing(store: ExperimentStore) -> Table:
    """The jobs without an outcome, and why."""
    rows = [
        (name, status.state, status.error or "")
        for name, status in store.status.items()
        if not store.is_done(name)
    ]
    return Table("Not in these tables", ("job", "state", "error"), tuple(rows))


def write_results(folder: Path, out: Path | None = None) -> tuple[list[Table], list[Path]]:
    """Write what a store has found so far.

    Args:
        folder: The store.
        out: Where to; the store itself if not given.

    Returns:
        The tables, and the files written.

    Raises:
        StoreError: There is no store.
        DataError: None of its runs has ended yet.
    """
    store, out = open_store(folder), out or folder
    runs = load_runs(store)
    if not runs:
        raise DataError(f"no run of {folder} has ended yet")
    found = make_tables(store, runs)
    text = "\n".join([*heading(store, runs), *(table.markdown() for table in found)])
    files = [out / "results.md", out / "results.json"]
    write_atomically(files[0], lambda file: file.write(text.encode()))
    write_json(files[1], {"about": store.about, "calls": store.calls, "runs": rows(runs)})
    if "axes" not in store.about:
        files.append(out / "comparison.png")
        draw(runs, files[-1])
    return found, files


def heading(store: ExperimentStore, runs: Sequence[Run]) -> list[str]:
    """What ran, from which command, at which commit."""
    job = runs[0].job
    lines = [f"# {store.about.get('protocol', 'experiments')}: {job.program} on {job.model}", ""]
    lines += [f"- `{call['command']}`, revision `{call['revision']}`" for call in store.calls]
    environment = ", ".join(f"{name} {value}" for name, value in store.environment.items())
    lines += [
        f"- model version `{runs[0].outcome.base_version}`; {environment}",
        f"- {len(runs)} runs; test: {len(runs[0].outcome.test[PAIR])} examples at the "
        "sampling temperature",
    ]
    return [*lines, ""]


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs as plain values: job, outcome and curve, without the scores of every example."""
    return [
        {
            "job": asdict(run.job),
            "outcome": {
                **asdict(run.outcome),
                "test": {name: run.quadrant(name) for name in QUADRANTS},
            },
            "curve": [
                {
                    "rollouts": record.total_rollouts.total,
                    "step": record.step,
                    "val_score": record.val_score,
                    "train_reward": record.train_reward,
                    "kl_to_base": record.kl_to_base,
                    "entropy": record.entropy,
                }
                for record in run.records
            ],
        }
        for run in runs
    ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Validation score against rollouts and against KL, a curve a run."""
    from fst_dspy.plots import draw_comparison

    job = runs[0].job
    figure = draw_comparison(
        {f"{run.job.label}, seed {run.job.seed}": run.records for run in runs},
        f"{job.program} on {job.model}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
