"""Weights in folders: in and out of a bundle, out of a run folder, and as a plain model folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from fst_dspy.bundle.manifest import BaseRecord, Manifest, WeightsRecord, damaged
from fst_dspy.config import LoraConfig
from fst_dspy.errors import ModelError, StoreError
from fst_dspy.files import read_json
from fst_dspy.model.hardware import dtype_named
from fst_dspy.model.policy import Policy
from fst_dspy.pretrained.smollm2 import NAMES

ONE_FILE = "100TB"  # no shards: their index would name files, and one more thing to check


def write_weights(policy: Policy, version: str, folder: Path) -> WeightsRecord:
    """Write a version of a policy's weights, with the tokenizer, into a bundle.

    LoRA writes the adapters alone. The unchanged weights of a model that any machine can get by
    its name (embedded, SmolLM2, or on the hub) are left out, and so are quantized ones, which a
    bundle cannot hold. Everything else is written whole.

    Raises:
        ModelError: The version is not at hand.
    """
    with made_live(policy, version):
        base = base_record(policy)
        kind = "lora" if policy.lora is not None else "full"
        quantized = getattr(policy.model, "is_quantized", False)
        if version == policy.base_version and (base.source != "folder" or quantized):
            kind = "base"
        if kind == "full":
            write_model(policy.model, folder / "model")
        if kind == "lora":
            tensors = {name: t.contiguous() for name, t in policy.trainable_state().items()}
            save_file(tensors, folder / "adapter.safetensors")
        policy.tokenizer.save_pretrained(folder / ("model" if kind == "full" else "tokenizer"))
        return WeightsRecord(
            kind=kind,
            version=version,
            sha256=policy.weights_hash(),
            dtype=policy.source["dtype"],
            base=base,
            lora=policy.lora,
        )


def read_weights(
    folder: Path,
    manifest: Manifest,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
) -> Policy:
    """The policy of a bundle whose files have been verified.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        base: Where the base model is, for a bundle that does not hold it.
        device: Defaults to CUDA where there is one.

    Returns:
        A policy whose live weights have the version id that the manifest names.

    Raises:
        ModelError: The base is missing or another one, or the weights do not fit the model.
        StoreError: The weights are not those that were saved.
    """
    weights = manifest.weights
    with damaged(folder):
        if weights.kind == "full":
            name = _name(weights.version)
            policy = Policy.load(folder / "model", device=device, dtype=weights.dtype, name=name)
        else:
            policy = _load_base(weights.base, weights.dtype, base, device)
            policy.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        if weights.lora is not None:
            _put_adapters(policy, weights.lora, folder / "adapter.safetensors")
        if policy.weights_hash() != weights.sha256 or policy.version() != weights.version:
            raise StoreError(
                f"the weights in {folder} come out as {policy.version()}, not as "
                f"{weights.version}; the bundle is damaged or was made by hand"
            )
    return policy


def read_run(folder: Path, base: str | Path | None = None) -> Policy:
    """The best weights of a run folder, live in a policy.

    Args:
        folder: The ``log_dir`` of a finished compile.
        base: The model it trained; may be left out for the embedded one and SmolLM2.

    Raises:
        StoreError: The folder holds no finished run.
        ModelError: The model is missing or another one.
    """
    result, config = (read_json(folder / name) for name in ("result.json", "config.json"))
    with damaged(folder):
        name, version = _name(result["base_version"]), result["best"]["version"]
        source = "embedded" if name == "embedded" else "hub" if name in NAMES else "folder"
        # Of runs of before it is not known: as this machine would load it.
        loaded = config.get("loaded", {})
        record = BaseRecord(source, name, result["base_version"], loaded.get("quantization_config"))
        policy = _load_base(record, dtype_named(loaded.get("dtype")), base, None)
        if version != policy.version():
            file = folder / "versions" / f"{version.rsplit('@', 1)[-1]}.safetensors"
            lora = result["config"]["slow"]["lora"]
            if lora is not None:
                _put_adapters(policy, LoraConfig(**lora), file)
            else:
                policy.load_trainable_state(load_file(file))
        if policy.version() != version:
            raise StoreError(
                f"the weights in {folder} come out as {policy.version()}, not as {version}"
            )
    return policy


def write_model(model: Any, folder: Path) -> None:
    """Write a model as a plain folder of transformers, adapters merged, in one safetensors file."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    showed_bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=ONE_FILE)
    except NotImplementedError as error:  # some quantized weights can be read and not written
        raise ModelError(
            "transformers cannot write weights that are quantized as these are; where they are "
            "the base's own, its folder has them"
        ) from error
    finally:
        if showed_bars:
            hf_logging.enable_progress_bar()


