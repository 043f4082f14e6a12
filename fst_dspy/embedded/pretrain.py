"""Makes the embedded model: ``python -m fst_dspy.embedded.pretrain``, from nothing.

With ``--base FOLDER`` it goes on from a model that was made before the corpus knew all that it
knows now. So the packaged weights were made: from those of commit 922ffc7, which this command made
from nothing there, of four families in the format of ``ChatAdapter`` alone.

Text is generated, never downloaded. A run is determined by its seed (and its base), can be killed
at any moment and goes on from its last checkpoint when started again with the same settings.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fst_dspy import embedded
from fst_dspy.embedded import tokenizer as tokenizer_lib
from fst_dspy.embedded.corpus import FAMILIES
from fst_dspy.embedded.corpus.words import VOCABULARY
from fst_dspy.embedded.figures import family_figures
from fst_dspy.embedded.training import (
    CONTINUED,
    Position,
    Recipe,
    Trainer,
    grown,
    make_tokenizer,
)

MODEL = embedded.path()


def _git_commit() -> str | None:
    """The commit that the code stands at, or ``None`` outside a repository."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _with_progress(trainer: Trainer, file: Path, save_every: int) -> None:
    total = sum(stage.max_steps for _, stage in trainer.stages)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
        TimeElapsedColumn(),
        TextColumn("at most left:"),
        TimeRemainingColumn(),
    )
    began = time.monotonic() - trainer.position.seconds
    with Progress(*columns) as progress:
        task = progress.add_task("start", total=total)

        def report(run: Trainer, loss: float) -> None:
            at = run.position
            at.seconds = time.monotonic() - began
            if run.done:
                progress.update(task, completed=total, description="done")
                return
            # A stage that reached its target early counts as run in full.
            passed = sum(stage.max_steps for _, stage in run.stages[: at.stage])
            name = run.stages[at.stage][1].name
            progress.update(
                task,
                completed=passed + at.stage_step,
                description=f"{name}: loss {loss:.2f}, right {at.accuracy:.0%}",
            )

        trainer.run(file, save_every, report)


def _start(work: Path, recipe: Recipe) -> Trainer:
    """A run from nothing; its tokenizer is kept in ``work``."""
    kept = work / f"tokenizer-{recipe.seed}-{recipe.pieces}-{recipe.tokenizer_chats}.json"
    if kept.exists():
        tokenizer = Tokenizer.from_file(str(kept))
    else:
        tokenizer = make_tokenizer(FAMILIES, recipe)
        temporary = kept.with_suffix(".tmp")
        tokenizer.save(str(temporary))
        temporary.replace(kept)
    return Trainer(FAMILIES, tokenizer, recipe)


def _continue(base: Path, recipe: Recipe) -> Trainer:
    """A run from the model in ``base``, with the tokens that have come to the tokenizer since."""
    old = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer, added = tokenizer_lib.extended(old, VOCABULARY)
    model = AutoModelForCausalLM.from_pretrained(base)
    grown(model, old, tokenizer, added)
    return Trainer(FAMILIES, tokenizer, recipe, model)


def pretrain(
    out: Path,
    work: Path,
    recipes: Sequence[Recipe],
    questions: int,
    save_every: int,
    base: Path | None = None,
) -> Path:
    """Trains (or goes on training) in ``work`` and writes model, tokenizer and figures to ``out``.

    Args:
        out: The model folder, in the format of ``AutoModelForCausalLM``.
        work: Where the tokenizer and the checkpoints are kept during the run.
        recipes: How the model is made, one after the other. In the same ``work``, other ones (or
            another base) start from nothing, and so do all that come after them.
        questions: Test questions a family for the figures.
        save_every: Steps between checkpoints.
        base: The folder of a model to go on from; the recipes must be ones that are ``continued``.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    trainer = _start(work, recipes[0]) if base is None else _continue(base, recipes[0])
    before = None if base is None else json.loads((base / "figures.json").read_text())
    positions: list[Position] = []
    for number, recipe in enumerate(recipes):
        if positions:
            trainer = Trainer(FAMILIES, trainer.tokenizer, recipe, trainer.model)
        file = work / f"checkpoint-{number}.pt"
        trainer.load(file)
        if not trainer.done:
            _with_progress(trainer, file, save_every)
        positions.append(trainer.position)
    trainer.model.save_pretrained(out)
    tokenizer_lib.save(trainer.tokenizer, out)
    figures: dict[str, Any] = {
        "families": family_figures(
            AutoModelForCausalLM.from_pretrained(out),
            AutoTokenizer.from_pretrained(out),
            FAMILIES,
            questions,
            recipes[0].seed,
        ),
        "temperature": 1.0,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": sum(position.step for position in positions),
        "steps_by_stage": [position.finished for position in positions],
        "seconds": round(sum(position.seconds for position in positions), 1),
        "recipes": [dataclasses.asdict(recipe) for recipe in recipes],
        "command": " ".join(["python -m fst_dspy.embedded.pretrain", *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "continued_from": before,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return out


def main(
    out: Annotated[Path, typer.Option(help="The model folder to write.")] = MODEL,
    work: Annotated[Path, typer.Option(help="Checkpoints are kept here.")] = Path("runs/pretrain"),
    seed: Annotated[int, typer.Option(help="Decides weights and text.")] = Recipe.seed,
    base: Annotated[
        Path | None, typer.Option(help="A model folder to go on from, instead of nothing.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Test questions a family.")] = 512,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
) -> None:
    """Make the embedded model, or go on with a run that was killed."""
    torch.set_num_threads(1)  # of each of the two micro-batches that are computed at once
    recipes = (Recipe(),) if base is None else CONTINUED
    seeded = [dataclasses.replace(recipe, seed=seed + recipe.seed) for recipe in recipes]
    pretrain(out, work, seeded, questions, save_every, base)
    typer.echo(f"{out}: {(out / 'figures.json').read_text()}")


if __name__ == "__main__":
    typer.run(main)
