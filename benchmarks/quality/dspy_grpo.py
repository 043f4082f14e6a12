"""DSPy's own weight optimizers on triage, through the local provider: an honest baseline.

    python benchmarks/quality/dspy_grpo.py --seeds 0 --out benchmarks/results/dspy_grpo.json
    python benchmarks/quality/dspy_grpo.py --programs frozen_lake,gridworld --seeds 0,1,2,3,4 \
        --no-better-together --max-tokens 32 --out benchmarks/results/agents/dspy_grpo.json

For each seed: ``dspy.GRPO`` for some steps from the bare prompt; and ``dspy.BetterTogether`` with
``p -> w -> p``, where p is ``dspy.GEPA`` with the lessons in the feedback and w is ``dspy.GRPO``.
DSPy's rollouts are sampled afresh at every run: the seeds fix the data and its order, not the text.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import dspy
import typer
from dspy.teleprompt import GEPA, BetterTogether
from dspy.teleprompt.grpo import GRPO
from dspy.utils.callback import BaseCallback
from rich.console import Console

from fst_dspy import LocalLM
from fst_dspy.fast.proposers.lessons import LessonProposer
from fst_dspy.files import write_atomically
from fst_dspy.student.candidate import content_hash
from fst_dspy.tasks import load_task
from fst_dspy.types import Task

RESULTS = Path(__file__).parent.parent / "results"
ADAPTER = dspy.ChatAdapter(use_json_adapter_fallback=False)
INSTRUCTION_TOKENS = 256
PROBLEMS, GROUP = 8, 8
"""Problems a step, and rollouts of each."""
THREADS = 64
MAX_TOKENS = 48
"""Twice what a well-formed answer takes; one that runs on holds up its whole batch."""
TOGETHER = "dspy.BetterTogether p -> w -> p"
console = Console()


class LessonsForGEPA:
    """The package's lesson proposer behind ``dspy.GEPA``'s ``instruction_proposer``."""

    def __init__(self, lm: LocalLM) -> None:
        tokenizer = lm.policy.tokenizer
        self.lessons = LessonProposer(
            INSTRUCTION_TOKENS,
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        )

    def __call__(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        names = [f"{name}.instructions" for name in components_to_update]
        proposed = self.lessons.propose(
            {f"{name}.instructions": text for name, text in candidate.items()},
            {
                f"{name}.instructions": [as_record(row) for row in reflective_dataset[name]]
                for name in components_to_update
            },
            names,
        )
        return {name.removesuffix(".instructions"): text for name, text in proposed.items()}


def as_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """One of GEPA's reflective examples, which have no scores, as the proposer takes it."""
    failed = isinstance(row["Generated Outputs"], str)  # the answer, where it did not parse
    return {
        **row,
        "score": 0.0,
        "example_id": content_hash(dict(row["Inputs"])),
        "labels": {},
        "failure": "parse" if failed else None,
    }


class Validation(BaseCallback):
    """Scores of the evaluations with the task's own metric, in percent, in order.

    ``dspy.GRPO``'s rollouts are evaluations too, with a metric that wraps the task's.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self.scores: list[float] = []
        self._open: set[str] = set()

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if inputs.get("metric") is self.metric:
            self._open.add(call_id)

    def on_evaluate_end(
        self, call_id: str, outputs: Any | None, exception: BaseException | None = None
    ) -> None:
        if call_id in self._open and outputs is not None:
            self.scores.append(outputs.score)


def grpo(task: Task, seed: int, steps: int, learning_rate: float) -> GRPO:
    """``dspy.GRPO`` with as many problems and rollouts a step as FST's slow phase has."""
    return GRPO(
        metric=task.metric,
        adapter=ADAPTER,
        exclude_demos=True,
        num_train_steps=steps,
        num_dspy_examples_per_grpo_step=PROBLEMS,
        num_rollouts_per_grpo_step=GROUP,
        num_steps_for_val=5,
        num_threads=THREADS,
        failure_score=0.0,
        format_failure_score=-0.1,
        seed=seed,
        train_kwargs={"learning_rate": learning_rate, "seed": seed},
    )


