"""What a machine can do: its number formats and memory, and how models gain from its kernels."""

from __future__ import annotations

import ctypes
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from fst_dspy.distributed import processes
from fst_dspy.errors import ModelError

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container what it may have."""
LARGE = 30_000_000
"""Parameters above which a model is in bfloat16 on a CPU that multiplies such."""


def default_dtype(device: torch.device, parameters: Callable[[], int]) -> torch.dtype:
    """The dtype of a model's weights where none is asked for.

    bfloat16 on CUDA, and for models of over ``LARGE`` parameters on CPUs with instructions for it,
    AMX or AVX512-BF16, through which oneDNN multiplies matrices: twice to three times as fast as in
    float32, in half of the memory (``docs/sizes.md`` has what was measured). Else float32. It is a
    matter of the machine's kind and not of a trial run, which would come out in another way on
    another day, and with it the weights' version.

    Args:
        device: Where the model is to be.
        parameters: Counts the model's parameters; called where that decides.
    """
    if device.type == "cuda":
        return torch.bfloat16
    large = device.type == "cpu" and multiplies_bfloat16() and parameters() > LARGE
    return torch.bfloat16 if large else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16 matrices."""
    # torch.cpu.get_capabilities says so too, but not in all versions that are allowed.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fuse_norms(model: Any) -> int:
    """Let a model's RMS norms run as one kernel each, where transformers launches eight.

    A small model's step is made of launches, and a third of these are norms. A norm that does not
    give what torch's gives is left as it is.

    Returns:
        How many norms were changed.
    """
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and _is_torchs(m)]
    for norm in norms:
        norm.forward = MethodType(_forward, norm)
    return len(norms)