def base_record(policy: Policy) -> BaseRecord:
    """Which model a policy was loaded from, in words that hold on another machine."""
    name, quantized = policy.source["name_or_path"], policy.source.get("quantization_config")
    if name == "embedded":
        return BaseRecord("embedded", name, policy.base_version, quantized)
    if name in NAMES:
        return BaseRecord("hub", name, policy.base_version, quantized)
    if Path(policy.source["place"]).is_absolute():
        return BaseRecord("folder", policy.name, policy.base_version, quantized)
    return BaseRecord("hub", name, policy.base_version, quantized)


@contextmanager
def made_live(policy: Policy, version: str) -> Iterator[None]:
    """Have a version's weights live inside the block, under the lock; then those from before.

    Unlike ``Policy.at``, which swaps weights in for generating, all of the policy's methods work
    on them.

    Raises:
        ModelError: The version is not at hand.
    """
    with policy.lock:
        before = policy.version()
        if before == version:
            yield
            return
        was_kept = before in policy._kept
        policy.keep()
        policy.restore(version)
        try:
            yield
        finally:
            policy.restore(before)
            if not was_kept:
                policy.forget(before)


def _load_base(
    record: BaseRecord,
    dtype: str | torch.dtype | None,
    base: str | Path | None,
    device: str | torch.device | None,
) -> Policy:
    wanted = f"the base model {record.id!r} with the weights {record.version}"
    if base is None and record.source == "folder":
        raise ModelError(
            f"this needs {wanted}, which was a local folder; pass base=<the folder of that model>"
        )
    try:
        name = _name(record.version)
        policy = Policy.load(
            base or record.id,
            device=device,
            dtype=dtype,
            quantization_config=record.quantization,
            name=name,
        )
    except ModelError as error:
        raise ModelError(
            f"this needs {wanted}: {error}; or pass base=<the folder of that model>"
        ) from error
    if policy.base_version != record.version:
        raise ModelError(
            f"this needs {wanted}, but {str(base or record.id)!r} holds {policy.base_version}; the "
            "hash after the @ must be equal: pass base=<the folder of the model it was trained on>"
        )
    return policy


def _name(version: str) -> str:
    return version.rsplit("@", 1)[0]


def _put_adapters(policy: Policy, lora: LoraConfig, file: Path) -> None:
    """Add adapters and fill them; their shapes are looked at before anything is made that large."""
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
        found = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    expected = policy.adapter_shapes(lora)
    if found != expected:
        wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))[0]
        raise StoreError(
            f"{file.name} holds other adapters than {policy.base_version} has where rank "
            f"{lora.rank} was announced: {wrong} is {found.get(wrong)}, not {expected.get(wrong)}"
        )
    policy.add_lora(lora, seed=0)
    policy.load_trainable_state(load_file(file))


def plain_folder(policy: Policy, version: str) -> Callable[[Path], None]:
    """A writer of a plain model folder: weights merged, with the tokenizer."""

    def write(folder: Path) -> None:
        with made_live(policy, version):
            write_model(policy.model, folder)
            policy.tokenizer.save_pretrained(folder)

    return write
