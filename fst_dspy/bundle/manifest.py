"""The manifest of a bundle: what the folder holds, and every check of it before anything is loaded.

``manifest.json`` is sealed with the SHA-256 of its own content, so that accidents show in it as
they do in the files it lists. The seal is no signature: whoever makes a bundle can seal it, which
is why each value is checked as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fst_dspy.bundle.files import (
    MANIFEST,
    check_files,
    check_name,
    check_settings,
    read_plain_json,
)
from fst_dspy.config import LoraConfig
from fst_dspy.errors import FSTError, StoreError
from fst_dspy.pretrained.quantized import METHODS

FORMAT = "fst_dspy bundle"
SCHEMA_VERSION = 1
TOOLS = "tools.json"

_VERSION_ID = re.compile(r"[\w.-]+@[0-9a-f]{12}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DOTTED = re.compile(r"[\w.<>]{1,300}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BaseRecord:
    """The model that was trained.

    Attributes:
        source: ``"embedded"``; ``"hub"`` for one that its name finds on any machine, on the hub or
            as SmolLM2 is found; or ``"folder"`` for a local one, whose place is not told.
        id: ``"embedded"``, the hub id or name, or the folder's or GGUF file's name.
        version: Version id of its weights, ``"<name>@<12 hex digits>"``: a content hash.
        quantization: How it was quantized as it was loaded, as transformers'
            ``quantization_config`` says it; ``None`` where it was not.
    """

    source: str
    id: str
    version: str
    quantization: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class WeightsRecord:
    """The weights a bundle stands for.

    Attributes:
        kind: ``"full"``: all of them, in ``model/``. ``"lora"``: adapters, in
            ``adapter.safetensors``, over the base. ``"base"``: the base's own, not in the folder.
        version: Version id of the weights.
        sha256: ``Policy.weights_hash()`` of them; covers the base as well.
        dtype: Name of the torch dtype they were used in.
        base: The model that was trained.
        lora: The adapters' settings; ``None`` but for ``"lora"``.
    """

    kind: str
    version: str
    sha256: str
    dtype: str
    base: BaseRecord
    lora: LoraConfig | None


@dataclass(frozen=True)
class PredictorRecord:
    """One predictor of the program.

    Attributes:
        fields: Names of its signature's fields, in order.
        lm: Settings of the ``LocalLM`` it calls; ``None`` when it calls another model, which a
            bundle does not hold.
    """

    fields: tuple[str, ...]
    lm: Mapping[str, Any] | None


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        program: The program's class, ``"module:QualName"``.
        predictors: By name, in order.
        weights: The weights.
        run: Arm, seed, settings and metrics of the compile; ``None`` when they are not known.
        versions: Versions of the packages it was made with.
        files: SHA-256 and size of every other file.
        adapter: Class and settings of the adapter it was compiled under; bundles of before say
            nothing of it.
    """

    program: str
    predictors: Mapping[str, PredictorRecord]
    weights: WeightsRecord
    run: Mapping[str, Any] | None
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]]
    adapter: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values, sealed."""
        plain = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **asdict(self)}
        if self.weights.base.quantization is None:  # so that versions of before read it as well
            del plain["weights"]["base"]["quantization"]
        return {**plain, "seal": _seal(plain)}


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and verify every file of the folder against it.

    Raises:
        StoreError: The folder is no bundle, is of another schema, damaged, or holds what a bundle
            must not hold.
    """
    if not folder.is_dir():
        raise StoreError(f"there is no bundle folder {str(folder)!r}")
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise StoreError(f"{folder} is not a bundle: it has no {MANIFEST}; fst_dspy.save makes one")
    with damaged(folder):
        plain = read_plain_json(path)
        _require(isinstance(plain, dict) and plain.get("format") == FORMAT, f"not a {FORMAT}")
        schema = plain.get("schema_version")
        _require(
            type(schema) is int and schema == SCHEMA_VERSION,
            f"schema version {schema!r}, where this version of fst_dspy reads {SCHEMA_VERSION}",
        )
        seal = plain.pop("seal", None)
        _require(seal == _seal(plain), "the manifest was changed after it was sealed")
        manifest = _parse(plain)
        check_files(folder, manifest.files)
        check_settings(folder)
        _check_content(manifest)
    return manifest


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Say of whatever goes wrong inside, in a file that may hold anything, that it is damaged."""
    try:
        yield
    except FSTError:
        raise
    except Exception as error:
        raise StoreError(
            f"the bundle {folder} is damaged or was made by hand ({type(error).__name__}: {error})"
        ) from error


def is_bundle(folder: Path) -> bool:
    """Whether a folder's manifest is that of a bundle; nothing else in it is looked at."""
    try:
        return read_plain_json(folder / MANIFEST)["format"] == FORMAT
    except (StoreError, KeyError, TypeError):
        return False