def run_grpo(task: Task, lm: LocalLM, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """``dspy.GRPO`` alone from the bare prompt."""
    program = task.program.deepcopy()
    program.set_lm(lm)
    base, started = lm.model, time.monotonic()
    before = score(program, task)
    with validated(task) as validation:
        compiled = grpo(task, seed, steps, rate).compile(
            program, trainset=task.trainset, valset=task.valset
        )
    return {
        "arm": "dspy.GRPO",
        "program": task.name,
        "seed": seed,
        "learning_rate": rate,
        "base_version": base,
        "weights_version": lm.model,
        "validation": validation.scores,
        "rollouts": steps * PROBLEMS * GROUP,
        "steps": step_figures(lm),
        "test_before": before,
        "test": score(compiled, task),
        "seconds": time.monotonic() - started,
    }


def run_better_together(
    task: Task, lm: LocalLM, seed: int, steps: int, rate: float, metric_calls: int
) -> dict[str, Any]:
    """``dspy.BetterTogether`` with GEPA and GRPO, and whether its best program is what it says."""
    program = task.program.deepcopy()
    program.set_lm(lm)
    started = time.monotonic()
    optimizer = BetterTogether(
        metric=task.metric,
        p=GEPA(
            metric=task.metric,
            instruction_proposer=LessonsForGEPA(lm),
            max_metric_calls=metric_calls,
            reflection_minibatch_size=12,
            num_threads=THREADS,
            seed=seed,
        ),
        w=grpo(task, seed, steps, rate),
    )
    compiled = optimizer.compile(
        program,
        trainset=task.trainset,
        valset=task.valset,
        strategy="p -> w -> p",
        num_threads=THREADS,
        seed=seed,
    )
    own, latest = greedy(compiled, task), greedy(compiled, task, lm.live())
    named = greedy(compiled, task, lm.at(compiled.predictors()[0].lm.model))
    return {
        "arm": TOGETHER,
        "program": task.name,
        "seed": seed,
        "learning_rate": rate,
        "failed": compiled.flag_compilation_error_occurred,
        "candidates": [
            {
                "strategy": entry["strategy"],
                "validation": entry["score"],
                "weights_version": entry["program"].predictors()[0].lm.model,
                "test": score(entry["program"], task),
            }
            for entry in compiled.candidate_programs
        ],
        "latest_version": lm.policy.version(),
        "steps": step_figures(lm),
        "greedy_answers": len(own),
        "same_as_under_the_weights_it_names": sum(map(str.__eq__, own, named)),
        "same_as_under_the_latest_weights": sum(map(str.__eq__, own, latest)),
        "seconds": time.monotonic() - started,
    }


def step_figures(lm: LocalLM) -> list[dict[str, Any]]:
    """Reward and loss of every step of the latest reinforcement job."""
    return [
        {
            "step": record.step,
            "reward": record.reward,
            "constant_group_share": record.constant_group_share,
            # Not measured where no step was taken: the sampled log-probabilities are gone.
            "entropy": None if record.stats.skipped else record.stats.entropy,
            "grad_norm": None if record.stats.skipped else record.stats.grad_norm,
            "calls": record.rollouts,  # rows: DSPy's provider gives one a call, not one a rollout
            "skipped": record.stats.skipped,
        }
        for record in lm.provider.jobs[-1].records
    ]


def score(program: dspy.Module, task: Task) -> float:
    """Mean score on the test set in percent, sampled as in training."""
    evaluate = dspy.Evaluate(devset=task.testset, metric=task.metric, num_threads=THREADS)
    return evaluate(program).score


def greedy(program: dspy.Module, task: Task, lm: LocalLM | None = None) -> list[str]:
    """Greedy answers to 50 test tickets, uncached, with the program's weights or an LM's."""
    program = program.deepcopy()
    for predictor in program.predictors():
        predictor.lm = (lm or predictor.lm).copy(temperature=0.0, cache=False)
    pairs = [(program, example.inputs()) for example in task.testset[:50]]
    parallel = dspy.Parallel(num_threads=THREADS, disable_progress_bar=True)
    return [str(getattr(prediction, "queue", "")) for prediction in parallel(pairs)]


@contextmanager
def validated(task: Task) -> Iterator[Validation]:
    """Inside the block, evaluations on the validation set are recorded."""
    validation = Validation(task.metric)
    with dspy.context(callbacks=[*dspy.settings.callbacks, validation]):
        yield validation


def main(
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    steps: Annotated[int, typer.Option(help="Optimizer steps of each GRPO.")] = 20,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    metric_calls: Annotated[int, typer.Option(help="Metric calls of each GEPA.")] = 400,
    model: Annotated[str, typer.Option(help='"embedded", a folder or a hub id.')] = "embedded",
    test_size: Annotated[int, typer.Option(help="Test examples, at most 200.")] = 200,
    programs: Annotated[str, typer.Option(help="Comma-separated.")] = "triage",
    better_together: Annotated[bool, typer.Option(help="Of triage: BetterTogether too.")] = True,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = MAX_TOKENS,
    out: Annotated[Path, typer.Option(help="File to write.")] = RESULTS / "dspy_grpo.json",
) -> None:
    """Run both arms for every seed and write the figures."""
    logging.getLogger("dspy").setLevel(logging.ERROR)
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    # An answer that does not parse is an error to dspy.Evaluate; here it is data, and scored.
    dspy.configure(adapter=ADAPTER, max_errors=1_000_000)
    runs: list[dict[str, Any]] = []
    if out.is_file():  # what has run is not run again
        before = json.loads(out.read_text())
        runs = before["runs"] if before["model"] == model else []
    done = {(run["arm"], run.get("program", "triage"), run["seed"]) for run in runs}
    for program, seed in itertools.product(programs.split(","), map(int, seeds.split(","))):
        task = load_task(program, seed)
        task = replace(task, testset=task.testset[:test_size])
        arms = ["dspy.GRPO", *([TOGETHER] if better_together else [])]
        for arm in arms:
            if (arm, task.name, seed) in done:
                continue
            lm = LocalLM(model, max_tokens=max_tokens)
            if arm == TOGETHER:
                run = run_better_together(task, lm, seed, steps, learning_rate, metric_calls)
                test = run["candidates"][0]["test"]
            else:
                run = run_grpo(task, lm, seed, steps, learning_rate)
                test = run["test"]
            runs.append(run)
            console.print(f"{task.name}, seed {seed}, {arm}: test {test}")
            write(out, model, runs)
    console.print(f"written to {out}")


def write(out: Path, model: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write the figures so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plain = json.dumps({"schema_version": 1, "model": model, "runs": list(runs)}, indent=1)
    write_atomically(out, lambda file: file.write(plain.encode()))


if __name__ == "__main__":
    typer.run(main)
