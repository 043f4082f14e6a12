"""How near generation, the optimizer step and a whole compile come to what a machine can do.

    python -m benchmarks.machines.gpu                       # CUDA where there is one; a few minutes
    python -m benchmarks.machines.gpu --device cpu --quick  # whether it runs, on two toy layers

Nothing is downloaded. The models are the embedded recipe's architecture (``Lfm2``: convolutions
and attention in turn) with its tokenizer, scaled to 36 and 96 M random weights; their completions
have no end token, so that lengths are known. Every figure stands beside a floor, from two ceilings
that are measured first: the bandwidth of a copy (bytes read and written) and the rate of a large
matrix product, both in the model's dtype.

- A token position takes 2 FLOP a weight to read and 6 to train on; the output layer is needed at
  completions only. Attention scores are left out.
- A decode step reads every weight once, and the keys and values of every row.

So the floors know nothing of kernel launches, sampling, DSPy and Python: these are what is between.

Decoding is measured both ways: from a cache of fixed size, whose step is replayed as a CUDA graph,
and from one that grows (``fst_dspy/model/graph_decode.py``).
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import dspy
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machines.gpu_work import (
    PLAIN_ROWS,
    QUICK,
    Ceilings,
    Load,
    PlainLoop,
    Work,
    beside,
    endless,
    measure_ceilings,
    median_seconds,
    prompts,
    training_rows,
    write_model,
)
from benchmarks.speed.measure import commit, machine
from benchmarks.speed.models import WholeAnswer, early_letters, program, questions
from fst_dspy import FST
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.model import graph_decode as static_decode
from fst_dspy.model.generate import GenerationRequest, GenerationResult, generate
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer

RESULTS = Path(__file__).parent.parent / "results"
console = Console()


def rollouts(policy: Policy, load: Load) -> list[GenerationRequest]:
    """All rollouts of a step, to be sampled at temperature 1."""
    return [
        GenerationRequest(prompt, load.completion, seed=number * load.group + n)
        for number, prompt in enumerate(prompts(load, policy.model.config.vocab_size))
        for n in range(load.group)
    ]


def measure_generation(policy: Policy, load: Load, limit: Ceilings) -> dict[str, Any]:
    """The rollouts of a step in one batch."""
    requests = rollouts(policy, load)
    work, rows = Work.of(policy), len(requests)
    seconds = median_seconds(lambda: generate(policy, requests), policy.device, load.repeats)
    read = work.flop(2, load.problems * load.prompt, load.problems)
    floor = read / limit.flops
    floor += work.decode_bytes(rows, load.prompt, load.completion) / limit.bandwidth
    tokens = rows * load.completion
    return beside(
        seconds,
        floor,
        rows=rows,
        prompt_tokens=load.prompt,
        completion_tokens=load.completion,
        tokens_per_second=tokens / seconds,
        floor_tokens_per_second=tokens / floor,
        milliseconds_per_token=1000 * seconds / load.completion,
    )


def measure_decoding(policy: Policy, load: Load) -> dict[str, Any]:
    """The same batch from a cache of fixed size and from one that grows.

    Of each row the tokens are compared up to the first that the two do not agree on: in bfloat16
    a rounding may tip a draw. ``first_seconds`` is with the recording.
    """
    requests, device, before = rollouts(policy, load), policy.device, static_decode.DEVICES
    seconds: dict[str, float] = {}
    sampled: list[list[GenerationResult]] = []
    static_decode.release(policy)
    try:
        for name, devices in (("static", (device.type,)), ("growing", ())):
            static_decode.DEVICES = devices
            started = time.perf_counter()
            sampled.append(generate(policy, requests))
            seconds.setdefault("first_seconds", time.perf_counter() - started)
            seconds[f"{name}_seconds"] = median_seconds(
                lambda: generate(policy, requests), device, load.repeats
            )
    finally:
        static_decode.DEVICES = before
    agreed, difference = 0, 0.0
    for one, other in zip(*sampled, strict=True):
        for a, b, logprob_a, logprob_b in zip(
            one.completion_ids_T, other.completion_ids_T, one.logprobs_T, other.logprobs_T,
            strict=True,
        ):  # fmt: skip
            if a != b:
                break
            agreed, difference = agreed + 1, max(difference, abs(logprob_a - logprob_b))
    return {
        **seconds,
        "against_growing": seconds["static_seconds"] / seconds["growing_seconds"],
        "agreeing_tokens": agreed / (len(requests) * load.completion),
        "logprob_difference": difference,
    }


def measure_step(folder: Path, device: torch.device, load: Load, limit: Ceilings) -> dict[str, Any]:
    """``SlowTrainer.advance`` and the plain loop, each on weights of its own."""
    slow = SlowConfig()
    policy, plain = endless(folder, device).policy, endless(folder, device, "float32").policy
    rows = training_rows(load, policy.model.config.vocab_size)
    trainer, loop = SlowTrainer(policy, slow, SamplingConfig(), 100, 0), PlainLoop(plain, slow)
    losses = {"loss": trainer.advance(rows).loss, "plain_loss": loop.step(rows, PLAIN_ROWS[0])}
    seconds = median_seconds(lambda: trainer.advance(rows), device, load.repeats)
    plain_seconds, plain_rows = min(
        (median_seconds(partial(loop.step, rows, size), device, load.repeats), size)
        for size in PLAIN_ROWS
    )
    positions, outputs = len(rows) * (load.prompt + load.completion), len(rows) * load.completion
    return beside(
        seconds,
        Work.of(policy).flop(6, positions, outputs) / limit.flops,
        plain_seconds=plain_seconds,
        plain_rows=plain_rows,
        against_plain=seconds / plain_seconds,
        rows=len(rows),
        tokens=positions,
        tokens_per_second=positions / seconds,
        **losses,
    )


def letters(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None):
    """A reward that random text spreads over, and a lesson for the fast channel."""
    lesson = f"Lesson: the answer to {gold.question[:12]} begins with an early letter."
    return dspy.Prediction(score=early_letters(gold, pred), feedback=lesson)


def measure_compile(
    folder: Path, device: torch.device, load: Load, limit: Ceilings
) -> dict[str, Any]:
    """A whole compile, both channels on."""
    lm = endless(folder, device)
    settings: dict[str, Any] = {
        "max_cycles": 1 if load is QUICK else 3,
        "steps_per_cycle": 2 if load is QUICK else 4,
        "problems_per_step": load.problems,
        "group_size": load.group,
        "population_size": min(4, load.group),
        "val_size": 2 * load.problems,
        "max_tokens": load.completion,
        "first_cycle_iterations": 2,
        "minibatch_size": load.problems,
        "learning_rate": 1e-5,  # at the default, random weights answer alike after a step
    }
    examples = questions(lm, 5 * load.problems, load.prompt)
    train, val = examples[: 3 * load.problems], examples[3 * load.problems :]
    fst = FST(letters, track_stats=True, **settings)
    started = time.perf_counter()
    with dspy.context(lm=lm, adapter=WholeAnswer()):
        compiled = fst.compile(program(), trainset=train, valset=val)
    seconds = time.perf_counter() - started
    result = compiled.detailed_results
    last, work = result.records[-1], Work.of(lm.policy)
    counts, tokens = result.rollouts, last.tokens
    # A group's prompts are read once a candidate at best; a decode step serves all threads at best.
    read = work.flop(2, tokens["prompt"] * settings["population_size"] // load.group, 0)
    decoded = tokens["completion"] / fst.config.sampling.num_threads * work.weight_bytes
    share = counts.slow / counts.total
    trained = work.flop(
        6, int(share * (tokens["prompt"] + tokens["completion"])), int(share * tokens["completion"])
    )
    return beside(
        seconds,
        (read + trained) / limit.flops + decoded / limit.bandwidth,
        rollouts=counts.total,
        rollouts_per_second=counts.total / seconds,
        steps=last.step,
        tokens=dict(tokens),
        seconds_by_channel=dict(last.seconds),
        kl_to_base=last.kl_to_base,
        settings=settings,
    )


def device_name(device: torch.device, about: dict[str, Any]) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else about["cpu"]


def peak_gib(device: torch.device) -> float | None:
    """The most GPU memory held so far; starts the count anew. ``None`` on the CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def show(report: dict[str, Any]) -> None:
    """The table."""
    table = Table("M weights", "what", "seconds", "floor", "share of it", "rate")
    for size in report["sizes"]:
        weights = f"{size['parameters'] / 1e6:.1f}"
        for name, unit in (("generation", "tokens"), ("step", "tokens"), ("compile", "rollouts")):
            if name in size:
                row = size[name]
                table.add_row(
                    weights, name, f"{row['seconds']:.3g}", f"{row['floor_seconds']:.3g}",
                    f"{row['floor_share']:.1%}", f"{row[f'{unit}_per_second']:,.0f} {unit}/s",
                )  # fmt: skip
        decoding = size["decoding"]
        console.print(
            f"{weights} M: step {size['step']['against_plain']:.2f}x the plain loop; generation "
            f"{decoding['static_seconds']:.3g} s from a fixed cache, "
            f"{decoding['growing_seconds']:.3g} s from a growing one, tokens alike "
            f"{decoding['agreeing_tokens']:.1%}, logprobs to {decoding['logprob_difference']:.2g}",
            soft_wrap=True,
        )
    console.print(table)