def check_lm_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings of a predictor's LM against what a ``LocalLM`` takes.

    Raises:
        StoreError: An unknown setting or a value out of range.
    """
    for name, value in settings.items():
        _require(name in _LM_SETTINGS, f"unknown LM setting {name!r}")
        _require(_LM_SETTINGS[name](value), f"LM setting {name}={value!r} is out of range")


def _seal(plain: Mapping[str, Any]) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise StoreError(f"cannot use this bundle: {message[:500]}")


def _parse(plain: dict[str, Any]) -> Manifest:
    del plain["format"], plain["schema_version"]
    weights, predictors = plain.pop("weights"), plain.pop("predictors")
    base, lora = weights.pop("base"), weights.pop("lora")
    manifest = Manifest(
        **plain,
        weights=WeightsRecord(
            **weights,
            base=BaseRecord(**base),
            lora=None if lora is None else LoraConfig(**lora),
        ),
        predictors={
            name: PredictorRecord(tuple(row["fields"]), row["lm"])
            for name, row in predictors.items()
        },
    )
    _check_weights(manifest.weights)
    _require(_is_text(manifest.program), "the program's class is not a text")
    _check_adapter(manifest.adapter)
    for predictor in manifest.predictors.values():
        _require(all(map(_is_text, predictor.fields)), "a field name is not a text")
        if predictor.lm is not None:
            _require("cache" in predictor.lm, "the settings of an LM lack cache")
            check_lm_settings(predictor.lm)
    for name, record in manifest.files.items():
        check_name(name)
        _require(set(record) == {"sha256", "bytes"}, f"the record of {name} is another")
    return manifest


def _check_adapter(adapter: Any) -> None:
    if adapter is None:
        return
    _require(set(adapter) == {"class", "settings"}, "the record of its adapter is another")
    settings = adapter["settings"]
    _require(_matches(_DOTTED, adapter["class"]), "its adapter's class is not one")
    _require(
        isinstance(settings, dict)
        and all(_matches(_DOTTED, name) for name in settings)
        and all(v is None or isinstance(v, bool | int | float | str) for v in settings.values()),
        "its adapter's settings are not plain",
    )


def _check_weights(weights: WeightsRecord) -> None:
    base = weights.base
    _require(weights.kind in ("full", "lora", "base"), f"unknown kind of weights {weights.kind!r}")
    _require((weights.kind == "lora") == (weights.lora is not None), "kind and lora disagree")
    _require(weights.dtype in _DTYPES, f"unknown dtype {weights.dtype!r}")
    _require(_matches(_SHA256, weights.sha256), "the weights' SHA-256 is not one")
    for version in (weights.version, base.version):
        _require(_matches(_VERSION_ID, version), f"{version!r} is not a version id")
    _require(base.source in ("embedded", "hub", "folder"), f"unknown base {base.source!r}")
    if base.source == "embedded":
        _require(base.id == "embedded", "the embedded base has another id")
    _require(
        _matches(_HUB_ID, base.id) if base.source == "hub" else _is_text(base.id),
        f"{base.id!r} is not the id of a model",
    )
    if base.quantization is not None:
        _require(
            isinstance(base.quantization, dict)
            and base.quantization.get("quant_method") in METHODS
            and _is_plain(base.quantization),
            "it was quantized in a way that is not known here",
        )
    if weights.lora is not None:
        lora = weights.lora
        _require(_is_int(lora.rank) and lora.rank <= 2**16, f"LoRA rank {lora.rank!r}")
        _require(_is_number(lora.alpha) and _is_number(lora.dropout), "LoRA settings")


def _check_content(manifest: Manifest) -> None:
    """The files must be those of the kind of weights that the manifest tells of."""
    kind, files = manifest.weights.kind, manifest.files
    wanted = {"program.json"}
    wanted |= {"model/config.json", "model/model.safetensors"} if kind == "full" else set()
    wanted |= {"adapter.safetensors"} if kind == "lora" else set()
    wanted |= {"population.json", "cycles.json"} if manifest.run is not None else set()
    known = wanted | {TOOLS} | {name for name in files if name.startswith(_folder_of(kind))}
    _require(wanted <= set(files), f"a bundle of kind {kind!r} needs {sorted(wanted - set(files))}")
    _require(set(files) <= known, f"{sorted(set(files) - known)} do not belong to kind {kind!r}")


def _folder_of(kind: str) -> str:
    return "model/" if kind == "full" else "tokenizer/"


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_text, value)) and all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LM_SETTINGS: dict[str, Callable[[Any], bool]] = {
    "temperature": lambda v: v is None or (_is_number(v) and 0 <= v <= 2),
    "top_p": lambda v: v is None or (_is_number(v) and 0 < v <= 1),
    "max_tokens": lambda v: _is_int(v) and v >= 1,
    "seed": lambda v: v is None or _is_int(v),
    "stop": lambda v: (
        v is None
        or isinstance(v, str)
        or (isinstance(v, list | tuple) and all(isinstance(s, str) for s in v))
    ),
    "n": lambda v: _is_int(v) and 1 <= v <= 1000,
    "top_k": lambda v: v is None or (_is_int(v) and v >= 1),
    "frequency_penalty": lambda v: v is None or (_is_number(v) and -2 <= v <= 2),
    "presence_penalty": lambda v: v is None or (_is_number(v) and -2 <= v <= 2),
    "repetition_penalty": lambda v: v is None or (_is_number(v) and 0 < v <= 100),
    "reasoning_effort": lambda v: v is None or _is_text(v),
    "chat_template_kwargs": lambda v: v is None or (isinstance(v, dict) and all(map(_is_text, v))),
    "rollout_id": _is_int,
    "cache": lambda v: isinstance(v, bool),
    "structured": lambda v: v is None or isinstance(v, bool),
}
