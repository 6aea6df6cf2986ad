"""Gives memory back without holding up the other threads of Python."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import torch

# Giving back less takes a millisecond or so.
LARGE = 16 << 20
MAX_DEPTH = 12


class Grip:
    """Holds the large tensors of an output on the CPU, and gives their memory back when it is told to.

    Whoever drops the last reference to a tensor whose storage was ever looked at holds Python's lock until the system
    has taken the memory back, a third of a second for 3 GB. No other thread runs meanwhile, the server's event loop
    included. An operation of torch's does not hold it. So whoever drops an output first gets a grip on it.
    """

    def __init__(self, outputs: Any) -> None:
        self._held: dict[int, torch.Tensor] = {}
        self._look(outputs, 0)

    def _look(self, value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided:
                storage = value.untyped_storage()
                if storage.nbytes() >= LARGE:
                    self._held.setdefault(storage.data_ptr(), value.detach())
        elif depth < MAX_DEPTH and isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                self._look(item, depth + 1)

    def let_go(self) -> None:
        """Give the memory back, as far as nobody else holds it. The output itself must have been dropped."""
        while self._held:
            _, tensor = self._held.popitem()
            if _is_ours_alone(tensor):
                # Some storages cannot be emptied, such as numpy's. They go when `tensor` does.
                with contextlib.suppress(RuntimeError), torch.inference_mode():
                    torch.ops.inductor.resize_storage_bytes_(tensor, 0)


def _is_ours_alone(tensor: torch.Tensor) -> bool:
    """Say whether no other tensor, and nobody in Python, holds the tensor's storage. False where torch cannot tell."""
    return hasattr(torch.ops.inductor, "resize_storage_bytes_") and _holders(tensor) == _of_nobody_else()


def _holders(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Count who holds a storage: within torch, and in Python."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = tensor.untyped_storage()
    return (count(storage._cdata), sys.getrefcount(storage)) if count is not None else None


@functools.cache
def _of_nobody_else() -> tuple[int, int]:
    """Count the holders of a storage that one tensor has to itself, which differ between versions of torch."""
    whole = torch.empty(1)
    whole.untyped_storage()
    tensor = whole.detach()
    del whole
    return _holders(tensor) or (0, 0)
