"""Build any module without touching memory for its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .overrides import overridden


@contextmanager
def skip_model_initialization(keep_below: int = 0) -> Iterator[None]:
    """Let parameters created inside this block live on the meta device: no memory, and no work for initialisers.

    keep_below: parameters smaller than this many bytes stay real, with their initial values (a file may lack them).
    Buffers are always real, since their values are often computed when the module is built. Other threads are not
    affected, and `load_state_dict` works inside as outside. A `torch.empty` that is turned into a parameter reserves
    addresses for a moment but touches no page.
    """
    loading = 0

    def make_on_meta(make: Callable[..., Any], cls: type, data: Any = None, requires_grad: bool = True) -> Any:
        real = type(data) is torch.Tensor and not data.is_meta
        if real and not loading and data.numel() * data.element_size() >= keep_below:
            data = torch.empty_like(data, device="meta")
        return make(cls, data, requires_grad)

    def load_as_given(load: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Loading by assignment creates parameters too. Their data would be lost on the meta device.
        nonlocal loading
        loading += 1
        try:
            return load(module, *args, **kwargs)
        finally:
            loading -= 1

    with (
        overridden(torch.nn.Parameter, "__new__", by=make_on_meta),
        overridden(torch.nn.Module, "load_state_dict", by=load_as_given),
    ):
        yield
