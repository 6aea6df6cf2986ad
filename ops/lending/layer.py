"""Module classes whose forward borrows the module's parameters: one mechanism for torch's modules and for other op
classes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._compile import _disable_dynamo

from .bundle import Bundle
from .repeat import register_pure

COMPILED_BY_OTHERS = (
    "another node compiles this model: what lies between its layers is compiled, the layers are not, as their weights "
    "come and go. INT8 Lazy Torch Compile compiles whole blocks of it instead."
)

register_pure(__name__)  # DynamicLayer only borrows: the class that it is mixed into decides

_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


class DynamicLayer:
    """Mixed into a module class by `dynamic_class`. Without a bundle it is the original module."""

    spillway_bundle: Bundle | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bundle = self.spillway_bundle
        if bundle is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return _uncompiled(self, bundle, args, kwargs)
        return bundle.run(self, super().forward, args, kwargs)  # type: ignore[arg-type, misc]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the parameters out of a `to`, for they are lent where they are needed. Buffers and children follow it.

        Some architectures move a module before they call it. That would keep a second copy of its weights.
        """
        if self.spillway_bundle is None:
            return super()._apply(*args, **kwargs)  # type: ignore[misc]
        kept, self._parameters = self._parameters, {}  # type: ignore[has-type]
        try:
            return super()._apply(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._parameters = kept


# torch.compiler.disable would import the compiler, which takes seconds, for everybody.
@_disable_dynamo
def _uncompiled(layer: DynamicLayer, bundle: Bundle, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a layer outside of the graph that another node compiles, which would else own weights that come and go."""
    bundle.lender.ledger.decide_once(COMPILED_BY_OTHERS, level=logging.WARNING)
    return layer.forward(*args, **kwargs)


def dynamic_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return the class of the same name whose forward borrows, or `cls` itself where it already does."""
    if issubclass(cls, DynamicLayer):
        return cls
    dynamic = _classes.get(cls)
    if dynamic is None:
        attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "spillway_original_class": cls}
        dynamic = _classes[cls] = type(cls.__name__, (DynamicLayer, cls), attributes)
    return dynamic


def has_forward(module: torch.nn.Module) -> bool:
    """Say whether a module can be called. Containers of parameters cannot."""
    return type(module).forward is not torch.nn.Module.forward
