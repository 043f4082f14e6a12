"""A study on triage against FST's defaults: score against rollouts, 20 trials, two workers.

    python benchmarks/quality/study.py --out runs/study-triage

The study's first trial has the defaults. Two workers share it; one of them is killed with SIGKILL
after the first trials have ended, the other takes its trial over, and the study is then started
once more, as after a crash of the machine, to finish. Afterwards the defaults and the study's best
settings run on seeds that the study has not seen, in ``fst compile`` processes of their own.
Started again, the script goes on. Written to ``benchmarks/results/study.json`` with its figures.

The hypervolume is the area between a front and the reference point: score 0 at the whole budget.
The study's front is compared with its trial of the defaults; 20 trials have more chances than one,
so what counts are the settings run again on the other seeds. The second pair of measures, score
against KL, is worked out for the same trials, which were not tuned for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import optuna
import typer
from optuna.trial import TrialState
from rich.console import Console

from fst_dspy.cli.options import parse_settings
from fst_dspy.cli.study_report import report_study, study_counts, trial_line
from fst_dspy.files import read_jsonl
from fst_dspy.run.records import cycle_record
from fst_dspy.study import Objective, best_settings, front, hypervolume, importances, tune
from fst_dspy.study.objective import Measured, measure
from fst_dspy.study.outcome import draw_front, draw_importances

RESULTS = Path(__file__).parent.parent / "results"
MEASURES = ("score", "rollouts")
DIRECTIONS = ("maximize", "minimize")
AT_LEAST = {"score": 0.5}
KL_REFERENCE = 0.05
KILL_AFTER = 3
console = Console()


def compile_once(
    out: Path, program: str, model: str, seed: int, rollouts: int, settings: dict[str, Any]
) -> Measured:
    """One ``fst compile`` in a process of its own; the best cycle within the budget."""
    if not (out / "quadrants.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "fst_dspy", "compile", program, "--model", model]
        command += ["--out", str(out), "--seed", str(seed)]
        for name, value in {**settings, "max_rollouts": rollouts}.items():
            command += ["--set", f"{name}={json.dumps(value)}"]
        with open(out / "log.txt", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    records = [cycle_record(row) for row in read_jsonl(out / "cycles.jsonl")]
    return measure(records, rollouts)


def run_study(out: Path, program: str, trials: int, **options: Any) -> optuna.Study:
    """The study: two workers, one of them killed, then started again to finish."""
    killed = [path.name for path in out.glob("killed-*")]

    def on_trial(study: Any, trial: Any) -> None:
        console.print(trial_line(trial))
        children = multiprocessing.active_children()
        if trial.number + 1 >= KILL_AFTER and not killed and len(children) > 1:
            victim = children[0].pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(f"killed-{victim}")
            (out / killed[0]).touch()
            console.print(f"killed worker process {victim}")

    half = max(KILL_AFTER + 1, trials // 2)
    tune(program, folder=out, trials=half, workers=2, on_trial=on_trial, **options)
    console.print("started again")
    return tune(program, folder=out, trials=trials, workers=2, on_trial=on_trial, **options)


def volumes(points: Sequence[Measured], rollouts: int) -> dict[str, float]:
    """The hypervolume of some outcomes in both pairs of measures."""
    by_rollouts = [(point.score, point.rollouts / rollouts) for point in points]
    by_kl = [(point.score, point.kl_to_base) for point in points]
    return {
        "score_rollouts": hypervolume(by_rollouts, DIRECTIONS, (0.0, 1.0)),
        "score_kl": hypervolume(by_kl, DIRECTIONS, (0.0, KL_REFERENCE)),
    }


def main(
    out: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path(
        "runs/study-triage"
    ),
    program: str = "triage",
    model: str = "embedded",
    trials: int = 20,
    seeds: Annotated[int, typer.Option(help="Later runs of the defaults, and of the best.")] = 3,
    rollouts: Annotated[int, typer.Option(help="Budget of a trial.")] = 900,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Held fixed everywhere, as for fst tune.")
    ] = None,
) -> None:
    """Run what has not run yet, then compare."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    fixed = parse_settings(settings)

    def over_seeds(name: str, chosen: dict[str, Any]) -> list[Measured]:
        def run(seed: int) -> Measured:
            folder = out / f"{name}-{seed}"
            return compile_once(folder, program, model, seed, rollouts, chosen)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(1, seeds + 1)))

    study = run_study(
        out / "study",
        program,
        trials=trials,
        lm=model,
        objective=Objective(MEASURES, rollouts, at_least=AT_LEAST),
        fixed=fixed,
    )
    report_study(console, study, out / "study")
    best = {**best_settings(study), **fixed}
    runs = {
        "defaults": over_seeds("defaults", fixed),
        "tuned": over_seeds("tuned", {k: v for k, v in best.items() if k != "max_rollouts"}),
    }
    of_trials = {
        trial.number: Measured(**trial.user_attrs["measured"])
        for trial in study.get_trials(states=(TrialState.COMPLETE,))
    }
    points = [of_trials[trial.number] for trial in front(study)]
    first = [n for n in of_trials if study.trials[n].user_attrs.get("source") == "defaults"]
    spans = [trial for trial in study.trials if trial.datetime_start and trial.datetime_complete]
    found = {
        "study_front": volumes(points, rollouts),
        "study_trial_of_the_defaults": volumes([of_trials[n] for n in first], rollouts),
        **{
            f"{name}_on_other_seeds": [volumes([one], rollouts) for one in ones]
            for name, ones in runs.items()
        },
    }
    defaults, tuned = (
        statistics.mean(one["score_rollouts"] for one in found[f"{name}_on_other_seeds"])
        for name in ("defaults", "tuned")
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    saved = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "model": model,
        "rollouts_per_trial": rollouts,
        "references": {"score_rollouts": (0.0, rollouts), "score_kl": (0.0, KL_REFERENCE)},
        "hypervolume": found,
        "mean_on_other_seeds": {"defaults": defaults, "tuned": tuned},
        "trials": study_counts(study),
        "killed_workers": len(list((out / "study").glob("killed-*"))),
        "seconds": (
            max(trial.datetime_complete for trial in spans)
            - min(trial.datetime_start for trial in spans)
        ).total_seconds(),
        "front": [asdict(point) for point in points],
        "on_other_seeds": {name: [asdict(one) for one in ones] for name, ones in runs.items()},
        "best_settings": best,
        "importances": importances(study),
        "rows": [
            {
                "number": trial.number,
                "state": trial.state.name,
                "measured": trial.user_attrs.get("measured"),
                "params": trial.params,
                "spent": trial.user_attrs.get("spent"),
                "error": trial.user_attrs.get("error"),
            }
            for trial in study.trials
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "study.json").write_text(json.dumps(saved, indent=1) + "\n")
    if saved["importances"]:
        draw_importances(importances(study)).savefig(RESULTS / "study_importances.png", dpi=130)
    draw_front(study).savefig(RESULTS / "study_front.png", dpi=130)
    console.print_json(data=found)
    beats = "beat" if tuned > defaults else "do not beat"
    console.print(f"on other seeds the study's best settings {beats} the defaults")


if __name__ == "__main__":
    typer.run(main)
