"""Tells the exceptions that say that an allocation failed."""

from __future__ import annotations

import torch

# torch 2.5 and later have both names for one class.
OUT_OF_MEMORY = (MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError))


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an exception says that an allocation failed, on any device."""
    if isinstance(error, OUT_OF_MEMORY):
        return True
    return isinstance(error, RuntimeError) and (
        "out of memory" in str(error) or "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )
