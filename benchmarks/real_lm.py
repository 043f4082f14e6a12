"""SmolLM2 on tasks that were not made for it: what ``make real`` runs, a job at a time.

    python benchmarks/real_lm.py                                     # all of it: hours
    python benchmarks/real_lm.py --limit 1                           # the next job, some 10 minutes
    python benchmarks/real_lm.py --tasks routing --adapters xml --arms fst --seeds 1

A job is a task, an adapter, an arm and a seed, on one budget of rollouts that all channels draw
from. Started again, what has run is not run again, and what was stopped goes on. The stores are
``runs/real/MODEL-TASK-ADAPTER``; the tables of each go to ``benchmarks/results/real``, in folders
of the same names with its jobs in one file, so that another machine runs only what is missing.
``overview.md`` there has a line an arm of each, and what ``fst`` is above the others by over all
stores of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fst_dspy.cli.checks import check_names
from fst_dspy.cli.options import errors_told, parse_settings
from fst_dspy.errors import ConfigError
from fst_dspy.experiments import ARMS as ARM_STAGES
from fst_dspy.experiments import (
    ExperimentStore,
    Plan,
    Run,
    load_runs,
    pack,
    run_jobs,
    unpack,
    write_results,
)
from fst_dspy.experiments.findings.tables import Table, interval_text
from fst_dspy.experiments.jobs import ADAPTERS
from fst_dspy.experiments.packed import JOBS
from fst_dspy.experiments.runs import by_label, scores_by_seed
from fst_dspy.experiments.tuned_rl import tune_rl as tune_rl_only
from fst_dspy.files import write_atomically
from fst_dspy.measures import mean_interval

STORES = Path("runs/real")
RESULTS = Path(__file__).parent / "results" / "real"
OURS, TUNED = "fst", "rl_only-tuned"
ARMS = "fst,rl_only,gepa_only,sequential"
ROLLOUTS = 1600
SETTINGS: Mapping[str, Any] = {
    "max_tokens": 64,
    "val_size": 32,
    "group_size": 8,
    "problems_per_step": 8,
}
SPLITS = "train=120,val=48,test=64"


@dataclass(frozen=True)
class RealTask:
    """A program with its arguments, and settings of its own."""

    program: str
    settings: Mapping[str, Any] = field(default_factory=dict)


TASKS: Mapping[str, RealTask] = {
    "routing": RealTask(f"routing:{SPLITS}"),
    "color_cube": RealTask(f"gym:dataset=color_cube_rotation,reasoning=false,{SPLITS}"),
    "calendar": RealTask(f"gym:dataset=calendar_arithmetic,reasoning=false,{SPLITS}"),
}
"""Of reasoning-gym two datasets on which SmolLM2 under its adapter was right 7 % and 17 % of the
time before it was trained on them (120 questions each, temperature 1, no reasoning, held to the
formats of ChatAdapter and XMLAdapter), chosen for that alone out of the 28 that were tried. With
reasoning it was right 2 % and 5 % of the time; without its adapter on none of the 14 tried."""


def make_plan(model: str, task: str, adapter: str, rollouts: int, settings: Sequence[str]) -> Plan:
    """The common footing of a store's jobs."""
    chosen = TASKS[task]
    return Plan(
        program=chosen.program,
        model=model,
        rollouts=rollouts,
        settings={**SETTINGS, **chosen.settings, **parse_settings(settings)},
        samples=2,
        adapter=adapter,
    )


def run(
    store: ExperimentStore,
    plan: Plan,
    arms: Sequence[str],
    seeds: Sequence[int],
    *,
    limit: int,
    workers: int,
    rl_trials: int,
) -> tuple[int, list[str]]:
    """Run what has not run yet of a store, ``limit`` jobs at most.

    Returns:
        How many it tried, and the names of those that failed.

    Raises:
        StoreError: The store has such jobs with other settings.
    """
    with store.locked():
        store.begin("compare")
        plan = replace(plan, seeds=max(seeds) + 1)
        jobs = [job for arm in arms for job in plan.jobs(arm, arm)]
        if rl_trials:
            tuned = tune_rl_only(store, plan, rl_trials, TUNED, workers=workers)
            jobs += plan.jobs(TUNED, "rl_only", tuned)
        jobs = [job for job in jobs if job.seed in seeds and not store.is_done(job.name)]
        # Seed by seed: a store that is looked at early compares whole seeds.
        jobs = sorted(jobs, key=lambda job: job.seed)[:limit]
        return len(jobs), run_jobs(store, jobs, workers=workers)


def overview(found: Mapping[str, Sequence[Run]]) -> Table:
    """A line an arm of each store."""
    rows = []
    for name, runs in found.items():
        for label, group in by_label(runs).items():
            first, last = ([run.records[place] for run in group] for place in (0, -1))
            base = [run.quadrant("base_original") for run in group]
            rows.append(
                (
                    name,
                    label,
                    str(len(group)),
                    interval_text(mean_interval(base)),
                    interval_text(mean_interval(list(scores_by_seed(group).values()))),
                    _share([record.format_share for record in first]),
                    _share([record.format_share for record in last]),
                    f"{_mean([sum(record.failure_shares.values()) for record in last]):.3f}",
                    f"{_mean([run.outcome.kl_to_base for run in group]):.3f}",
                    f"{_mean([run.outcome.rollouts.total for run in group]):.0f}",
                    f"{_mean([run.train_seconds for run in group]):.0f}",
                )
            )
    return Table("SmolLM2 on real tasks", HEADS, tuple(rows), NOTE)


