"""(g) A step of a model of SmolLM2's size (135 M, random): generation, optimizer step, bookkeeping.

64 rollouts, 8 of each of 8 problems, with prompts of 350 tokens of which the first 250 are the same
for all, and 24 new tokens each. In the dtype that such a model has by default, and on all cores.

Beside it stand the matrix products that such a step cannot do without, of the very shapes, taken in
the same run: each token of the rows' tree forward and backward once, and those of generation.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.measure import Clock, Row, peak_memory, row_of
from benchmarks.speed.models import embedded, without_end
from fst_dspy import LocalLM
from fst_dspy.config import SamplingConfig, SlowConfig
from fst_dspy.loop.folder import RunFolder
from fst_dspy.loop.state import LoopState
from fst_dspy.model.generate import GenerationRequest, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.sizes import parameter_bytes
from fst_dspy.slow.advantage import group_rows
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import Call, Group, Population, Rollout, StepRecord

SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
REPEATS = 3
PROBLEMS, GROUP, COMMON, OWN, NEW = 8, 8, 250, 100, 24
GOAL, CPU_GOAL = "<= 16", "<= 32"  # on two idle cores; by the CPU clock the seconds of both


def smollm2() -> Policy:
    """A random model of SmolLM2-135M's shape, with the embedded model's tokenizer."""
    tokenizer = embedded().policy.tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        **SMOLLM2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return without_end(LocalLM(Policy.load(folder, name="smollm2-random"))).policy


def run(quick: bool) -> Iterator[Row]:
    """The parts of a step, their sum, and its memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield from _rows(1 if quick else 3)
    finally:
        torch.set_num_threads(threads)


def _rows(steps: int) -> Iterator[Row]:
    policy = smollm2()
    before = parameter_bytes(policy.model)
    trainer = SlowTrainer(policy, SlowConfig(), SamplingConfig(max_tokens=NEW), steps + 1, seed=0)
    times: dict[str, list[float]] = {"generation": [], "step": [], "bookkeeping": []}
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path) / "run")
        peak = peak_memory(lambda: _step(policy, trainer, folder, 0, times))
        for parts in times.values():
            parts.clear()  # the first one warms up
        for number in range(1, steps + 1):
            _step(policy, trainer, folder, number, times)
        folder.close()
    dtype = str(policy.model.dtype).removeprefix("torch.")
    for name, seconds in times.items():
        yield row_of("g", f"135 M, {dtype}: {name}", "s", seconds)
    totals = [sum(parts) for parts in zip(*times.values(), strict=True)]
    goal = CPU_GOAL if Clock.cpu else GOAL
    yield row_of("g", "135 M: a step of 64 rollouts in all", "s", totals, goal)
    products = _products(policy.model.dtype)
    for name, seconds in zip(("generation", "step"), products, strict=True):
        yield row_of("g", f"135 M: {name}, the matrix products alone", "s", [seconds])
        shares = [whole / seconds for whole in times[name]]
        yield row_of("g", f"135 M: {name} against its matrix products", "x", shares)
    parameters = sum(w.numel() for w in policy.model.parameters())
    note = f"beside {before / parameters:.0f} bytes a parameter of weights; activations included"
    yield row_of("g", "135 M: peak memory of a step", "MiB", [peak], note=note)


def _products(dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of the matrix products of generation and of the optimizer step."""
    width, inner, layers = (
        SMOLLM2[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    key_width = width * SMOLLM2["num_key_value_heads"] // SMOLLM2["num_attention_heads"]
    layer = [(width, width)] * 2 + [(width, key_width)] * 2
    layer += [(width, inner)] * 2 + [(inner, width)]
    head = [(width, SMOLLM2["vocab_size"])]
    rows = PROBLEMS * GROUP
    prompts = COMMON + PROBLEMS * OWN

    def of(tokens: int, shapes: list[tuple[int, int]], *, gradient: bool) -> float:
        return sum(_product(tokens, *shape, dtype, gradient) for shape in shapes)

    token = layers * of(rows, layer, gradient=False) + of(rows, head, gradient=False)
    generation = layers * of(prompts, layer, gradient=False) + NEW * token
    read = prompts + rows * (NEW - 1)
    step = layers * of(read, layer, gradient=True) + of(rows * NEW, head, gradient=True)
    return generation, step


def _product(tokens: int, into: int, out: int, dtype: torch.dtype, gradient: bool) -> float:
    """Seconds of one product of states and weights, and of its two gradients if asked for."""
    state, weight = torch.randn(tokens, into).to(dtype), torch.randn(out, into).to(dtype)
    result = torch.nn.functional.linear(state, weight)
    started = Clock.now()
    for _ in range(REPEATS):
        torch.nn.functional.linear(state, weight)
        if gradient:
            result @ weight
            result.t() @ state
    return (Clock.now() - started) / REPEATS


def _step(
    policy: Policy,
    trainer: SlowTrainer,
    folder: RunFolder,
    number: int,
    times: dict[str, list[float]],
) -> None:
    started = Clock.now()
    groups = _groups(policy, number)
    sampled = Clock.now()
    stats = trainer.advance(group_rows(groups, "group"))
    stepped = Clock.now()
    folder.record_step(StepRecord(1, number, 0.5, 0.0, {}, 64, stats), groups, "group")
    state = LoopState(Population((), (), (), 0), step=number)
    if folder.is_due(closes=False):
        folder.checkpoint(state, None, policy)
    ended = Clock.now()
    for name, seconds in zip(
        times, (sampled - started, stepped - sampled, ended - stepped), strict=True
    ):
        times[name].append(seconds)


def _groups(policy: Policy, number: int) -> list[Group]:
    """Rollouts of random problems, with random rewards."""
    rng = random.Random(number)
    common = tuple(rng.choices(range(10, 1000), k=COMMON))
    prompts = [(*common, *rng.choices(range(10, 1000), k=OWN)) for _ in range(PROBLEMS)]
    requests = [
        GenerationRequest(prompt, NEW, seed=place * GROUP + n)
        for place, prompt in enumerate(prompts)
        for n in range(GROUP)
    ]
    results = generate(policy, requests)
    rollouts = [
        Rollout(
            str(place // GROUP), "c",
            (Call("p", request.prompt_ids_T, r.completion_ids_T, r.logprobs_T, r.text,
                  r.finish_reason, 1.0),),
            (), rng.random(), "", None, number,
        )
        for place, (request, r) in enumerate(zip(requests, results, strict=True))
    ]  # fmt: skip
    return [
        Group(str(place), tuple(rollouts[place * GROUP : (place + 1) * GROUP]))
        for place in range(PROBLEMS)
    ]
