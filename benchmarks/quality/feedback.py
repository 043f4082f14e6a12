"""What the wording of a metric's feedback is worth: one task, many ways to say what was wrong.

    OMP_NUM_THREADS=1 python benchmarks/quality/feedback.py

Triage on the embedded model, without a reflection LM; every run has the same tickets, policy, score
and budget, and the feedback is worded in another way. ``gepa_only`` runs for one cycle, so that
what is seen is what the prompts learn from the text. Each wording runs twice: on 200 training
examples, where rules can also be read off the labels, and on 24, two a topic, which are too few for
that. Written to ``benchmarks/results/feedback.json`` and, as a table, to ``feedback.md`` beside it;
what has run is not run again.
"""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import dspy
import typer

import fst_dspy
from fst_dspy.files import write_atomically
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.tasks import load_task

RESULTS = Path(__file__).parent.parent / "results"
SETTINGS = {"max_tokens": 64, "max_cycles": 1}
MANY, FEW = 200, 24
A_TOPIC = 2
TEST, SAMPLES = 100, 4

Wording = Callable[[dspy.Example, str], str]

WORDINGS: dict[str, Wording] = {
    "no text": lambda gold, got: "",
    "a verdict": lambda gold, got: "Right." if got == gold.queue else "Wrong.",
    "general advice": lambda gold, got: (
        "Read the ticket carefully and choose the queue that fits its topic best."
    ),
    "expected and got": lambda gold, got: f"Expected {gold.queue}, got {got}.",
    "the right answer in a sentence": lambda gold, got: (
        f"The answer {got} was wrong. It should have been {gold.queue}."
        if got != gold.queue
        else "The answer was right."
    ),
    "the input quoted": lambda gold, got: f'The ticket "{gold.ticket}" should go to {gold.queue}.',
    "a rule, answer first": lambda gold, got: f"Lesson: {gold.queue} takes {gold.topic} tickets.",
    "a rule amid other sentences": lambda gold, got: (
        f"The ticket was sent to {got} and our team looked at it on the same day. "
        f"{gold.topic} tickets go to {gold.queue}. Please keep this in mind for tickets to come."
    ),
    "a rule": lambda gold, got: f"{gold.topic} tickets go to {gold.queue}.",
    "a rule, marked": lambda gold, got: f"Lesson: {gold.topic} tickets go to {gold.queue}.",
}
"""By name: the feedback on an example and the queue that was answered."""


def metric_of(wording: Wording) -> Callable[..., dspy.Prediction]:
    """Triage's score, with another text."""

    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):  # type: ignore[no-untyped-def]
        got = str(getattr(pred, "queue", "")).strip() or "no queue"
        return dspy.Prediction(score=float(got == gold.queue), feedback=wording(gold, got))

    return metric


def few_of(examples: list[dspy.Example]) -> list[dspy.Example]:
    """The first ``A_TOPIC`` examples of every topic."""
    counts: Counter[str] = Counter()
    kept = []
    for example in examples:
        counts[example.topic] += 1
        if counts[example.topic] <= A_TOPIC:
            kept.append(example)
    return kept


def run(name: str, train: int, seed: int) -> dict[str, Any]:
    """One compile under one wording, tested on examples that it has not seen."""
    task = load_task(f"triage:train={MANY},test={TEST}", seed)
    trainset = task.trainset if train == MANY else few_of(task.trainset)
    metric, lm = metric_of(WORDINGS[name]), fst_dspy.LocalLM("embedded", cache=False)
    fst = fst_dspy.FST(metric, arm="gepa_only", seed=seed, track_stats=True, **SETTINGS)
    with dspy.context(lm=lm):
        compiled = fst.compile(task.program, trainset=trainset, valset=task.valset)
        result = compiled.detailed_results
        runner = RolloutRunner(task.program, metric, lm, fst.config.sampling, seed)
        tested = evaluate(
            runner,
            [result.seed_candidate, result.best.candidate],
            task.testset,
            samples=SAMPLES,
            version=result.base_version,
        )
    before, after = tested.mean_K
    example = trainset[0]
    return {
        "wording": name,
        "train": train,
        "seed": seed,
        "sample": WORDINGS[name](example, "onyx"),
        "before": before,
        "test": after,
        "proposals": dict(result.records[-1].proposals),
        "rollouts": result.rollouts.total,
        "instruction": result.best.candidate.components["predict.instructions"],
        "commit": _commit(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The wordings as a Markdown table, in the order of ``WORDINGS``: sums and means over seeds."""
    heads = ["feedback", "for example"]
    for train in (FEW, MANY):
        heads += [f"{train} examples: accepted", "test"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name in WORDINGS:
        cells = [name, ""]
        for train in (FEW, MANY):
            group = [r for r in rows if r["wording"] == name and r["train"] == train]
            accepted, made = (
                sum(r["proposals"][kind] for r in group) for kind in ("accepted", "proposals")
            )
            cells[1] = group[0]["sample"] or "(none)"
            cells += [f"{accepted} of {made}", f"{fmean(r['test'] for r in group):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(seeds: Annotated[int, typer.Option(min=1, help="Of each wording.")] = 3) -> None:
    """Run what has not run yet, then write the table."""
    file = RESULTS / "feedback.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(row["wording"], row["train"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for train in (MANY, FEW):
            for name in WORDINGS:
                if (name, train, seed) not in done:
                    rows.append(run(name, train, seed))
                    last = rows[-1]
                    print(seed, train, name, last["proposals"], f"{last['test']:.3f}", flush=True)
                    text = json.dumps(rows, indent=1) + "\n"
                    write_atomically(file, lambda out, text=text: out.write(text.encode()))
    (RESULTS / "feedback.md").write_text(table(rows))


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS, capture_output=True, text=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    typer.run(main)
