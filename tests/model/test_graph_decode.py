"""Decoding from a cache of fixed size is that from a growing one, and its step can be replayed."""

from __future__ import annotations

import itertools
import logging
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_rows import assert_alike, prompts_of, sliding

import fst_dspy.model.graph_decode as static
import fst_dspy.model.prefixes as prefixes_module
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.model.generate import GenerationRequest, GenerationResult, _Batch, generate
from fst_dspy.model.graph_step import Step
from fst_dspy.model.policy import Policy
from fst_dspy.slow.trainer import SlowTrainer


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: the operations run again on the very same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Either waits for the GPU, and the second copies from memory that is not pinned.
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)
        assert func not in waits
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            inputs = {_memory(t) for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            outputs = [t for t in tree_leaves(out) if torch.is_tensor(t)]
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not any(_memory(t) in inputs for t in outputs):  # views follow by themselves
                new = [t for t in tree_leaves(func(*args, **kwargs)) if torch.is_tensor(t)]
                for old, fresh in zip(outputs, new, strict=True):
                    old.copy_(fresh)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(step: Step, pool: Any) -> None:
    with Recording() as step._graph:
        step._logits_NV = step._forward()


@pytest.mark.parametrize(("kind", "lora"), [("qwen3", False), ("lfm2", True)])
def test_results_are_those_of_a_growing_cache(
    kind: str, lora: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    policy = Policy.load(request.getfixturevalue(f"tiny_{kind}"))
    if lora:
        policy.add_lora(LoraConfig(rank=2), seed=0)
        policy.load_trainable_state({k: v + 0.02 for k, v in policy.trainable_state().items()})
    # 36 rows of unlike lengths, each prompt asked for thrice; few of them run on to the end.
    requests = [
        GenerationRequest(prompt, 5 + 2 * (number % 6), temperature, seed=number)
        for number, prompt in enumerate(prompts_of(policy)[:6] * 3)
        for temperature in (0.0, 1.0)
    ]
    growing = generate(policy, requests)
    rows: list[int] = []
    monkeypatch.setattr(static, "DEVICES", ("cpu",))
    monkeypatch.setattr(Step, "record", record)
    monkeypatch.setattr(
        Step, "run", lambda step, run=Step.run: (rows.append(step.rows), run(step))[1]
    )
    assert_alike(generate(policy, requests), growing)
    assert [len(list(same)) for _, same in groupby(rows)] == [6, 4, 2, 2]
    steps = static._rooms[policy].steps
    buckets = [(48, 128), (24, 128), (12, 128), (8, 128), (8, 192)]
    assert [key[:2] for key in steps] == buckets

    # From common beginnings, over what an overflow left behind.
    monkeypatch.setattr(prefixes_module, "SAVED_TOKENS", 1)
    for flat in itertools.chain(*filter(None, static._rooms[policy].rooms)):
        flat.fill_(torch.inf)
    assert_alike(generate(policy, requests), growing)
    recorded = len(steps)
    few = requests[-3:]
    assert_alike(generate(policy, few), growing[-3:])
    with policy.at(policy.base_version):  # other adapters need recordings of their own
        base = generate(policy, few)
        monkeypatch.setattr(static, "DEVICES", ())
        assert_alike(base, generate(policy, few))
    assert (len(steps) > recorded) == lora


def test_buckets_are_few_and_waste_a_third_at_most() -> None:
    sizes = {static.bucket(n, 8) for n in range(1, 1025)}
    assert sorted(sizes) == [8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(n <= static.bucket(n, 8) < 1.5 * n for n in range(8, 1025))


def model_with_a_window(folder: Path, window: int) -> Policy:
    tokenizer = make_tokenizer()
    model = sliding(tokenizer)
    model.config.sliding_window = window
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy.load(folder)


def test_other_models_grow_their_caches_and_say_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = model_with_a_window(tmp_path, 8)
    requests = [GenerationRequest(prompts_of(policy)[-1], 4, 0.0)]
    growing = generate(policy, requests)
    monkeypatch.setattr(static, "DEVICES", ("cpu",))
    caplog.set_level(logging.INFO)
    assert generate(policy, requests) == growing == generate(policy, requests)
    told = [record.message for record in caplog.records if "caches grow" in record.message]
    assert len(told) == 1 and "window of 8" in told[0] and policy not in static._rooms


def test_a_window_that_holds_the_batch_is_no_obstacle_and_a_failed_recording_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = model_with_a_window(tmp_path, 128)
    requests = [GenerationRequest(prompt, 6, 0.0) for prompt in prompts_of(policy)]
    growing = generate(policy, requests)
    monkeypatch.setattr(static, "DEVICES", ("cpu",))
    assert_alike(generate(policy, requests), growing)
    assert static._rooms[policy].steps

    def fail(step: Step, pool: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    # Training that runs out of memory takes what decoding has kept before it takes smaller steps.
    trainer = SlowTrainer(policy, SlowConfig(micro_batch_size=4), SamplingConfig(), 10, 0)
    for left in (4, 2):
        trainer._halve_micro_batch(MemoryError())
        assert policy not in static._rooms and trainer.micro_batch_size == left
    monkeypatch.setattr(Step, "record", fail)
    assert generate(policy, requests) == growing == generate(policy, requests)
    assert policy not in static._rooms
    assert len([r for r in caplog.records if "cannot be recorded" in r.message]) == 1


def test_a_row_by_itself_may_have_the_memory_that_was_kept_for_others(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(tiny_qwen3)
    requests = [GenerationRequest(prompt, 6, 0.0) for prompt in prompts_of(policy)]
    monkeypatch.setattr(static, "DEVICES", ("cpu",))
    expected = generate(policy, requests)[-1:]
    run = _Batch.run

    def in_little_memory(batch: _Batch) -> list[GenerationResult]:
        if policy in static._rooms:
            raise RuntimeError("CUDA out of memory")
        return run(batch)

    monkeypatch.setattr(_Batch, "run", in_little_memory)
    assert_alike(generate(policy, requests[-1:]), expected)
    # Nor is there room for a step that is recorded: the cache grows.

    def no_room(rooms: static._Rooms, *args: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(static._Rooms, "reserve", no_room)
    assert_alike(generate(policy, requests[-1:]), expected)
