"""What only a GPU can show: recorded steps, memory that runs out, training as the stock trainer's.

The other tests leave a GPU alone, for they compare to rounding; these run by ``make test-gpu``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
import vllm_calls
from held_answers import DESKS, SMALL
from helpers import Echo, RawAdapter, questions, sampled_logprobs, vowels
from stock_trainer import STEPS, rows_of, run_stock, trainer_for
from tiny_compile import SETTINGS, compile_tiny
from tiny_models import make_tokenizer
from training_rows import assert_alike as assert_alike_within
from training_rows import prompts_of, rows_for
from transformers import Qwen3Config, Qwen3ForCausalLM

import fst_dspy.model.graph_decode as static
from fst_dspy import FST, LocalLM
from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import ConfigError
from fst_dspy.loop import folder as run_state
from fst_dspy.model.generate import GenerationRequest, GenerationResult, generate
from fst_dspy.model.policy import Policy
from fst_dspy.model.vllm_engine import use_vllm
from fst_dspy.slow.trainer import SlowTrainer
from fst_dspy.types import TrainingRow

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu"),
]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 as it is; cuDNN would round the convolutions' inputs to 10 bits."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def mixed_requests(policy: Policy) -> list[GenerationRequest]:
    """36 rows of unlike lengths, each prompt asked for thrice, greedy and sampled."""
    return [
        GenerationRequest(prompt, 5 + 7 * (number % 6), temperature, seed=number)
        for number, prompt in enumerate(prompts_of(policy)[:6] * 3)
        for temperature in (0.0, 1.0)
    ]


def growing(policy: Policy, requests: list[GenerationRequest]) -> list[GenerationResult]:
    """Without recordings."""
    devices, static.DEVICES = static.DEVICES, ()
    try:
        return generate(policy, requests)
    finally:
        static.DEVICES = devices


assert_alike = partial(assert_alike_within, nats=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_a_recorded_step_gives_what_a_growing_cache_gives(tiny_model: Path, lora: bool) -> None:
    policy = Policy.load(tiny_model, device=GPU, dtype="float32")
    if lora:
        policy.add_lora(LoraConfig(rank=4), seed=0)
    requests = mixed_requests(policy)
    results = generate(policy, requests)
    steps = static._rooms[policy].steps
    assert steps and all(step._graph is not None for step in steps.values())
    assert_alike(results, growing(policy, requests))
    assert_alike(results, generate(Policy.load(tiny_model, device="cpu"), requests))

    # The weights move in place: the recordings follow them, and none is made anew.
    places = {key[2:] for key in steps}
    trainer = SlowTrainer(policy, SlowConfig(learning_rate=1e-2), SamplingConfig(), 10, 0)
    for step in range(2):
        trainer.advance(rows_for(step))
    moved = generate(policy, requests)
    assert_alike(moved, growing(policy, requests))
    assert [r.logprobs_T for r in moved] != [r.logprobs_T for r in results]
    assert {key[2:] for key in steps} == places and len(places) == 1
    with policy.at(policy.base_version):
        assert_alike(generate(policy, requests), results)


def test_logprobs_are_those_of_a_full_forward_pass(tiny_model: Path) -> None:
    policy = Policy.load(tiny_model, device=GPU, dtype="float32")
    for request in mixed_requests(policy)[1::2]:
        (result,) = generate(policy, [request])
        expected = sampled_logprobs(policy, request, result).tolist()
        assert result.logprobs_T == pytest.approx(expected, abs=1e-4)


def test_threads_share_recordings_while_others_use_the_gpu(tiny_lfm2: Path) -> None:
    policy = Policy.load(tiny_lfm2, device=GPU, dtype="float32")
    requests, over = mixed_requests(policy), threading.Event()
    expected = growing(policy, requests)
    results: list[list[GenerationResult]] = []

    def disturb() -> None:
        while not over.is_set():
            torch.ones(64, 64, device=GPU).matmul(torch.ones(64, 64, device=GPU)).sum().item()

    other = threading.Thread(target=disturb)
    other.start()
    try:
        workers = [
            threading.Thread(target=lambda: results.append(generate(policy, requests)))
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        over.set()
        other.join()
    assert len(results) == 4
    for result in results:
        assert_alike(result, expected)


@pytest.mark.parametrize("kind", ["qwen3", "lfm2"])
def test_steps_equal_the_stock_trainer(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(f"tiny_{kind}")
    stock, ours = (Policy.load(folder, device=GPU, dtype="float32") for _ in range(2))
    slow = SlowConfig(learning_rate=1e-2, lr_scheduler_type="linear", weight_decay=0.1)
    before, spy = ours.trainable_state(), run_stock(stock, slow, cuda=True)
    trainer = trainer_for(ours, slow)
    norms = [log["grad_norm"] for log in spy.state.log_history if "grad_norm" in log]
    assert len(norms) == STEPS
    for batch, norm in zip(spy.trained, norms, strict=True):
        assert trainer.advance(rows_of(batch)).grad_norm == pytest.approx(norm, rel=1e-3)
    after = stock.trainable_state()
    for name, weight in ours.trainable_state().items():
        torch.testing.assert_close(weight, after[name], rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())


def test_training_as_it_is_by_default_goes_on_after_an_interruption(
    tiny_lfm2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = SlowConfig(learning_rate=1e-3, lora=LoraConfig(rank=4, dropout=0.3))

    def make() -> tuple[Policy, SlowTrainer]:
        policy = Policy.load(tiny_lfm2)
        assert policy.device.type == GPU and policy.model.dtype == torch.bfloat16
        policy.add_lora(slow.lora, seed=1)
        return policy, SlowTrainer(policy, slow, SamplingConfig(), 20, 0)

    whole, trainer = make()
    for step in range(4):
        if step == 2:
            trainer.state().write(tmp_path)
        trainer.advance(rows_for(step))
    resumed, other = make()
    other.load(tmp_path)
    for step in range(2, 4):
        other.advance(rows_for(step))
    state = resumed.trainable_state()
    for name, weight in whole.trainable_state().items():
        torch.testing.assert_close(weight, state[name], rtol=1e-2, atol=1e-4)
    # What was sampled on this device is what training finds, to bfloat16.
    requests = mixed_requests(whole)[1::2]
    results = generate(whole, requests)
    caplog.clear()
    trainer.advance(
        [
            TrainingRow(r.prompt_ids_T, one.completion_ids_T, one.logprobs_T, (-1.0) ** n)
            for n, (r, one) in enumerate(zip(requests, results, strict=True))
        ]
    )
    assert "disagree" not in caplog.text


@pytest.fixture
def little_memory() -> Iterator[int]:
    """400 MiB of the GPU, for this process."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    left = 400 * 2**20
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + left) / total)
    yield left
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_memory_that_runs_out_halves_the_work(
    tiny_qwen3: Path, little_memory: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    policy = Policy.load(tiny_qwen3, device=GPU, dtype="float32")
    few = [GenerationRequest((5 + n % 200,) * 480, 3, seed=n) for n in range(4)]
    expected = generate(policy, few)
    many = [GenerationRequest((5 + n % 200,) * 480, 3, seed=n) for n in range(136)]
    # 60 MiB hold the prompts of few rows, not of all at once.
    held = torch.empty(little_memory - 60 * 2**20, dtype=torch.uint8, device=GPU)
    results = generate(policy, many)
    assert len(results) == 136
    assert [r.completion_ids_T for r in results[:4]] == [r.completion_ids_T for r in expected]
    assert "memory ran out" in caplog.text
    caplog.clear()
    trainer = SlowTrainer(policy, SlowConfig(micro_batch_size=64), SamplingConfig(), 10, 0)
    rows = [TrainingRow((5 + n,) * 200, (7,) * 200, (-1.0,) * 200, (-1.0) ** n) for n in range(64)]
    before = policy.version()
    assert trainer.advance(rows).skipped is None
    assert policy.version() != before and trainer.micro_batch_size < 64
    assert "memory ran out" in caplog.text
    del held


@pytest.mark.parametrize("lora", [False, {"rank": 4}], ids=["full", "lora"])
def test_a_killed_compile_goes_on(
    lora: Any, tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state.RunFolder, "is_due", lambda self, closes: True)
    real, steps = SlowTrainer.advance, []

    def advance(self: SlowTrainer, *args: Any, **kwargs: Any) -> Any:
        assert self.policy.device.type == GPU
        steps.append(self.policy.step)
        if len(steps) == 3:
            raise RuntimeError("killed")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SlowTrainer, "advance", advance)
    with dspy.context(adapter=RawAdapter()):
        with pytest.raises(RuntimeError, match="killed"):
            compile_tiny(tiny_qwen3, log_dir=tmp_path / "run", lora=lora)
        _, lm, result = compile_tiny(tiny_qwen3, log_dir=tmp_path / "run", lora=lora)
    assert steps == [0, 1, 2, 2, 3]
    assert result.records[-1].step == 4 and result.records[-1].kl_to_base > 0
    assert result.best.version and lm.policy.model.dtype == torch.bfloat16


