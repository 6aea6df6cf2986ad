"""Checks mapped files before code of others reads from them, such as ComfyUI's while it builds a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..gather import memory_of
from .coming_file import is_any_coming
from .disk_map import DiskMap, check_files

# Functions that read the memory of a tensor without an operation of torch.
DIRECT = frozenset(("numpy", "tolist", "__array__"))
# Operations that take a tensor for its shape and dtype.

SHAPES = "new_", "empty", "is_", "sym_"
_PLAIN = torch.Tensor.__torch_dispatch__  # of tensors that leave operations to torch


class CheckBeforeRead(TorchFunctionMode):
    """Inside, each function of torch first checks the files of `maps`, at most once a millisecond.

    It raises FileChanged where one has changed since it was opened. Without it a read beyond a new end would end the
    process. Where a file is still coming, what reads a tensor of it waits for that. maps: may grow meanwhile.
    """

    def __init__(self, maps: Sequence[DiskMap]) -> None:
        super().__init__()
        self.maps = maps
        self._waiting = ExitStack()

    def __enter__(self) -> Any:
        self._waiting.enter_context(waiting_for_reads())
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        try:
            return super().__exit__(*error)
        finally:
            self._waiting.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for disk_map in self.maps:
            disk_map.check_often()
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting_for_reads() -> Iterator[None]:
    """Inside, whatever reads a tensor in a file that is coming waits for it. Nothing is done where none is."""
    if is_any_coming():
        with _WaitForDirect(), _WaitForOperations():
            yield
    else:
        yield


class _WaitForDirect(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in DIRECT:
            _wait(args)
        return func(*args, **(kwargs or {}))


class _WaitForOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and type(value).__torch_dispatch__ is not _PLAIN:
                with self:  # what it does with its parts is seen too: a view of a quantised weight may copy scales
                    return type(value).__torch_dispatch__(func, types, args, kwargs)
        if _reads(func):
            _wait((args, kwargs))
            return func(*args, **kwargs)
        # In inference mode, `to` and `reshape` come as they are. Whether they copy shows in what they are made of.
        with self:
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


@cache
def _reads(func: Any) -> bool:
    """Say whether an operation reads or writes elements. One that returns a view does not."""
    name = func.overloadpacket.__name__
    if name.startswith(SHAPES) or name.endswith("_like"):
        return False
    aliases = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
    return all(alias.is_write for alias in aliases)


def _wait(values: Any) -> None:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            check_files(part for part in memory_of(value) if type(part) in (torch.Tensor, torch.nn.Parameter))
