"""Folders that can be trusted no further than their content: written whole, checked before use.

A bundle may come from anybody. Before anything in it is read, its files must be exactly those that
its manifest lists, each an ordinary file with the right SHA-256, under names that this version of
the package writes itself. Code, pickles, links and anything unknown are refused by name alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fst_dspy.errors import StoreError
from fst_dspy.files import flush, left_by_system, sha256, writing_to

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20  # read, it takes up to 25 times as much

_TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
}
_MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
ALLOWED_FILES = frozenset(
    {"program.json", "tools.json", "population.json", "cycles.json", "adapter.safetensors"}
    | {f"tokenizer/{name}" for name in _TOKENIZER_FILES}
    | {f"model/{name}" for name in _MODEL_FILES | _TOKENIZER_FILES}
)
"""Every file that a bundle may hold beside its manifest."""

_PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib")
_CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")
# Settings through which transformers may fetch or run code that does not come with it.
_CODE_SETTING = re.compile(
    r"auto_map|custom_pipelines|custom_generate|quantization_config|trust_remote_code"
    r"|.*implementation.*|.*kernel_config|use_kernels"
)


def list_files(root: Path) -> dict[str, int]:
    """The files under a folder, as ``{posix name: bytes}``.

    Raises:
        StoreError: No folder, or it holds a link, a device, or a file that no bundle holds.
    """
    if not root.is_dir():
        raise StoreError(f"there is no bundle folder {str(root)!r}")
    found = {}
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise StoreError(
                f"{name!r} in the bundle {root} is a symbolic link; a bundle holds ordinary files "
                "only (copy it with its links resolved)"
            )
        if not stat.S_ISREG(mode):
            raise StoreError(f"{name!r} in the bundle {root} is not an ordinary file")
        if name != MANIFEST:
            check_name(name)
        found[name] = path.lstat().st_size
    return found


def check_name(name: str) -> None:
    """Refuse every file name but those that bundles are made of.

    Raises:
        StoreError: The name, with the reason.
    """
    if name in ALLOWED_FILES:
        return
    reason = "is not a file of a bundle"
    if name.startswith(("/", "~")) or "\\" in name or re.match(r"[A-Za-z]:", name):
        reason = "is an absolute path"
    elif ".." in name.split("/"):
        reason = "leads out of the folder"
    elif name.lower().endswith(_PICKLES):
        reason = "may be a pickle, which can run code when read; weights are kept as safetensors"
    elif name.lower().endswith(_CODE):
        reason = "is code; a bundle holds none"
    raise StoreError(f"refused: {name[:200]!r} {reason}")


def file_records(root: Path) -> dict[str, dict[str, Any]]:
    """``{name: {"sha256", "bytes"}}`` of every file but the manifest, in the order of names."""
    return {
        name: {"sha256": sha256(root / name), "bytes": size}
        for name, size in sorted(list_files(root).items())
        if name != MANIFEST
    }


def holds_only(root: Path, is_own: Callable[[str], bool]) -> bool:
    """Whether all files under a folder are of names, as ``list_files`` gives them, that are own."""
    return all(is_own(path.relative_to(root).as_posix()) for path in _walk(root))


def is_name(name: str) -> bool:
    """Whether a bundle may hold a file of that name, its manifest among them."""
    return name == MANIFEST or name in ALLOWED_FILES


def check_files(root: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare a folder with the records of its files: names, then sizes, then content.

    Args:
        root: The folder.
        records: As from ``file_records``, under names that passed ``check_name``.

    Raises:
        StoreError: A file is missing, unknown, cut short or changed.
    """
    found = list_files(root)
    missing = sorted(set(records) - set(found))
    unknown = sorted(set(found) - set(records) - {MANIFEST})
    if missing or unknown:
        told = [f"lacks {missing}"] if missing else []
        told += [f"holds {unknown}, which its manifest does not list"] if unknown else []
        raise StoreError(f"the bundle {root} {' and '.join(told)}")
    for name, record in records.items():
        if found[name] != record["bytes"]:
            raise StoreError(
                f"{name} in the bundle {root} has {found[name]} bytes, not {record['bytes']}; it "
                "was cut short or changed"
            )
        if sha256(root / name) != record["sha256"]:
            raise StoreError(
                f"{name} in the bundle {root} is not the file that was saved (wrong SHA-256); it "
                "is damaged or was changed"
            )


def check_settings(root: Path) -> None:
    """Refuse model and tokenizer settings that would make transformers run other code.

    Raises:
        StoreError: A setting such as ``auto_map``.
    """
    for name in list_files(root):
        if name.startswith(("model/", "tokenizer/")) and name.endswith("config.json"):
            for key in _keys(read_plain_json(root / name)):
                if _CODE_SETTING.fullmatch(key):
                    raise StoreError(
                        f"refused: {name} in the bundle {root} sets {key!r}, which can run code "
                        "that is not part of transformers"
                    )


def read_plain_json(path: Path) -> Any:
    """Read a JSON file of bounded size.

    Raises:
        StoreError: It is missing, too large or not JSON.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise StoreError(f"{path} is too large for a JSON file of a bundle")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot read {path}: {error}") from error


def write_folder(
    target: Path, write: Callable[[Path], None], may_replace: Callable[[Path], bool]
) -> Path:
    """Write a folder whole or not at all: under a hidden name beside it, then renamed.

    Args:
        target: Where it goes. An empty folder there is replaced.
        write: Fills the folder it is given.
        may_replace: Whether a folder with content may give way to the new one, and all in it.

    Raises:
        StoreError: The place is taken, or cannot be written; what was there is intact.
    """
    target = Path(os.path.realpath(Path(target).expanduser()))
    _check_place(target, may_replace)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with writing_to(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            for path in [*_walk(temporary), *_folders(temporary)]:
                flush(path)
            _swap_in(temporary, target)
            flush(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_place(target: Path, may_replace: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StoreError(f"{target} is a file; choose a folder")
    if not all(left_by_system(path.name) for path in target.iterdir()) and not may_replace(target):
        raise StoreError(
            f"{target} holds other files, which are not overwritten; choose a new or empty folder"
        )


def _swap_in(temporary: Path, target: Path) -> None:
    """Rename into place. A folder with content is moved aside first, and back if that fails."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(temporary, target)
        return
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _walk(root: Path) -> Iterator[Path]:
    """Everything under a folder that is not itself a real folder; links are not followed.

    What the operating system leaves in folders is passed over: nothing reads it.
    """
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif not left_by_system(entry.name):
            yield Path(entry.path)


def _folders(root: Path) -> list[Path]:
    return [root, *(path for path in root.rglob("*") if path.is_dir())]


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    children = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list):
        for child in children:
            yield from _keys(child)
