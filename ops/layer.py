"""Module classes whose forward borrows the module's parameters: one mechanism for plain modules and for a host's op
classes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo

from .repeat import may_repeat, register_pure

if TYPE_CHECKING:
    from .bundle import Bundle
    from .caster import Caster

COMPILED_BY_OTHERS = (
    "another node compiles this model: what lies between its layers is compiled, the layers are not, as their weights "
    "come and go. INT8 Lazy Torch Compile compiles whole blocks of it instead."
)

register_pure(__name__)  # DynamicLayer only borrows; the class that it is mixed into decides

_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}

# torch 2.5 and later have both names for one class.
OUT_OF_MEMORY = (MemoryError, getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, OUT_OF_MEMORY):
        return True
    return isinstance(error, RuntimeError) and (
        "out of memory" in str(error) or "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


class DynamicLayer:
    """Mixed into a module class by `dynamic_class`. Without a bundle it is the plain module."""

    spillway_bundle: Bundle | None = None
    spillway_caster: Caster | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        bundle = self.spillway_bundle
        if bundle is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return _uncompiled(self, bundle, args, kwargs)
        if bundle.block is not None:
            return bundle.block.forward(self, super().forward, args, kwargs)  # type: ignore[misc]
        if bundle.depth:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        caster = self.spillway_caster
        assert caster is not None
        caster.enter(bundle)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if not is_out_of_memory(error) or not caster.make_room(bundle, error, again=may_repeat(self)):
                raise
        finally:
            caster.exit(bundle)
        # Weights gave way: once more, from the start of this layer.
        caster.enter(bundle)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            caster.exit(bundle)


# torch.compiler.disable would import the compiler, which takes seconds, for everybody.
@_disable_dynamo
def _uncompiled(layer: DynamicLayer, bundle: Bundle, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A layer inside of what somebody else compiles: a graph must not own weights that come and go."""
    caster: Any = bundle.module.spillway_caster
    ledger = getattr(caster, "ledger", None)  # none before the first forward has prepared the model
    if ledger is not None:
        ledger.decide_once(COMPILED_BY_OTHERS, level=logging.WARNING)
    return layer.forward(*args, **kwargs)


def dynamic_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of the same name whose forward borrows; itself for a class that already does."""
    if issubclass(cls, DynamicLayer):
        return cls
    made = _classes.get(cls)
    if made is None:
        attributes = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "spillway_plain_class": cls}
        made = _classes[cls] = type(cls.__name__, (DynamicLayer, cls), attributes)
    return made


def has_forward(module: torch.nn.Module) -> bool:
    """Whether a module can be called; containers of parameters cannot."""
    return type(module).forward is not torch.nn.Module.forward
