"""A study on triage against FST's defaults: score against KL, 20 trials, two workers.

    python benchmarks/study.py --out runs/study-triage

The defaults run once a seed in ``fst compile`` processes of their own (the study's own first trial
is one more). The study runs with two workers; one of them is killed with SIGKILL after the first
trials have ended, the other takes its trial over, and the study is then started once more, as after
a crash of the machine, to finish. Written to ``benchmarks/results/study.json`` with its figures.

The hypervolume is the area that a front covers between it and the reference point (score 0, KL
``KL_REFERENCE``). For the defaults it is that of their best seed and, more fairly to a single
setting, the mean over seeds; both are in the file. A front of 20 trials has more chances than one
point, so the front of all the defaults' seeds together is there too, and the study's best settings
are run again on the other seeds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fst_dspy.cli import parse_settings
from fst_dspy.cli_tune import report_study, study_counts, trial_line
from fst_dspy.run_state import cycle_record
from fst_dspy.store import read_jsonl
from fst_dspy.study import Objective, best_settings, front, hypervolume, importances, tune
from fst_dspy.study.objective import measure
from fst_dspy.study.outcome import draw_front, draw_importances

RESULTS = Path(__file__).parent / "results"
MEASURES = ("score", "kl_to_base")
DIRECTIONS = ("maximize", "minimize")
KL_REFERENCE = 0.5
KILL_AFTER = 3
console = Console()


def compile_once(
    out: Path, program: str, model: str, seed: int, rollouts: int, settings: dict[str, Any]
) -> tuple[float, float]:
    """One ``fst compile`` in a process of its own; its score and KL within the budget."""
    if not (out / "quadrants.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "fst_dspy", "compile", program, "--model", model]
        command += ["--out", str(out), "--seed", str(seed)]
        for name, value in {**settings, "max_rollouts": rollouts}.items():
            command += ["--set", f"{name}={json.dumps(value)}"]
        with open(out / "log.txt", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    records = [cycle_record(row) for row in read_jsonl(out / "cycles.jsonl")]
    measured = measure(records, rollouts)
    return measured.score, measured.kl_to_base


def run_study(out: Path, program: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The study: two workers, one of them killed, then started again to finish."""
    killed: list[int] = []

    def on_trial(study: Any, trial: Any) -> None:
        console.print(trial_line(trial))
        children = multiprocessing.active_children()
        if trial.number + 1 >= KILL_AFTER and not killed and len(children) > 1:
            victim = children[0].pid
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
            console.print(f"killed worker process {victim}")

    total, started = options.pop("trials"), time.monotonic()
    half = max(KILL_AFTER + 1, total // 2)
    tune(program, folder=out, trials=half, workers=2, on_trial=on_trial, **options)
    console.print("started again")
    study = tune(program, folder=out, trials=total, workers=2, on_trial=on_trial, **options)
    return study, {"killed_workers": len(killed), "seconds": time.monotonic() - started}


def main(
    out: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path(
        "runs/study-triage"
    ),
    program: str = "triage",
    model: str = "embedded",
    trials: int = 20,
    seeds: Annotated[int, typer.Option(help="Runs of the defaults, and of the best.")] = 3,
    rollouts: int = 3000,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Held fixed everywhere, as for fst tune.")
    ] = None,
) -> None:
    """Run what has not run yet, then compare."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    fixed = parse_settings(settings)

    def over_seeds(name: str, chosen: dict[str, Any]) -> list[tuple[float, float]]:
        folders = [out / f"{name}-{seed}" for seed in range(seeds)]
        return [
            compile_once(folder, program, model, seed, rollouts, chosen)
            for seed, folder in enumerate(folders)
        ]

    study, how = run_study(
        out / "study",
        program,
        trials=trials,
        lm=model,
        objective=Objective(MEASURES, rollouts),
        fixed=fixed,
    )
    report_study(console, study, out / "study")
    best = {**best_settings(study), **fixed}
    defaults = over_seeds("defaults", fixed)
    tuned = over_seeds("tuned", {k: v for k, v in best.items() if k != "max_rollouts"})
    reference = (0.0, KL_REFERENCE)
    points = [tuple(trial.values) for trial in front(study)]
    alone = [hypervolume([point], DIRECTIONS, reference) for point in defaults]
    volumes = {
        "study_front": hypervolume(points, DIRECTIONS, reference),
        "defaults_mean": statistics.mean(alone),
        "defaults_best_seed": max(alone),
        "defaults_front_of_all_seeds": hypervolume(defaults, DIRECTIONS, reference),
    }
    volumes["best_settings_mean_over_seeds"] = statistics.mean(
        hypervolume([point], DIRECTIONS, reference) for point in tuned
    )
    beats = volumes["study_front"] > volumes["defaults_front_of_all_seeds"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    saved = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "model": model,
        "rollouts_per_trial": rollouts,
        "reference": reference,
        "hypervolume": volumes,
        "study_beats_the_defaults": beats,
        "trials": study_counts(study),
        **how,
        "front": points,
        "defaults": defaults,
        "best_settings": best,
        "best_settings_over_seeds": tuned,
        "importances": importances(study),
        "rows": [
            {
                "number": trial.number,
                "state": trial.state.name,
                "values": trial.values,
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
    console.print_json(data=volumes)
    console.print(f"the study's front {'beats' if beats else 'does not beat'} the defaults'")


if __name__ == "__main__":
    typer.run(main)
