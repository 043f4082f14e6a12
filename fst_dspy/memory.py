"""Telling an allocation that failed from other errors, on the CPU and on CUDA."""

from __future__ import annotations

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