def save_for_vllm(folder: Path) -> Path:
    """A random Qwen3 with heads of a size that vLLM has attention for."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logprobs_apart(
    policy: Policy, requests: list[GenerationRequest], results: list[GenerationResult]
) -> float:
    """Mean absolute difference from a full forward pass, nats a token."""
    apart = []
    for request, result in zip(requests, results, strict=True):
        expected_T = sampled_logprobs(policy, request, result)
        apart += (expected_T - torch.tensor(result.logprobs_T)).abs().tolist()
    return sum(apart) / len(apart)


def compile_with(policy: Policy, **settings: Any) -> None:
    fst = FST(vowels, seed=0, track_stats=True, **(SETTINGS | settings))
    with dspy.context(lm=LocalLM(policy), adapter=RawAdapter()):
        result = fst.compile(Echo(), trainset=questions(6), valset=questions(4, 6))
    assert result.detailed_results.records[-1].step == 4


def test_vllm_serves_adapters_as_they_are_trained(tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm", reason="needs fst-dspy[vllm]")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest

    # What the stand-in of the other tests takes is what there is.
    assert set(vllm_calls.LLM_ARGUMENTS) <= {each.name for each in fields(EngineArgs)}
    own = {each.name for each in fields(vllm_calls.SamplingParams)}
    assert own <= set(vllm.SamplingParams.__struct_fields__)
    assert {"lora_name", "lora_int_id", "lora_path"} <= set(LoRARequest.__struct_fields__)

    policy = Policy.load(save_for_vllm(tmp_path / "model"))
    use_vllm(policy, lora=LoraConfig(rank=4), gpu_memory_utilization=0.1)
    requests = mixed_requests(policy)
    assert logprobs_apart(policy, requests, policy.generator(policy, requests)) < 0.05
    policy.add_lora(LoraConfig(rank=4), seed=0)
    for factor in (0.02, 0.05):
        state = policy.trainable_state()
        moved = {name: weight + factor * torch.randn_like(weight) for name, weight in state.items()}
        policy.load_trainable_state(moved)
        results = policy.generator(policy, requests)
        assert logprobs_apart(policy, requests, results) < 0.05
    with policy.at(policy.base_version):
        assert logprobs_apart(policy, requests, policy.generator(policy, requests)) < 0.05
        assert logprobs_apart(policy, requests, results) > 0.1
    compile_with(policy, lora=LoraConfig(rank=4))


def test_vllm_samples_from_the_weights_as_they_are_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="needs fst-dspy[vllm]")
    from trl.generation import vllm_generation

    # Compiling takes a minute, and is vLLM's affair.
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, enforce_eager=True))
    policy = Policy.load(save_for_vllm(tmp_path / "model"))
    before = torch.get_rng_state()
    use_vllm(policy, gpu_memory_utilization=0.1)
    assert torch.equal(torch.get_rng_state(), before)
    requests = mixed_requests(policy)
    results = policy.generator(policy, requests)
    assert logprobs_apart(policy, requests, results) < 0.05
    assert all(r.text == policy.tokenizer.decode(r.completion_ids_T, skip_special_tokens=True)
               for r in results)  # fmt: skip
    longest = max(range(len(results)), key=lambda n: len(results[n].text))
    stop = results[longest].text[1:3]
    (cut,) = policy.generator(policy, [replace(requests[longest], stop=(stop,))])
    assert stop and stop not in cut.text and len(cut.text) < len(results[longest].text)
    version = policy.version()
    policy.load_trainable_state({k: v * 1.5 for k, v in policy.trainable_state().items()})
    assert policy.version() != version
    assert logprobs_apart(policy, requests, results) > 0.2
    assert logprobs_apart(policy, requests, policy.generator(policy, requests)) < 0.05

    narrow = [replace(request, top_p=0.5, top_k=20) for request in requests]
    assert logprobs_apart(policy, narrow, policy.generator(policy, narrow)) < 0.05
    held = [replace(request, grammar=SMALL) for request in requests]
    answers = {result.text for result in policy.generator(policy, held)}
    assert answers <= {f"to: {desk}.\n\nend" for desk in DESKS}

    compile_with(policy)
    with pytest.raises(ConfigError, match="float32"):
        use_vllm(Policy.load(tmp_path / "model", dtype="float32"))
    with pytest.raises(ConfigError, match="convolutions"):
        use_vllm(Policy.load("embedded"))
