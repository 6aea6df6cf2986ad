"""Build any module without touching memory for its parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.RLock()


@contextmanager
def skip_model_initialization(keep_below: int = 0) -> Iterator[None]:
    """Parameters made inside this block live on the meta device: no memory, and their initialisers do nothing.

    keep_below: parameters smaller than this many bytes stay real, with their initial values (a file may lack them).
    Buffers are always real, since their values are often computed when the module is built. Other threads are not
    affected, and `load_state_dict` works inside as outside. A `torch.empty` that is turned into a parameter reserves
    addresses for a moment but touches no page.
    """
    with _lock:
        make: Callable[..., Any] = torch.nn.Parameter.__new__
        load: Callable[..., Any] = torch.nn.Module.load_state_dict
        thread = threading.get_ident()
        loading = 0

        def make_on_meta(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
            plain = type(data) is torch.Tensor and not data.is_meta
            if (
                plain
                and not loading
                and threading.get_ident() == thread
                and data.numel() * data.element_size() >= keep_below
            ):
                data = torch.empty_like(data, device="meta")
            return make(cls, data, requires_grad)

        def load_as_given(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Loading by assignment makes parameters too, of data that is meant to stay.
            nonlocal loading
            loading += threading.get_ident() == thread
            try:
                return load(self, *args, **kwargs)
            finally:
                loading -= threading.get_ident() == thread

        torch.nn.Parameter.__new__ = make_on_meta  # type: ignore[method-assign, assignment]
        torch.nn.Module.load_state_dict = load_as_given  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.nn.Parameter.__new__ = make  # type: ignore[method-assign]
            torch.nn.Module.load_state_dict = load  # type: ignore[method-assign]
