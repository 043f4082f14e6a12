"""What a store found, as files: ``results.md``, ``results.json`` and its protocol's figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_dspy.errors import DataError, StoreError
from fst_dspy.experiments.findings import contrasts, stream_tables, tables
from fst_dspy.experiments.findings.plasticity_tables import (
    Probe,
    every_probe,
    plasticity_table,
    probes,
)
from fst_dspy.experiments.findings.tables import Table
from fst_dspy.experiments.jobs import Job, write_json
from fst_dspy.experiments.runner import INDEX, ExperimentStore
from fst_dspy.experiments.runs import PAIR, QUADRANTS, Run, load_runs
from fst_dspy.experiments.streams import Stream, load_streams
from fst_dspy.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def open_store(folder: Path) -> ExperimentStore:
    """A store that exists.

    Raises:
        StoreError: There is none.
    """
    if not (folder / INDEX).is_file():
        raise StoreError(f"{folder} is no store of experiments; fst compare makes one")
    return ExperimentStore(folder)


@dataclass(frozen=True)
class Found:
    """What of a store has ended: single runs, and streams of tasks."""

    store: ExperimentStore
    runs: tuple[Run, ...]
    streams: tuple[Stream, ...]

    @property
    def about(self) -> Mapping[str, Any]:
        """What the protocol noted down."""
        return self.store.about

    @property
    def probes(self) -> dict[str, list[Probe]]:
        """The runs of a second task; none but in a store of ``fst plasticity``."""
        return probes(self.runs, self.about["starts"]) if "starts" in self.about else {}

    @property
    def job(self) -> Job:
        """One of those that have ended."""
        return (self.streams or self.runs)[0].job

    @property
    def title(self) -> str:
        """Which programs, on which model."""
        programs = [self.job.program, *self.job.then]
        if "starts" in self.about:
            programs = list(dict.fromkeys(run.job.program for run in self.runs))
        return f"{', then '.join(programs)} on {self.job.model}"


def make_tables(found: Found) -> list[Table]:
    """All tables that the store's runs fill."""
    runs, about = found.runs, found.about
    own: list[Table | None]
    if found.streams:
        own = [
            table(found.streams, runs)
            for table in (stream_tables.stage_table, stream_tables.task_table)
        ]
        own.append(stream_tables.every_stage(found.streams, runs))
    elif "starts" in about:
        own = [plasticity_table(found.probes), every_probe(found.probes)]
    elif "axes" in about:
        own = [contrasts.ablations(runs, about["axes"])]
    elif runs:
        own = [
            tables.summary(runs),
            contrasts.against_rl(runs),
            contrasts.mean_curves(runs),
            contrasts.asymptotes(runs),
        ]
    else:
        own = []
    if runs:
        own += [tables.quadrant_table(runs), tables.forgetting_table(runs)]
    own += [*tables.tuning(about), tables.every_seed(runs), missing(found.store)]
    return [table for table in own if table is not None and table.rows]


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
    found = Found(store, tuple(load_runs(store)), tuple(load_streams(store)))
    if not (found.runs or found.streams):
        raise DataError(f"no run of {folder} has ended yet")
    made = make_tables(found)
    text = "\n".join([*heading(found), *(table.markdown() for table in made)])
    files = [out / "results.md", out / "results.json"]
    write_atomically(files[0], lambda file: file.write(text.encode()))
    plain = {"about": store.about, "calls": store.calls, "runs": rows(found.runs)}
    if found.streams:
        plain["streams"] = [{"job": asdict(s.job), **asdict(s.outcome)} for s in found.streams]
    write_json(files[1], plain)
    drawn = draw(found)
    if drawn is not None:
        name, figure = drawn
        files.append(out / name)
        figure.savefig(files[-1], dpi=130)
    return made, files


def draw(found: Found) -> tuple[str, Figure] | None:
    """The protocol's figure, with the name of its file."""
    from fst_dspy.experiments.findings import figures
    from fst_dspy.results.plots import draw_comparison

    if found.streams:
        return "stages.png", figures.draw_stages(found.streams, found.runs, found.title)
    if found.probes:
        return "plasticity.png", figures.draw_plasticity(found.probes, found.title)
    if found.about.get("protocol") != "compare":
        return None
    records = {f"{run.job.label}, seed {run.job.seed}": run.records for run in found.runs}
    return "comparison.png", draw_comparison(records, found.title)


def heading(found: Found) -> list[str]:
    """What ran, from which command, at which commit."""
    store = found.store
    lines = [f"# {store.about.get('protocol', 'experiments')}: {found.title}", ""]
    lines += [f"- `{call['command']}`, revision `{call['revision']}`" for call in store.calls]
    environment = ", ".join(f"{name} {value}" for name, value in store.environment.items())
    version = (found.streams or found.runs)[0].outcome.base_version
    lines.append(f"- model version `{version}`; {environment}")
    if found.streams:
        lines.append(f"- {len(found.streams)} streams and {len(found.runs)} single runs")
    else:
        lines.append(
            f"- {len(found.runs)} runs; test: {len(found.runs[0].outcome.test[PAIR])} examples at "
            f"temperature {found.job.test_temperature:g}"
        )
    if found.job.instructions is not None:
        lines.append(f"- every task begins with the instruction: {found.job.instructions!r}")
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
