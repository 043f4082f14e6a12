"""FST against its own channels alone on triage, on equal budgets, with every rollout counted.

    python benchmarks/triage.py --out runs/triage --workers 2

Runs the arms and seeds as separate ``fst compile`` processes, resumable, and writes
``benchmarks/results/triage.json`` and ``triage.png``. ``rl_only`` is tried at three learning rates;
``gepa_only`` and ``rl_only`` may run as many rollouts as the ``fst`` run of the same seed did.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
RL_RATES = (3e-5, 1e-4, 3e-4)
console = Console()


def run(out: Path, program: str, seed: int, arm: str, *settings: str) -> dict[str, Any]:
    """One ``fst compile`` in a process of its own; its outcome read from the run folder."""
    command = [sys.executable, "-m", "fst_dspy", "compile", program, "--out", str(out)]
    command += ["--seed", str(seed), "--arm", arm]
    for setting in settings:
        command += ["--set", setting]
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "quadrants.json").exists():
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(out / "log.txt", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | threads)
    result = json.loads((out / "result.json").read_text())
    tested = json.loads((out / "quadrants.json").read_text())
    records = result["records"]
    best = records[result["best"]["cycle"]]
    counts = records[-1]["total_rollouts"]
    return {
        "arm": arm,
        "seed": seed,
        "settings": list(settings),
        "test_base_original": tested["base_original"],
        "test": tested["trained_evolved"],
        "kl_to_base": best["kl_to_base"],
        "rollouts": counts,
        "total_rollouts": counts["fast"] + counts["slow"] + counts["eval"],
        "seconds": sum(records[-1]["seconds"].values()),
        "val_curve": [
            [sum(r["total_rollouts"][c] for c in ("fast", "slow", "eval")), r["val_score"]]
            for r in records
        ],
        "folder": out.name,
    }


def main(
    out: Annotated[Path, typer.Option(help="Where the run folders go.")] = Path("runs/triage"),
    program: str = "triage",
    seeds: int = 5,
    rl_seeds: Annotated[int, typer.Option(help="Seeds of each learning rate of rl_only.")] = 2,
    workers: Annotated[int, typer.Option(help="Runs at once.")] = 2,
) -> None:
    """Run everything that has not run yet, then write the table and the figure."""
    with ThreadPoolExecutor(workers) as pool:
        fst = list(pool.map(lambda s: run(out / f"fst-{s}", program, s, "fst"), range(seeds)))
        budgets = {row["seed"]: row["total_rollouts"] for row in fst}
        jobs = [
            (out / f"gepa_only-{s}", s, "gepa_only", [f"max_rollouts={budgets[s]}"])
            for s in range(seeds)
        ] + [
            (out / f"rl_only-{rate:g}-{s}", s, "rl_only",
             [f"max_rollouts={budgets[s]}", f"learning_rate={rate}"])
            for rate in RL_RATES
            for s in range(rl_seeds)
        ]  # fmt: skip
        others = list(pool.map(lambda job: run(job[0], program, job[1], job[2], *job[3]), jobs))
    rows = fst + others
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    RESULTS.mkdir(exist_ok=True)
    saved = {"command": " ".join(["python", *sys.argv]), "commit": commit, "rows": rows}
    (RESULTS / f"{program}.json").write_text(json.dumps(saved, indent=1) + "\n")
    show(rows)
    draw(out, program, rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Means over seeds by arm, with the range."""
    table = Table("arm", "test", "range", "KL", "rollouts", "seconds")
    for name in dict.fromkeys(label(row) for row in rows):
        group = [row for row in rows if label(row) == name]
        tests = [row["test"] for row in group]
        means = {
            key: statistics.mean(row[key] for row in group)
            for key in ("test", "kl_to_base", "total_rollouts", "seconds")
        }
        table.add_row(
            name,
            f"{means['test']:.3f}",
            f"{min(tests):.3f}-{max(tests):.3f}",
            f"{means['kl_to_base']:.3f}",
            f"{means['total_rollouts']:.0f}",
            f"{means['seconds']:.0f}",
        )
    console.print(table)


def label(row: dict[str, Any]) -> str:
    """The arm, with its learning rate where that was varied."""
    rates = [s.split("=")[1] for s in row["settings"] if s.startswith("learning_rate")]
    return f"{row['arm']} lr {float(rates[0]):g}" if rates else row["arm"]


def draw(out: Path, program: str, rows: list[dict[str, Any]]) -> None:
    """Score against rollouts and against KL."""
    from fst_dspy.plots import draw_comparison
    from fst_dspy.run_state import cycle_record
    from fst_dspy.store import read_jsonl

    runs = {
        f"{label(row)}, seed {row['seed']}": [
            cycle_record(line) for line in read_jsonl(out / row["folder"] / "cycles.jsonl")
        ]
        for row in rows
    }
    figure = draw_comparison(runs, f"{program} on the embedded model")
    figure.savefig(RESULTS / f"{program}.png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
