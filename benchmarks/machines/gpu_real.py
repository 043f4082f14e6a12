"""SmolLM2 on a GPU: generation and step beside vLLM's, transformers' and a plain loop's.

    python -m benchmarks.machines.gpu_real                           # some five minutes on a GPU
    python -m benchmarks.machines.gpu_real --model embedded --device cpu --quick  # whether it runs

Every engine samples the rollouts of one step at temperature 1, prompts of random tokens, from the
same weights in bfloat16; lengths are known, for no end token ends a completion. An engine that
cannot run is told with its error. ``mixed`` is the same with completions of very unlike lengths, on
which continuous batching is to show what it is worth. What vLLM gives is compared with the policy's
own log-probabilities. Tasks are ``make real``'s, which takes the GPU by itself.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from benchmarks.machines.gpu_work import PLAIN_ROWS, QUICK, Load, PlainLoop, median_seconds, prompts
from benchmarks.machines.gpu_work import training_rows as rows_of
from benchmarks.speed.measure import commit, machine
from benchmarks.speed.models import without_end
from fst_dspy import LocalLM, use_vllm
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.logprobs import completion_logprobs
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

RESULTS = Path(__file__).parent.parent / "results"
LOAD = Load(problems=8, group=8, prompt=350, completion=24)
"""The step whose time is watched: 64 rollouts of 350 tokens and 24 new ones."""
LONGEST = 16
"""Times the longest of ``mixed`` is as long as the shortest."""
console = Console()


def rollouts(policy: Policy, load: Load, *, mixed: bool) -> list[GenerationRequest]:
    """All rollouts of a step."""
    vocabulary = policy.model.config.vocab_size
    return [
        GenerationRequest(
            prompt,
            load.completion * (1 + (LONGEST - 1) * n // max(1, load.group - 1) if mixed else 1),
            seed=number * load.group + n,
        )
        for number, prompt in enumerate(prompts(load, vocabulary))
        for n in range(load.group)
    ]


def own(policy: Policy, requests: list[GenerationRequest]) -> None:
    """The built-in engine."""
    generate(policy, requests)


def plain(policy: Policy, requests: list[GenerationRequest]) -> None:
    """transformers' ``generate``, on one batch of equal lengths."""
    longest = max(request.max_tokens for request in requests)
    ids_BT = torch.tensor([r.prompt_ids_T for r in requests], device=policy.device)
    policy.model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        generation_config=_config(policy, longest),
    )


def continuous(policy: Policy, requests: list[GenerationRequest]) -> None:
    """transformers' own continuous batching, the requests of each length in turn."""
    for length in sorted({request.max_tokens for request in requests}):
        ids = [list(r.prompt_ids_T) for r in requests if r.max_tokens == length]
        policy.model.generate_batch(ids, generation_config=_config(policy, length))


def _config(policy: Policy, length: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        pad_token_id=policy.tokenizer.pad_token_id,
    )


def vllm(policy: Policy, requests: list[GenerationRequest]) -> None:
    """vLLM, once it is the policy's engine."""
    policy.generator(policy, requests)


ENGINES: Mapping[str, Callable[[Policy, list[GenerationRequest]], None]] = {
    "built-in": own,
    "transformers generate": plain,
    "transformers continuous batching": continuous,
    "vLLM": vllm,
    "vLLM, adapters": vllm,
}


def measure_engine(name: str, model: str, device: torch.device, load: Load) -> dict[str, Any]:
    """Seconds and tokens a second of one engine, on a model of its own; or why it cannot run."""
    found: dict[str, Any] = {}
    try:
        policy = Policy.load(model, device=device)
        if name.startswith("vLLM"):
            adapters = name.endswith("adapters")
            use_vllm(policy, lora=adapters)
            if adapters:
                policy.add_lora(LoraConfig(), seed=0)
        else:
            without_end(LocalLM(policy, cache=False))
        for kind in ("even", "mixed"):
            requests = rollouts(policy, load, mixed=kind == "mixed")
            run = partial(ENGINES[name], policy, requests)
            seconds = median_seconds(run, device, load.repeats)
            tokens = sum(request.max_tokens for request in requests)
            found[kind] = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if policy.generator is not None:
            found["logprobs_apart"] = logprobs_apart(policy, requests)
    except Exception as error:  # one engine must not hide the others
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    gc.collect()
    return found


