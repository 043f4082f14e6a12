"""Trains the adapter: ``python -m fst_dspy.smollm2.train``.

A run can be killed at any moment and goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated

import typer

from fst_dspy.pretrained import smollm2
from fst_dspy.smollm2.training import LOW_PRIORITY, Position, Recipe, Trainer

MADE = "training.json"
"""Beside an adapter: what it was made by."""
POSITION = [each.name for each in fields(Position)]


def train(
    base: Path,
    work: Path,
    recipe: Recipe,
    threads: int,
    every: int,
    held_out: int,
    adapter: Path | None = None,
) -> Path:
    """Train, or go on training, in ``work``; returns the folder of the adapter.

    Args:
        base: The folder of the model as it comes.
        work: Gets ``checkpoint.pt``, ``log.jsonl`` and ``adapter/``.
        recipe: How the adapter is made.
        threads: Cores.
        every: Steps between checkpoints, which also measure.
        held_out: Exercises to measure with.
        adapter: One that this wrote, where the checkpoint of its run is gone: its weights are the
            first ones, and its steps count.
    """
    work.mkdir(parents=True, exist_ok=True)
    made_before = json.loads((adapter / MADE).read_text()) if adapter else {}
    recipe = replace(recipe, start=made_before.get("step", 0))
    trainer = Trainer(base, recipe, threads)
    if not trainer.load(work / "checkpoint.pt") and adapter:
        trainer.begin_from(adapter, Position(**{name: made_before[name] for name in POSITION}))
    began = time.monotonic() - trainer.position.seconds

    def report(run: Trainer, loss: float) -> None:
        run.position.seconds = time.monotonic() - began
        line = {**asdict(run.position), "loss": round(loss, 4)}
        if run.done or run.position.step % every == 0:
            line["held_out"] = asdict(run.held_out(held_out))
            run.write(work / "adapter")
            made = {**line, "recipe": asdict(recipe), "command": command()}
            if adapter:
                made["went_on_from"] = made_before
            (work / "adapter" / MADE).write_text(json.dumps(made, indent=2) + "\n")
        with open(work / "log.jsonl", "a") as log:
            log.write(json.dumps(line) + "\n")
        typer.echo(json.dumps(line))

    trainer.run(work / "checkpoint.pt", every, report)
    return work / "adapter"


def command() -> str:
    """What this process was started as, without where the package lies."""
    return shlex.join(["python", "-m", "fst_dspy.smollm2.train", *sys.argv[1:]])


def main(
    work: Annotated[Path, typer.Option(help="Checkpoint, log, adapter.")] = Path("runs/smollm2"),
    seed: Annotated[int, typer.Option(help="Of weights and exercises.")] = Recipe.seed,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = Recipe.steps,
    threads: Annotated[int, typer.Option(min=1, help="Cores.")] = 2,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements.")] = 20,
    held_out: Annotated[int, typer.Option(min=1, help="Exercises to measure with.")] = 32,
    adapter: Annotated[
        Path | None, typer.Option(help="One to go on from, where its checkpoint is gone.")
    ] = None,
) -> None:
    """Train the adapter, or go on with a run that was killed."""
    os.nice(LOW_PRIORITY)
    train(
        smollm2.fetch(smollm2.AS_IT_COMES),
        work,
        Recipe(seed=seed, steps=steps),
        threads,
        every,
        held_out,
        adapter,
    )


if __name__ == "__main__":
    typer.run(main)
