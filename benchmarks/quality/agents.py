"""The arms on programs that act: success against environment steps, which all arms have as many of.

    python benchmarks/quality/agents.py                              # all of it; ``make agents``
    python benchmarks/quality/agents.py --limit 1                    # the next job
    python benchmarks/quality/agents.py --model smollm2 --seeds 1    # another model's
    python benchmarks/quality/agents.py --draw-only

A job is a program, an arm and a seed. Its budget is the program's of ``ENV_STEPS``, calls of the
environment over all channels, training, validation and prompts' trials alike, and ``ROLLOUTS``
episodes, for a model whose actions are no actions takes no steps. Started again, what has run is
not run again, and what was stopped goes on. The stores are ``runs/agents/PROGRAM``; the tables and
the figure go to ``benchmarks/results/agents``; those of another model than the embedded one to
``MODEL`` below.
``dspy.GRPO`` on the same programs: ``benchmarks/quality/dspy_grpo.py --programs
frozen_lake,gridworld``; what it has written is in the table, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from fst_dspy.cli.options import parse_settings
from fst_dspy.experiments import ExperimentStore, Plan, Run, load_runs, run_jobs, write_results
from fst_dspy.experiments.findings.tables import Table, interval_text
from fst_dspy.experiments.runs import by_label, scores_by_seed
from fst_dspy.files import write_atomically
from fst_dspy.measures import area_under_curve, mean_interval, paired_difference
from fst_dspy.results.notebook_figure import NotebookFigure

EMBEDDED = "embedded"
STORES = Path("runs/agents")
RESULTS = Path(__file__).parent.parent / "results" / "agents"
ARMS = "fst,rl_only,gepa_only,sequential"
PROGRAMS = ("gridworld", "frozen_lake")
ENV_STEPS = {"gridworld": 16_000, "frozen_lake": 12_000}
ROLLOUTS = 3_000
SETTINGS: Mapping[str, Any] = {
    "max_tokens": 48,
    "val_size": 24,
    "group_size": 8,
    "problems_per_step": 8,
    "steps_per_cycle": 2,
    "credit": "turn",
    "learning_rate": 1e-4,
    "first_cycle_iterations": 3,
    "cycle_iterations": 1,
    "minibatch_size": 8,
}
"""Of all arms. The embedded model's own learning rate, 3e-4, is that of single answers; the rows of
a step are five times as many here, most of them of tokens that nothing depends on, and it wears the
format away. What was tried, on seeds 0 and 1, is in ``benchmarks/results/agents_notes.md``."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "gridworld": {
        "val_size": 48,
        "problems_per_step": 4,
        "steps_per_cycle": 6,
        "learning_rate": 2e-4,
        "discount": 0.95,
        "minibatch_size": 16,
    }
}
"""Of a program beside ``SETTINGS``: an episode of ``gridworld`` takes twice the steps of one of
``frozen_lake``, so a step has half as many; its time is short, so that what is gained sooner counts
for more; the best of its cycles are close, so that each is tried on more episodes; and a rule is
told by few of its episodes, so that more of them are read."""
COLOURS = {"fst": "C0", "gepa_only": "C1", "rl_only": "C3", "sequential": "C4"}
HEADS = (
    "program",
    "arm",
    "seeds",
    "success before",
    "success after",
    "fst minus it",
    "area",
    "fst minus it: area",
    "turns",
    "invalid",
    "steps",
    "episodes",
    "seconds",
)
NOTE = (
    "Success: mean reward of held-out episodes, each played twice, of the model and prompt as they "
    "came (played once) and of the best pair, with 95 % intervals over seeds. fst minus it: paired "
    "by seed. Area: mean over the steps that a job may take of the best validation score so far. "
    "Turns and invalid: of an episode, and the share whose action was none, in the last "
    "cycle. Steps: calls of environments, of all channels; episodes likewise. Seconds: without the "
    "test. dspy.GRPO counts its training's episodes only, and as steps their calls of the model."
)


def make_plan(
    program: str,
    env_steps: int,
    seeds: int,
    settings: Sequence[str],
    test_size: int = 48,
    model: str = EMBEDDED,
) -> Plan:
    """The common footing of a program's jobs."""
    own = OWN.get(program.partition(":")[0], {})
    rate = {} if model == EMBEDDED else {"learning_rate": None}
    return Plan(
        program=program,
        model=model,
        rollouts=ROLLOUTS,
        seeds=seeds,
        settings={
            **SETTINGS,
            **own,
            **rate,
            "max_env_steps": env_steps,
            **parse_settings(list(settings)),
        },
        samples=2,
        test_size=test_size,
    )


def run(
    store: ExperimentStore, plan: Plan, arms: Sequence[str], workers: int, limit: int
) -> tuple[int, list[str]]:
    """Run what has not run yet of a program, ``limit`` jobs at most.

    Returns:
        How many it tried, and the names of those that failed.
    """
    with store.locked():
        store.begin("compare")
        jobs = [job for arm in arms for job in plan.jobs(arm, arm) if not store.is_done(job.name)]
        # Seed by seed: a store that is looked at early compares whole seeds.
        jobs = sorted(jobs, key=lambda job: job.seed)[:limit]
        return len(jobs), run_jobs(store, jobs, workers=workers)


