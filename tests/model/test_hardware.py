"""What is done differently on a GPU, as far as a CPU can show it."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import TrainingArguments

from fst_dspy.config import LoraConfig, SamplingConfig, SlowConfig
from fst_dspy.errors import ModelError
from fst_dspy.lm import sft
from fst_dspy.model import hardware
from fst_dspy.model.hardware import default_dtype, fuse_norms
from fst_dspy.model.policy import Policy
from fst_dspy.model.sizes import parameter_count
from fst_dspy.slow import trl_stepper
from fst_dspy.slow.trainer import SlowTrainer


def logits_of(model: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return model.to(dtype)(torch.arange(3, 40)[None]).logits.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_give_what_transformers_gives(tiny_model: Path, dtype: torch.dtype) -> None:
    model = Policy.load(tiny_model, device="cpu", dtype=dtype).model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2.0)
    before = logits_of(model, dtype)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert fuse_norms(model) == len(norms) > 4
    after = logits_of(model, dtype)
    rounding = 1e-4 if dtype == torch.float32 else 0.1
    assert (after - before).norm() < rounding * before.norm()
    assert all("forward" in m.__dict__ for m in norms)
    # Inputs of another type than the weights', as under autocast, go the usual way.
    mixed = torch.ones(2, len(norms[0].weight), dtype=torch.float64)
    assert torch.equal(norms[0](mixed), type(norms[0]).forward(norms[0], mixed))


class OffsetRMSNorm(torch.nn.Module):
    """As Gemma's, which multiplies by one more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden, (8,)) * (1 + self.weight)


def test_norms_of_another_kind_are_left_alone() -> None:
    assert fuse_norms(torch.nn.Sequential(OffsetRMSNorm())) == 0


@pytest.mark.parametrize(
    ("device", "multiplies", "parameters", "dtype"),
    [
        ("cuda", False, 10**6, torch.bfloat16),
        ("cpu", True, 135_000_000, torch.bfloat16),
        ("cpu", True, 10**6, torch.float32),
        ("cpu", False, 135_000_000, torch.float32),
    ],
)
def test_large_models_are_in_bfloat16_where_the_cpu_multiplies_it(
    device: str,
    multiplies: bool,
    parameters: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda: multiplies)
    assert default_dtype(torch.device(device), lambda: parameters) == dtype


def test_the_default_dtype_goes_by_the_size_that_the_configuration_describes(
    tiny_qwen3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda: True)
    small = Policy.load(tiny_qwen3, device="cpu")
    assert small.model.dtype == torch.float32
    monkeypatch.setattr(hardware, "LARGE", parameter_count(small.model) - 1)
    large = Policy.load(tiny_qwen3, device="cpu")
    assert large.model.dtype == torch.bfloat16
    assert large.source["dtype"] == "bfloat16"
    # What was asked for, or saved, stays.
    assert Policy.load(tiny_qwen3, device="cpu", dtype="float32").base_version == small.base_version


def test_memory_is_what_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    machine = hardware.total_memory()  # there is no such folder, as elsewhere than on Linux
    files = {
        "memory.max": "max",
        "memory.current": "3000000",
        "memory.stat": "inactive_file 1000000",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert hardware.total_memory() == machine == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("8000000\n")
    assert (hardware.total_memory(), hardware.free_memory()) == (8_000_000, 6_000_000)


def test_a_trainer_stays_on_the_gpu_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    args, device = TrainingArguments(use_cpu=True, report_to="none"), torch.device("cuda:1")
    assert args.device.type == "cpu"
    args._n_gpu = 2  # as where two can be seen
    with hardware.as_current(torch.device("cpu")):
        assert hardware.on_device(args, device) is args
    assert (args.device, args.n_gpu, made_current) == (device, 1, [device])


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_weights_of_float32_are_trained_in_float32(
    lora: LoraConfig | None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By either trainer, on a GPU, which is not needed to see what transformers is told."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    said: list[bool] = []

    def told(**settings: Any) -> None:
        said.append(settings["bf16"])
        raise InterruptedError

    for module, name in ((trl_stepper, "GRPOConfig"), (sft, "SFTConfig")):
        monkeypatch.setattr(module, name, told)
        monkeypatch.setattr(module, "as_current", lambda device: nullcontext())
        monkeypatch.setattr(module, "global_rng_kept", lambda device: nullcontext())
    dtypes = (torch.float32, torch.bfloat16)
    policies = [Policy.load(tiny_model, device="cpu", dtype=dtype) for dtype in dtypes]
    for policy in policies:
        if lora is not None:
            policy.add_lora(lora, seed=0)
        monkeypatch.setattr(type(policy.model), "device", torch.device("cuda"), raising=False)
        with pytest.raises(InterruptedError):
            SlowTrainer(policy, SlowConfig(lora=lora), SamplingConfig(), 10, 0)
        turn = [{"role": "user", "content": "visa?"}, {"role": "assistant", "content": "silver"}]
        with pytest.raises(InterruptedError):
            sft.fine_tune(policy, [turn], sft.FinetuneConfig(lora=lora), lambda: False)
    assert said == [False, False, True, True]


def test_a_device_without_float64_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ModelError, match=r"float64.*leave device out"):
        hardware.device_named("mps")
    with pytest.raises(ModelError, match=r"give 'cpu', 'cuda' \('gpu'\) or 'cuda:1', or leave"):
        hardware.device_named("tpu9")


@pytest.mark.skipif(hardware._trim is None, reason="the C library gives memory back by itself")
def test_freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    monkeypatch.setattr(hardware, "TRIM_SECONDS", 0.0)
    # Below what is mapped on its own; one block in a hundred stays, so that no end is free.
    blocks = [torch.zeros(2**14) for _ in range(4000)]
    kept = blocks[::100]
    full = resident()
    del blocks
    hardware.give_back_memory()
    assert full - resident() > 100e6 and len(kept) == 40
