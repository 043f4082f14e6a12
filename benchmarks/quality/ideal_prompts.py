"""Whether the best prompt depends on the weights: prompts of before and after, under both.

    python benchmarks/quality/ideal_prompts.py STORE... [--results FILE]

Of every run of ``fst`` in a store whose opening found another prompt than the run ended with: what
both score on the test examples, under the base weights and under those that the run ended with.
Where what is gained by the later prompt is the same under both, prompts that were found first and
for good lose nothing by it, and taking turns gains nothing. Stores are those of ``fst compare``,
``families.py`` or ``real_lm.py`` on the machine that ran them, for packed ones hold no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import dspy
import typer

from fst_dspy import LocalLM
from fst_dspy.bundle.weights import read_run
from fst_dspy.config import SamplingConfig
from fst_dspy.errors import FSTError
from fst_dspy.experiments import ExperimentStore, load_runs
from fst_dspy.experiments.findings.tables import Table, interval_text
from fst_dspy.experiments.runs import Run
from fst_dspy.experiments.stages import load_job_task
from fst_dspy.files import read_json, read_jsonl
from fst_dspy.measures import mean_interval
from fst_dspy.results.result import result_from_json
from fst_dspy.rollouts.evaluate import evaluate
from fst_dspy.rollouts.runner import RolloutRunner
from fst_dspy.student.candidate import candidate_from_json

RESULTS = Path(__file__).parent.parent / "results" / "ideal_prompts.md"


@dataclass(frozen=True)
class Crossed:
    """Mean test scores of two prompts under two weights.

    Attributes:
        seed: Of the run.
        first_W, last_W: Of the opening's prompt and of the last, under base and trained weights.
        kl: Of the trained weights to the base, nats a token.
    """

    seed: int
    first_W: tuple[float, float]
    last_W: tuple[float, float]
    kl: float

    @property
    def gain_W(self) -> tuple[float, float]:
        """What the last prompt has more, under base and trained weights."""
        base, trained = (b - a for a, b in zip(self.first_W, self.last_W, strict=True))
        return base, trained


def crossed(store: ExperimentStore, run: Run, samples: int) -> Crossed | None:
    """Test both prompts under both weights; ``None`` where they, or the weights, are the same."""
    folder = store.folder / run.name / run.outcome.stages[-1]
    result = result_from_json(read_json(folder / "result.json"))
    known = {
        row["id"]: candidate_from_json(row)
        for line in read_jsonl(folder / "population.jsonl")
        for row in line["candidates"]
    }
    opening = [record for record in result.records if record.step == 0][-1]
    first, last = known[opening.best_candidate_id], result.best.candidate
    if first.id == last.id or result.best.version == result.base_version:
        return None
    task = load_job_task(run.job, run.job.program)
    policy = read_run(folder, None if run.job.model == "embedded" else run.job.model)
    policy.keep()
    lm = LocalLM(policy)
    sampling = SamplingConfig(max_tokens=result.sampling.max_tokens, structured=result.structured)
    runner = RolloutRunner(task.program, task.metric, lm, sampling, run.job.seed)
    testset = task.testset[: run.job.test_size]
    with dspy.context(lm=lm):
        found = [
            evaluate(runner, [first, last], testset, samples=samples, version=version).mean_K
            for version in (result.base_version, result.best.version)
        ]
    first_W, last_W = zip(*found, strict=True)
    kl = result.records[result.best.cycle].kl_to_base
    return Crossed(run.job.seed, first_W, last_W, kl)


def main(
    stores: Annotated[list[Path], typer.Argument()],
    samples: Annotated[int, typer.Option(help="Answers to a test example.")] = 4,
    results: Annotated[Path, typer.Option(help="Where the table goes.")] = RESULTS,
) -> None:
    """Test what the runs found, and write the table."""
    rows: list[tuple[str, ...]] = []
    said: list[str] = []
    for path in stores:
        store, found = ExperimentStore(path), []
        for run in load_runs(store):
            if run.job.label != "fst":
                continue
            try:
                one = crossed(store, run, samples)
            except FSTError as error:
                typer.echo(f"{path.name}, {run.name}: {error}")
                continue
            if one is None:
                typer.echo(f"{path.name}, {run.name}: the opening's prompt, or weights, are kept")
                continue
            found.append(one)
            scores = (*one.first_W, *one.last_W)
            gains = (f"{gain:+.3f}" for gain in one.gain_W)
            cells = (f"{one.kl:.3f}", *(f"{score:.3f}" for score in scores), *gains)
            rows.append((path.name, str(one.seed), *cells))
            typer.echo(" ".join(rows[-1]))
        if found:
            more = mean_interval(trained - base for base, trained in (one.gain_W for one in found))
            said.append(f"- {path.name}: {interval_text(more)} of {len(found)} runs")
    table = Table(
        "Prompts under weights",
        (
            "store",
            "seed",
            "KL",
            "first, base",
            "first, trained",
            "last, base",
            "last, trained",
            "gain, base",
            "gain, trained",
        ),
        tuple(rows),
        "Mean test scores of the prompt that the opening ended with and of the one that the run "
        "ended with, under base and trained weights.",
    )
    heading = (
        "What the later prompt gains more under the trained weights (95 % intervals over runs):"
    )
    results.write_text("\n".join([table.markdown(), heading, "", *said, ""]))


if __name__ == "__main__":
    typer.run(main)
