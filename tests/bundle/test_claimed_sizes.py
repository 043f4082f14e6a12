"""Small files that claim to be large are refused quickly, before memory is taken for them."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bundles import adapted, read_manifest, seal
from helpers import Echo
from safetensors.torch import load_file, save_file

import fst_dspy
from fst_dspy import LocalLM
from fst_dspy.errors import FSTError, ModelError, StoreError
from fst_dspy.model.policy import Policy

pytestmark = pytest.mark.slow

MEGABYTES, SECONDS = 300, 10


@contextmanager
def cheaply():
    """What is inside takes little time, and its peak little memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < SECONDS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEGABYTES * 1024


@pytest.fixture
def model(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def full_bundle(tiny_llama, tmp_path):
    lm = LocalLM(str(tiny_llama), max_tokens=8)
    program = Echo()
    program.say.lm = lm
    fst_dspy.save(program, tmp_path / "bundle")
    return tmp_path / "bundle"


CLAIMS = [
    {"num_labels": 100_000_000},
    {"num_labels": 1e8},
    {"nested": {"num_labels": 100_000_000}},
    {"vocab_size": 1_000_000_000},
    {"vocab_size": 10**18},
    {"hidden_size": 2**20},
    {"hidden_size": 10**12},
    {"intermediate_size": 2**32},
    {"head_dim": 2**31},
    {"hidden_size": 0, "head_dim": 2**36},
    {"num_hidden_layers": 100_000_000},
    {"num_hidden_layers": 4_000},
    {"num_hidden_layers": 10**400},
    {"num_hidden_layers": 500, "hidden_size": 4096},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: str(c)[:60])
def test_a_configuration_that_asks_for_too_much(claim, model, full_bundle):
    changed = json.dumps({**json.loads((model / "config.json").read_text()), **claim})
    for folder in (model, full_bundle / "model"):
        (folder / "config.json").write_text(changed)
    seal(full_bundle, read_manifest(full_bundle))
    with cheaply(), pytest.raises(ModelError):
        Policy.load(model)
    with cheaply(), pytest.raises(FSTError):
        fst_dspy.load(full_bundle, Echo())


def test_a_mixture_of_too_many_experts(model):
    config = {
        **json.loads((model / "config.json").read_text()),
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 10**8,
    }
    (model / "config.json").write_text(json.dumps(config))
    with cheaply(), pytest.raises(ModelError, match="num_local_experts"):
        Policy.load(model)


def test_adapters_without_content(tiny_qwen3, tmp_path):
    """A rank of 65,536 over shapes of no elements, in a file of a few kilobytes."""
    fst_dspy.save(adapted(tiny_qwen3), tmp_path / "bundle")
    path = tmp_path / "bundle" / "adapter.safetensors"
    empty = {
        name: torch.zeros((2**16, 0) if "lora_A" in name else (0, 2**16))
        for name in load_file(path)
    }
    save_file(empty, path)
    manifest = read_manifest(tmp_path / "bundle")
    manifest["weights"]["lora"]["rank"] = 2**16
    seal(tmp_path / "bundle", manifest)
    with cheaply(), pytest.raises(StoreError, match="other adapters"):
        fst_dspy.load(tmp_path / "bundle", Echo(), base=tiny_qwen3)


def headers():
    weight = "model.embed_tokens.weight"
    yield struct.pack("<Q", 2**62)
    yield struct.pack("<Q", 2**26) + b"{}"
    for shape, end in [
        ([2**20, 2**20], 2**42),
        ([2**33, 2**33, 0], 0),
        ([2**62, 2**62], 16),
        ([2**40], 4),
    ]:
        header = {weight: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        text = json.dumps(header).encode()
        yield struct.pack("<Q", len(text)) + text + b"\0" * 16


@pytest.mark.parametrize("content", list(headers()), ids=range(6))
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_safetensors_that_claim_more_than_they_hold(
    kind, content, full_bundle, tiny_qwen3, tmp_path
):
    bundle, path = full_bundle, full_bundle / "model" / "model.safetensors"
    if kind == "adapter":
        bundle = tmp_path / "lora"
        fst_dspy.save(adapted(tiny_qwen3), bundle)
        path = bundle / "adapter.safetensors"
    path.write_bytes(content)
    seal(bundle, read_manifest(bundle))
    with cheaply(), pytest.raises(FSTError):
        fst_dspy.load(bundle, Echo(), base=tiny_qwen3 if kind == "adapter" else None)


def test_a_large_configuration_is_not_read(model):
    (model / "config.json").write_text(json.dumps({"x": "y" * 2**25}))
    with cheaply(), pytest.raises(ModelError, match="too large"):
        Policy.load(model)
