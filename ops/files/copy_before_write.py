"""Copies tensors in read-only maps before torch writes into them. Such a write would end the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..gather import memory_of
from .disk_map import SourceError, map_of

OPERATORS = frozenset(
    f"__{name}__"
    for name in [
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "imod",
        "ipow",
        "iand",
        "ior",
        "ixor",
        "ilshift",
        "irshift",
    ]
)
# Functions that end in an underscore too, and leave the elements alone.
NO_WRITE = frozenset(
    [
        "requires_grad_",
        "detach_",
        "rename_",
        "set_",
        "t_",
        "transpose_",
        "swapaxes_",
        "swapdims_",
        "squeeze_",
        "unsqueeze_",
        "as_strided_",
    ]
)


class CopyBeforeWrite(TorchFunctionMode):
    """Inside, a tensor that was given to `watch` gets memory of its own before torch writes into it.

    Only the tensor itself can be given other memory. A write into a view of it raises SourceError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, torch.Tensor] = {}

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Watch tensors as a map lent them."""
        self.watched.update((id(tensor), tensor) for tensor in tensors)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in NO_WRITE):
            self._copy_first(args[:1])
        self._copy_first([kwargs.get("out")])
        return func(*args, **kwargs)

    def _copy_first(self, targets: Iterable[Any]) -> None:
        for target in targets:
            if isinstance(target, (list, tuple)):
                self._copy_first(target)
            elif isinstance(target, torch.Tensor):
                for part in memory_of(target):
                    self._copy(part)

    def _copy(self, target: torch.Tensor) -> None:
        disk_map = map_of(target)
        if disk_map is None or not disk_map.read_only:
            return
        if id(target) not in self.watched:
            raise SourceError(
                f"{disk_map.path}: ComfyUI changes part of a tensor of this file while it loads it. This system has no "
                "room for that: it maps the file for reading only. Load it with ComfyUI's own loader."
            )
        target.data = target.detach().clone()