def table(found: Mapping[str, Sequence[Run]], others: Sequence[Mapping[str, Any]] = ()) -> Table:
    """A line an arm of each program.

    Args:
        found: Runs by program.
        others: Runs of ``dspy.GRPO``, as ``benchmarks/quality/dspy_grpo.py`` writes them.
    """
    rows: list[tuple[str, ...]] = []
    for program, runs in found.items():
        groups = by_label(runs)
        ours = scores_by_seed(groups.get("fst", ()))
        our_areas = areas_by_steps(groups.get("fst", ()))
        for label, group in groups.items():
            scores, areas = scores_by_seed(group), areas_by_steps(group)
            last = [one.records[-1].turns for one in group]
            first = [one.records[-2].turns if len(one.records) > 1 else None for one in group]
            turns, episodes, invalid = _last_cycle(group, last, first)
            rows.append(
                (
                    program,
                    label,
                    str(len(group)),
                    interval_text(mean_interval([one.quadrant("base_original") for one in group])),
                    interval_text(mean_interval(list(scores.values()))),
                    _beyond(label, ours, scores),
                    interval_text(mean_interval(list(areas.values()))),
                    _beyond(label, our_areas, areas),
                    f"{turns / episodes:.1f}" if episodes else "—",
                    f"{invalid / turns:.3f}" if turns else "—",
                    f"{fmean(one.steps for one in last):.0f}",
                    f"{fmean(one.outcome.rollouts.total for one in group):.0f}",
                    f"{fmean(one.train_seconds for one in group):.0f}",
                )
            )
        rows += _grpo_rows(program, others)
    return Table("Agents on equal environment steps", HEADS, tuple(rows), NOTE)


def areas_by_steps(runs: Sequence[Run]) -> dict[int, float]:
    """The mean validation score, best so far, over the environment steps of a job; by seed."""
    return {
        run.job.seed: area_under_curve(
            [record.turns.steps for record in run.records],
            [record.val_score for record in run.records],
            run.job.settings["max_env_steps"],
            running_best=True,
        )
        for run in runs
    }


def _beyond(label: str, ours: Mapping[int, float], others: Mapping[int, float]) -> str:
    """How far ``fst`` is above an arm, paired by seed."""
    if label == "fst" or len(ours.keys() & others.keys()) < 2:
        return "—"
    return interval_text(paired_difference(ours, others).difference)


def _last_cycle(group: Sequence[Run], last: Sequence[Any], first: Sequence[Any]) -> tuple[int, ...]:
    turns = sum(a.turns - (b.turns if b else 0) for a, b in zip(last, first, strict=True))
    invalid = sum(a.invalid - (b.invalid if b else 0) for a, b in zip(last, first, strict=True))
    return turns, sum(one.records[-1].rollouts.total for one in group), invalid


def _grpo_rows(program: str, others: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    own = [
        one
        for one in others
        if (one["program"], one["arm"]) == (program.partition(":")[0], "dspy.GRPO")
    ]
    if not own:
        return []
    before = mean_interval([one["test_before"] / 100 for one in own])
    after = mean_interval([one["test"] / 100 for one in own])
    calls = fmean(sum(step["calls"] for step in one["steps"]) for one in own)
    episodes, seconds = (fmean(one[key] for one in own) for key in ("rollouts", "seconds"))
    cells = ("—",) * 5 + (f"{calls:.0f}", f"{episodes:.0f}", f"{seconds:.0f}")
    texts = (interval_text(before), interval_text(after))
    return [(program, "dspy.GRPO", str(len(own)), *texts, *cells)]


def draw(found: Mapping[str, Sequence[Run]]) -> NotebookFigure:
    """Success on the validation set against environment steps; a panel a program."""
    figure = NotebookFigure(figsize=(4.2 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (program, runs) in zip(panels, found.items(), strict=True):
        for label, group in by_label(runs).items():
            for number, one in enumerate(group):
                axes.plot(
                    [record.turns.steps for record in one.records],
                    [record.val_score for record in one.records],
                    ".-",
                    color=COLOURS.get(label, "C7"),
                    label=label if number == 0 else None,
                    alpha=0.6,
                    markersize=4,
                )
        axes.set(title=program, xlabel="environment steps, all channels", ylim=(-0.02, 1.02))
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.25)
    panels[0].set(ylabel="success, validation")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def main(
    programs: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PROGRAMS),
    arms: Annotated[str, typer.Option(help="Comma-separated.")] = ARMS,
    seeds: Annotated[int, typer.Option(min=1)] = 5,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    env_steps: Annotated[
        int | None, typer.Option(min=1, help="Budget of a job, over all channels.")
    ] = None,
    test_size: Annotated[int, typer.Option(min=1, help="Episodes, each played twice.")] = 48,
    limit: Annotated[int, typer.Option(min=1, help="Jobs that this call runs at most.")] = 10**6,
    model: Annotated[str, typer.Option(help="A preset, folder or hub id.")] = EMBEDDED,
    setting: Annotated[list[str], typer.Option(help="name=value, for FST.")] = [],  # noqa: B006
    draw_only: bool = False,
    stores: Annotated[Path, typer.Option(help="Where the jobs are kept.")] = STORES,
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = RESULTS,
) -> None:
    """Run the jobs that have not run yet, and write what all of them have found."""
    if model != EMBEDDED:
        stores, results = stores / Path(model).name, results / Path(model).name
    left, failed = limit, []
    found: dict[str, list[Run]] = {}
    for program in programs.split(","):
        name = program.partition(":")[0]
        store = ExperimentStore(stores / name)
        if left and not draw_only:
            steps = env_steps or ENV_STEPS[name]
            plan = make_plan(program, steps, seeds, setting, test_size, model)
            tried, wrong = run(store, plan, arms.split(","), workers, left)
            left -= tried
            failed += wrong
        if runs := load_runs(store):
            found[program] = runs
            write_results(store.folder, results / name)
    if found:
        grpo = results / "dspy_grpo.json"
        others = json.loads(grpo.read_text())["runs"] if grpo.is_file() else []
        text = table(found, others).markdown()
        write_atomically(results / "agents.md", lambda file: file.write(text.encode()))
        draw(found).savefig(results / "agents.png", dpi=130)
        typer.echo(text)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