def together(found: Mapping[str, Sequence[Run]]) -> Table:
    """What ``fst`` is above the other arms by, over all stores of a model."""
    rows = []
    for model in dict.fromkeys(runs[0].job.model for runs in found.values()):
        own = [runs for runs in found.values() if runs[0].job.model == model]
        for label in dict.fromkeys(run.job.label for runs in own for run in runs):
            # Adapters share the examples of a task's seed, so they make one value of it.
            values: dict[tuple[str, int], list[tuple[float, float]]] = {}
            for runs in own:
                for seed, pair in _pairs(runs, label).items():
                    values.setdefault((runs[0].job.program, seed), []).append(pair)
            if label == OURS or not values:
                continue
            tests, gains = zip(
                *(map(_mean, zip(*v, strict=True)) for v in values.values()), strict=True
            )
            runs_of_both = str(sum(map(len, values.values())))
            span = interval_text(mean_interval(gains))
            rows.append((model, label, runs_of_both, str(len(values)), f"{_mean(tests):.3f}", span))
    return Table(
        "fst against each arm, all stores of a model",
        ("model", "arm", "runs", "values", "test", "fst minus it"),
        tuple(rows),
        "Over the tasks, adapters and seeds that both have. The adapters of a task share its "
        "examples of a seed, so that their mean is one value; 95 % interval (Student t).",
    )


def _pairs(runs: Sequence[Run], label: str) -> dict[int, tuple[float, float]]:
    """The test of an arm, and what ``fst`` is above it by, of each seed that both have."""
    groups = by_label(runs)
    ours, theirs = (scores_by_seed(groups.get(name, ())) for name in (OURS, label))
    return {n: (theirs[n], ours[n] - theirs[n]) for n in sorted(ours.keys() & theirs.keys())}


HEADS = (
    "store",
    "arm",
    "seeds",
    "test before",
    "test after",
    "format before",
    "format after",
    "failed",
    "KL",
    "rollouts",
    "seconds",
)
NOTE = (
    "Test: mean score of held-out examples, of the model and prompt as they came and of the best "
    "pair, held to the format where the run was, with 95 % intervals over seeds. Format: how often "
    "answers would keep to it if they were not held to it, in the first validation and the last, "
    "where they were (of revision f16c856: mean share of probability of the tokens that are not "
    "forced; of 630ab22: the end behind an answer counted as well). Failed: share of the last "
    "cycle's rollouts. KL: to the model as it came, nats a token. Rollouts: of all "
    "channels. Seconds: without the test."
)


def _share(found: Sequence[float | None]) -> str:
    """Their mean; of runs that were held to a format all have one."""
    held = [share for share in found if share is not None]
    return f"{_mean(held):.2f}" if held else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main(
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(TASKS),
    adapters: Annotated[str, typer.Option(help="Comma-separated: chat, xml, json.")] = "chat,xml",
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = ARMS,
    seeds: Annotated[str, typer.Option(help="Comma-separated numbers.")] = "0,1,2",
    model: Annotated[
        str, typer.Option(help="As for LocalLM, or another of its names.")
    ] = "smollm2",
    rollouts: Annotated[int, typer.Option(min=1, help="Budget of a job.")] = ROLLOUTS,
    limit: Annotated[int, typer.Option(min=0, help="Jobs that this call runs at most.")] = 10**6,
    workers: Annotated[int, typer.Option(min=1, help="Jobs at once.")] = 1,
    tune_rl: Annotated[
        int, typer.Option(min=0, help="Trials that an rl_only of its own is tuned by.")
    ] = 0,
    setting: Annotated[list[str], typer.Option(help="name=value, for FST.")] = [],  # noqa: B006
    stores: Annotated[Path, typer.Option(help="Where the jobs are kept.")] = STORES,
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = RESULTS,
) -> None:
    """Run the jobs that have not run yet, and write what all of them have found."""
    with errors_told("interrupted; start it again to go on"):
        chosen, held_by, compared, numbers = (
            given.split(",") for given in (tasks, adapters, arms, seeds)
        )
        check_names("task", chosen, list(TASKS))
        check_names("adapter", held_by, list(ADAPTERS))
        check_names("arm", compared, list(ARM_STAGES))
        if not all(map(str.isdecimal, numbers)):
            raise ConfigError(f"--seeds takes numbers with commas, such as 0,1,2, not {seeds}")
        left, failed = limit, []
        for packed in results.glob(f"*/{JOBS}"):
            unpack(packed, stores / packed.parent.name)
        for task in chosen:
            for adapter in held_by:
                if left:
                    plan = make_plan(model, task, adapter, rollouts, setting)
                    store = ExperimentStore(stores / f"{Path(model).name}-{task}-{adapter}")
                    tried, wrong = run(
                        store,
                        plan,
                        compared,
                        list(map(int, numbers)),
                        limit=left,
                        workers=workers,
                        rl_trials=tune_rl,
                    )
                    left -= tried
                    failed += wrong
        found = {}
        for folder in sorted(path.parent for path in stores.glob("*/index.json")):
            runs = load_runs(store := ExperimentStore(folder))
            if runs:
                found[folder.name] = runs
                write_results(folder, results / folder.name)
                pack(store, results / folder.name / JOBS)
        if found:
            text = "\n".join(table(found).markdown() for table in (overview, together))
            write_atomically(results / "overview.md", lambda file: file.write(text.encode()))
            typer.echo(text)
        if failed:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
