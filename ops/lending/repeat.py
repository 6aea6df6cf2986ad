"""Decides which forwards may run again after an out-of-memory error.

A forward that has begun may have taken an entry out of a cache, or written into its input. Run again, that forward
would go on from there and give another result without a word. So only ops that are known to change nothing but their
result are repeated.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Torch's layers whose forward only reads. Layers that are not here draw random numbers or were never looked at.
_PURE: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.PReLU),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
_TORCH = frozenset(base for cls in _PURE for base in cls.__mro__)

# Modules whose classes are such layers too.
_pure_modules: set[str] = set()


def register_pure(name: str) -> None:
    """Say of the Python module `name` that the forward of every layer class in it changes nothing but its result."""
    _pure_modules.add(name)


def may_repeat(module: Any) -> bool:
    """Say whether the forward of the module's class, once begun, may be run again from its start.

    A subclass is refused whatever it overrides, since nothing tells which of its methods the forward calls.
    """
    cls = type(module)
    # A class of `dynamic_class` stands in the module of its original class, and adds nothing to it.
    written = [base for base in cls.__mro__ if "spillway_original_class" not in vars(base)]
    if not all(base in _TORCH or base.__module__ in _pure_modules for base in written):
        return False
    if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
        return False  # it counts its calls
    # Methods that others have replaced on the module are not known either, except `forward`: `run` repeats the class's.
    return not any(name != "forward" and callable(getattr(cls, name, None)) for name in vars(module))
