"""What a model does under DSPy's adapters, untrained, with the bare and with the ideal prompt.

    python benchmarks/quality/adapters.py --tasks triage,frozen_lake --test 100

Every task's own test examples, at temperature 1, answers not held to the format. Written to
``benchmarks/results/adapters.json`` unless ``--out`` says otherwise; another run adds to it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import dspy
import typer

import fst_dspy
from fst_dspy.config import SamplingConfig
from fst_dspy.files import write_atomically
from fst_dspy.measures.held_out import ideal_candidate
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import seed_candidate
from fst_dspy.tasks import load_task
from fst_dspy.types import Rollout

RESULTS = Path(__file__).parent.parent / "results" / "adapters.json"
ADAPTERS: dict[str, Any] = {
    "chat": dspy.ChatAdapter,
    "xml": dspy.XMLAdapter,
    "json": dspy.JSONAdapter,
}


def valid_share(rollout: Rollout) -> float:
    """Share of an agent's turns that were actions; else whether the rollout did not fail."""
    if rollout.turns:
        return fmean(turn.status != "invalid" for turn in rollout.turns)
    return float(rollout.failure is None)


def measure(lm: fst_dspy.LocalLM, name: str, adapter: str, test: int, seed: int) -> dict[str, Any]:
    """Mean score, valid answers and calls of a rollout, for both prompts."""
    task = load_task(name, seed)
    with dspy.context(lm=lm, adapter=ADAPTERS[adapter]()):
        sampling = SamplingConfig(structured=False, max_tokens=96)
        runner = RolloutRunner(task.program, task.metric, lm, sampling, seed)
        pair = [seed_candidate(task.program), ideal_candidate(task)]
        found = evaluate(runner, pair, task.testset[:test])
    row: dict[str, Any] = {"task": name, "adapter": adapter, "seed": seed, "test": test}
    for prompt, score, rollouts in zip(
        ("bare", "ideal"), found.mean_K, found.rollouts_K, strict=True
    ):
        row[prompt] = {
            "score": score,
            "valid": fmean(valid_share(rollout) for rollout in rollouts),
            "calls": fmean(len(rollout.calls) for rollout in rollouts),
        }
    return row


def main(
    model: Annotated[str, typer.Option(help="As LocalLM takes it.")] = "embedded",
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "triage,frozen_lake,gridworld",
    adapters: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(ADAPTERS),
    test: Annotated[int, typer.Option(min=1, help="Test examples.")] = 100,
    seed: int = 0,
    out: Path = RESULTS,
) -> None:
    """Measure, show, and add to what is there."""
    lm = fst_dspy.LocalLM(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(out.read_text()) if out.exists() else []
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for task in tasks.split(","):
        for adapter in adapters.split(","):
            row = {**measure(lm, task, adapter, test, seed), "commit": commit}
            row["model"] = f"{model}@{lm.version[:12]}"
            key = ("task", "adapter", "seed", "test", "model")
            rows = [old for old in rows if any(old[k] != row[k] for k in key)]
            rows.append(row)
            typer.echo(json.dumps(row))
            text = json.dumps(rows, indent=1) + "\n"
            write_atomically(out, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    typer.run(main)