def _forward(norm: Any, hidden_states: Tensor) -> Tensor:
    if hidden_states.dtype != norm.weight.dtype:  # for which there is no such kernel
        return type(norm).forward(norm, hidden_states)
    return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _is_torchs(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    if weight is None or weight.ndim != 1 or not hasattr(norm, "variance_epsilon"):
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    sample = torch.randn(8, len(weight), device=weight.device, generator=generator)
    sample = sample.to(weight.dtype)
    rounding = 4 * torch.finfo(weight.dtype).eps
    own, fused = norm(sample), _forward(norm, sample)
    return own.dtype == fused.dtype and torch.allclose(own, fused, rtol=rounding, atol=rounding)


@contextmanager
def cudnn_attention(device: torch.device, use: bool) -> Iterator[None]:
    """Whether attention on a GPU may be cuDNN's inside the block.

    It is fast, but makes a plan for every new shape first: good for a step that is recorded, and
    bad for prompts, whose shape is another one in every batch.
    """
    if device.type != "cuda":
        yield
        return
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(use)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def as_current(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block a GPU is the one that is meant where none is named.

    That is so for events, for Triton's kernels and for transformers' trainers, none of which look
    where the model is.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_device(args: Any, device: torch.device) -> Any:
    """The arguments of a transformers trainer, for the device that the model is on.

    Without ``torchrun`` it would move the model to the first GPU and, where there are several, want
    them all, which TRL refuses. Leans on ``TrainingArguments._n_gpu`` and ``_setup_devices``.

    Args:
        args: They are changed; made inside ``as_current``.
    """
    if device.type == "cuda" and processes() == 1:
        args._n_gpu = 1
        args.__dict__["_setup_devices"] = device
        torch.cuda.set_device(device)  # they have made the first the current one
    return args


def computes_in_bfloat16(model: Any) -> bool:
    """Whether a transformers trainer is to compute in bfloat16 whatever it holds (``bf16=``).

    Not where weights are float32, for then that is what answers were sampled in.
    """
    cuda = model.device.type == "cuda" and torch.cuda.is_bf16_supported()
    return cuda and model.dtype != torch.float32


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that are free on a device; on a GPU, what torch holds and does not use counted in."""
    device = torch.device(device)
    if device.type != "cuda":
        free = psutil.virtual_memory().available
        return min([free, *(most - used for most, used in _of_container())])
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def total_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of memory that a device has."""
    device = torch.device(device)
    if device.type != "cuda":
        return min([psutil.virtual_memory().total, *(most for most, _ in _of_container())])
    return torch.cuda.mem_get_info(device)[1]


def _of_container() -> Iterator[tuple[int, int]]:
    """Bytes that a container may use at most, and those that it does; none where it may use all.

    psutil tells the machine's. Files that are cached are given up when memory is wanted.
    """
    try:
        most = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if most != "max":
            yield int(most), max(0, used - int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # another system, or the first version of control groups
        return


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that were in use at most since the process began: torch's on a GPU, else all of them.

    0 where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


TRIM_SECONDS = 1.0
"""How often freed memory is given back at most; it takes some milliseconds."""
_trimmed_at = 0.0
_trim: Callable[[int], int] | None = None
if sys.platform == "linux":  # glibc has it; other C libraries give back by themselves
    _trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_memory() -> None:
    """Give memory that has been freed back to the system, if that was not done just now.

    glibc keeps what several threads have freed in pieces: a process that decodes and trains on a
    CPU holds three times of what it uses after some hundred batches of changing shapes.
    """
    global _trimmed_at
    if _trim is not None and time.monotonic() - _trimmed_at >= TRIM_SECONDS:
        _trim(0)
        _trimmed_at = time.monotonic()


_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",  # a full GPU at its first matrix product
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, torch's on the CPU, or CUDA's."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def global_rng_kept(device: torch.device) -> Iterator[None]:
    """TRL and vLLM seed every global generator when they are made; others' randomness is kept."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


DTYPES = {
    "float32": torch.float32,
    **dict.fromkeys(("fp32", "f32", "float", "full"), torch.float32),
    "bfloat16": torch.bfloat16,
    **dict.fromkeys(("bf16", "bfloat"), torch.bfloat16),
    "float16": torch.float16,
    **dict.fromkeys(("fp16", "f16", "half"), torch.float16),
    **dict.fromkeys(("float64", "fp64", "double"), torch.float64),
}
"""Names that people give to torch's dtypes."""


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by one of its names; ``None`` and ``"auto"`` are ``None``.

    Raises:
        ModelError: It is no dtype that weights can be trained in.
    """
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype.removeprefix("torch.").lower()) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES.values():
        raise ModelError(
            f"dtype={dtype!r} is none of bfloat16, float16 and float32, in which weights are "
            "trained; a model that was saved in fewer bits is loaded as it is, without a dtype"
        )
    return found


def device_named(device: str | torch.device | None) -> torch.device:
    """A device by its name, ``"gpu"`` among them; of ``None`` CUDA where there is one.

    Raises:
        ModelError: torch knows no such device, this machine does not have it, or models cannot run
            on it.
    """
    name = str(device or ("cuda" if torch.cuda.is_available() else "cpu")).lower()
    name = "cuda" + name.removeprefix("gpu") if name.startswith("gpu") else name
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ModelError(
            f"there is no device {str(device)!r}: give 'cpu', 'cuda' ('gpu') or 'cuda:1', or leave "
            "it out"
        ) from error
    if found.type == "mps":
        raise ModelError(
            "models do not run on 'mps', which has no float64, in which tokens are drawn, and on "
            "which nothing is trained here; leave device out, for the CPU"
        )
    if not _computes(found):
        raise ModelError(
            f"there is no device {str(device)!r} on this machine: torch sees "
            f"{torch.cuda.device_count()} GPUs; leave device out for what there is"
        )
    return found


def _computes(device: torch.device) -> bool:
    if device.type == "cuda":  # not tried: a process would take memory of a GPU that is another's
        return (device.index or 0) < torch.cuda.device_count()
    try:
        return bool(torch.ones(1, device=device).item())
    except Exception:  # as many kinds as there are devices
        return False
