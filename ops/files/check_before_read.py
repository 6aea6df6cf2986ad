"""Checks mapped files before code of others reads from them, such as ComfyUI's while it builds a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from .disk_map import DiskMap


class CheckBeforeRead(TorchFunctionMode):
    """Inside, each function of torch first checks the files of `maps`, at most once a millisecond.

    It raises FileChanged where one has changed since it was opened. Without it a read beyond a new end would end the
    process. maps: may grow meanwhile.
    """

    def __init__(self, maps: Sequence[DiskMap]) -> None:
        super().__init__()
        self.maps = maps

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for disk_map in self.maps:
            disk_map.check_often()
        return func(*args, **(kwargs or {}))