@torch.no_grad()
def logprobs_apart(policy: Policy, requests: list[GenerationRequest]) -> float:
    """Mean difference of an engine's log-probabilities from the policy's own, nats a token."""
    few = [replace(request, max_tokens=8) for request in requests[:16]]
    results = policy.generator(policy, few)
    rows = [
        TrainingRow(r.prompt_ids_T, one.completion_ids_T, one.logprobs_T, 0.0)
        for r, one in zip(few, results, strict=True)
    ]
    with policy.lock:
        logprob_NV = completion_logprobs(policy, rows)
    ids = [token for row in rows for token in row.completion_ids_T]
    own_N = logprob_NV.gather(1, torch.tensor(ids, device=logprob_NV.device)[:, None]).squeeze(1)
    given_N = torch.tensor([x for row in rows for x in row.logprobs_T], device=own_N.device)
    return float((own_N - given_N).abs().mean())


def measure_step(model: str, device: torch.device, load: Load) -> dict[str, float]:
    """``SlowTrainer.advance`` and the plain loop, each on weights of its own."""
    slow, found = SlowConfig(), {}
    policy = Policy.load(model, device=device)
    rows = rows_of(load, policy.model.config.vocab_size)
    trainer = SlowTrainer(policy, slow, SamplingConfig(), 100, 0)
    found["seconds"] = median_seconds(lambda: trainer.advance(rows), device, load.repeats)
    loop = PlainLoop(Policy.load(model, device=device, dtype="float32"), slow)
    found["plain_seconds"] = min(
        median_seconds(partial(loop.step, rows, size), device, load.repeats) for size in PLAIN_ROWS
    )
    return found


def main(
    model: Annotated[str, typer.Option(help="As for LocalLM.")] = "smollm2-base",
    device: Annotated[str | None, typer.Option(help="cuda or cpu.")] = None,
    quick: Annotated[bool, typer.Option(help="A few short rows, to see whether it runs.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and write the JSON file."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    load, about, started = QUICK if quick else LOAD, machine(), time.perf_counter()
    about["device"] = torch.cuda.get_device_name(where) if where.type == "cuda" else about["cpu"]
    engines = {name: measure_engine(name, model, where, load) for name in ENGINES}
    report = {
        "machine": about,
        "commit": commit(),
        "command": f"python -m benchmarks.machines.gpu_real --model {model}"
        + (f" --device {device}" if device else "")
        + (" --quick" if quick else ""),
        "load": {
            "rollouts": load.problems * load.group,
            "prompt_tokens": load.prompt,
            "completion_tokens": load.completion,
        },
        "engines": engines,
        "step": measure_step(model, where, load),
        "seconds": time.perf_counter() - started,
    }
    slug = re.sub(r"\W+", "-", f"{model}-{about['device']}".lower()).strip("-")
    out = out or RESULTS / f"gpu-real-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("engine", "even", "mixed", "tokens/s, mixed", "error")
    for name, row in engines.items():
        both = [
            f"{row[kind]['seconds']:.3g} s" if kind in row else "" for kind in ("even", "mixed")
        ]
        rate = f"{row['mixed']['tokens_per_second']:,.0f}" if "mixed" in row else ""
        table.add_row(name, *both, rate, row.get("error", ""))
    console.print(table)
    step = report["step"]
    console.print(f"step {step['seconds']:.3g} s, plain loop {step['plain_seconds']:.3g} s; {out}")


if __name__ == "__main__":
    typer.run(main)