def main(
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; CUDA where there is one.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A toy size, to see whether it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and write the JSON file."""
    started, load = time.perf_counter(), QUICK if quick else Load()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = machine()
    about["device"] = device_name(where, about)
    sizes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root, console.status("") as status:
        limit: Ceilings | None = None
        for hidden, layers in load.sizes:
            label = f"hidden {hidden}, {layers} layers: "
            status.update(f"{label}making the model")
            folder = write_model(Path(root) / f"random-{hidden}", hidden, layers)
            lm = endless(folder, where)
            if limit is None:
                status.update("the machine's ceilings")
                limit = measure_ceilings(where, lm.policy.model.dtype, load)
            status.update(f"{label}generation")
            size = {
                "hidden": hidden,
                "layers": layers,
                "parameters": Work.of(lm.policy).weights,
                "dtype": str(lm.policy.model.dtype).removeprefix("torch."),
                "generation": measure_generation(lm.policy, load, limit),
                "decoding": measure_decoding(lm.policy, load),
            }
            status.update(f"{label}step")
            size["step"] = measure_step(folder, where, load, limit)
            if not sizes:
                status.update(f"{label}compile")
                size["compile"] = measure_compile(folder, where, load, limit)
            size["peak_gib"] = peak_gib(where)
            sizes.append(size)
    assert limit is not None
    report = {
        "machine": about,
        "commit": commit(),
        "command": f"python -m benchmarks.machines.gpu{f' --device {device}' if device else ''}"
        + (" --quick" if quick else ""),
        "ceilings": {"bytes_per_second": limit.bandwidth, "flop_per_second": limit.flops},
        "sizes": sizes,
        "seconds": time.perf_counter() - started,
    }
    slug = re.sub(r"\W+", "-", about["device"].lower()).strip("-")
    out = out or RESULTS / f"gpu-{slug}{'-quick' if quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    console.print(f"{out}, after {report['seconds']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
