"""What ``fst tune`` shows and writes: a line a trial, a table, figures, the best settings."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fst_dspy.display import as_text, table
from fst_dspy.errors import ConfigError
from fst_dspy.files import write_atomically
from fst_dspy.study import best_settings, front, importances
from fst_dspy.study.outcome import draw_front, draw_importances
from fst_dspy.study.runner import count_trials, tune
from fst_dspy.study.storage import retried_numbers

SHOWN = 12


def tune_and_report(console: Console, program: str, out: Path, trials: int, **options: Any) -> None:
    """Run ``tune`` with a progress bar, then report.

    Args:
        console: Where to print.
        program, trials: As for ``tune``.
        out: The study's folder; gets ``best.json``, ``importances.png`` and, with two objectives,
            ``front.png``.
        **options: Anything else that ``tune`` takes.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("trials", total=trials)

        def on_trial(study: optuna.Study, trial: FrozenTrial) -> None:
            console.print(as_text(trial_line(trial)))
            bar.update(task, completed=count_trials(study)[0])

        study = tune(program, folder=out, trials=trials, on_trial=on_trial, **options)
    report_study(console, study, out)


def report_study(console: Console, study: optuna.Study, out: Path) -> None:
    """Print the best trials and what happened to the others; write the files named above."""
    console.print(study_table(study))
    console.print(study_counts(study))
    shares = importances(study)
    if shares:
        draw_importances(shares).savefig(out / "importances.png", dpi=130)
    if len(study.directions) == 2:
        draw_front(study).savefig(out / "front.png", dpi=130)
    try:
        settings = best_settings(study)
    except ConfigError as error:
        console.print(as_text(error, "red"))
        return
    text = json.dumps(settings, indent=1).encode()
    write_atomically(out / "best.json", lambda file: file.write(text))
    given = (shlex.quote(f"{name}={json.dumps(value)}") for name, value in settings.items())
    flags = " ".join(f"--set {setting}" for setting in given)
    words = f"best settings, also in {out / 'best.json'}:\n{flags}"
    console.print(as_text(words), soft_wrap=True)


def trial_line(trial: FrozenTrial) -> str:
    """One line that says how a trial ended."""
    attributes = trial.user_attrs
    if trial.state is TrialState.FAIL:
        outcome = attributes.get("error", "its worker died or was interrupted")
    else:
        measured = attributes["measured"]
        outcome = (
            f"score {measured['score']:.3f}  KL {measured['kl_to_base']:.4f}  "
            f"best at {measured['rollouts']:,} of {attributes['spent']:,} rollouts"
        )
    return f"trial {trial.number:>3}  {trial.state.name.lower():<8}  {outcome}"


def study_table(study: optuna.Study) -> Table:
    """The front first, then the other completed trials by their first objective."""
    best = front(study)
    chosen = {trial.number for trial in best}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    others = sorted(
        (trial for trial in complete if trial.number not in chosen),
        key=lambda trial: sign * trial.values[0],
    )
    rows = []
    for trial in [*best, *others][:SHOWN]:
        measured = trial.user_attrs["measured"]
        source = trial.user_attrs.get("source")
        settings = ", ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
        rows.append(
            (
                f"{trial.number}{' *' if trial.number in chosen else ''}",
                f"{measured['score']:.3f}",
                f"{measured['kl_to_base']:.4f}",
                f"{measured['rollouts']:,}",
                f"({source}) {settings}" if source else settings,
            )
        )
    made = table(("trial", "score", "KL", "rollouts", "settings"), rows, left=5)
    made.caption = "* the Pareto front" if len(study.directions) > 1 else "* the best"
    return made


def study_counts(study: optuna.Study) -> str:
    """How many trials completed, were pruned, failed, and were taken over from dead workers."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    again = len(retried_numbers(study))
    counts = {
        "completed": states.count(TrialState.COMPLETE),
        "pruned": states.count(TrialState.PRUNED),
        "failed": states.count(TrialState.FAIL) - again,
        "run again after their worker ended": again,
    }
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count or name[0] != "r")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
