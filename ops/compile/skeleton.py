"""A block apart from its tensors: a signature that equal blocks share, and a copy on the meta device.

A compiled function must not own weights, so it is traced over a copy that no model owns, and is given the tensors. Two
blocks may share one such function only if everything that the trace can see in them is equal, so the signature takes
in every attribute of every module, by value where that is possible and by identity where it is not.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Hashable
from typing import Any

import torch

from ..errors import SpillwayError
from ..gather import inner_tensors, is_wrapper

VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# Attributes that torch keeps in a module beside its configuration. `training` is configuration.
INTERNAL = frozenset(torch.nn.Module().__dict__) - {"training"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Untraceable(SpillwayError, TypeError):
    """A block that cannot be compiled with its weights lifted out, and why."""


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Return the class that a module has when nobody lends to it."""
    return getattr(type(module), "spillway_original_class", type(module))


def owned(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return the attributes that are a module's own configuration, neither torch's bookkeeping nor Spillway's."""
    return [(k, v) for k, v in module.__dict__.items() if k not in INTERNAL and not k.startswith("spillway_")]


def _value(value: Any, where: str, depth: int = 0) -> Hashable:
    if isinstance(value, VALUES):
        return type(value), value
    if isinstance(value, torch.Tensor):
        raise Untraceable(f"{where} holds a tensor that is neither a parameter nor a buffer")
    if depth < 8 and isinstance(value, (list, tuple)):
        return type(value), tuple(_value(entry, where, depth + 1) for entry in value)
    if depth < 8 and isinstance(value, dict):
        return dict, tuple((_value(k, where, depth + 1), _value(v, where, depth + 1)) for k, v in value.items())
    return id(value)


def _settings(module: torch.nn.Module, where: str) -> dict[str, Hashable]:
    settings = {}
    for name, value in owned(module):
        if isinstance(value, torch.Tensor):
            continue
        known = _value(value, f"{where}.{name}")
        # An attribute that equals its class's makes no difference.
        default = getattr(plain_class(module), name, INTERNAL)
        if default is INTERNAL or _value(default, f"{where}.{name}") != known:
            settings[name] = known
    return settings


def _tensor(tensor: torch.Tensor | None) -> Hashable:
    if tensor is None:
        return None
    parts = tuple((part.dtype, tuple(part.shape)) for part in inner_tensors(tensor)) if is_wrapper(tensor) else ()
    return type(tensor) if parts else None, tensor.dtype, tuple(tensor.shape), parts


def signature(block: torch.nn.Module) -> Hashable:
    """Return a key, equal for two blocks that a compiled function cannot tell apart. Read while the block is lent.

    Raises Untraceable where a module holds hooks, a forward of its own or hidden tensors, which cannot be lifted out.
    """
    modules: list[Hashable] = []
    for name, module in block.named_modules(remove_duplicate=False):
        where = f"'{name}' ({plain_class(module).__name__})" if name else plain_class(module).__name__
        if "forward" in module.__dict__:
            raise Untraceable(f"the forward of {where} was replaced")
        if module is not block and any(getattr(module, hooks) for hooks in HOOKS):
            raise Untraceable(f"{where} has hooks")
        parameters = tuple((k, _tensor(v)) for k, v in module._parameters.items())
        buffers = tuple((k, _tensor(v)) for k, v in module._buffers.items())
        hidden = tuple((k, _tensor(v)) for k, v in owned(module) if isinstance(v, torch.Tensor))
        settings = tuple(sorted(_settings(module, where).items(), key=lambda entry: entry[0]))
        children = tuple(module._modules)
        modules.append((name, plain_class(module), parameters, buffers, hidden, settings, children))
    return tuple(modules)


def lifted(block: torch.nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Return where a block's parameters, buffers and other tensors stand, as (dictionary, key, qualified name)."""
    places: list[tuple[dict[str, Any], str, str]] = []
    for name, module in block.named_modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for attr, value in store.items():
                if isinstance(value, torch.Tensor):
                    places.append((store, attr, f"{name}.{attr}" if name else attr))
    return places


def skeleton(block: torch.nn.Module) -> torch.nn.Module:
    """Return a copy with its original classes, and every tensor on the meta device as its own parameter or buffer."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        for store in (module._parameters, module._buffers, module.__dict__):
            for value in store.values():
                if isinstance(value, torch.Tensor):
                    memo[id(value)] = _meta(value)
        for _, value in owned(module):
            _share(value, memo)
    copied = copy.deepcopy(block, memo)
    originals = dict(block.named_modules())
    for name, module in copied.named_modules():
        original = originals[name]
        module.__class__ = plain_class(original)
        for key in [key for key in module.__dict__ if key.startswith("spillway_")]:
            del module.__dict__[key]
        if module is copied:
            for hooks in HOOKS:  # hooks run around the call of the block itself, which is not compiled
                getattr(module, hooks).clear()
        # A parameter for each name: tied parameters would be merged.
        for attr, value in original._parameters.items():
            if value is not None:
                module._parameters[attr] = torch.nn.Parameter(_meta(value), requires_grad=False)
        for attr, value in original._buffers.items():
            if value is not None:
                module._buffers[attr] = _meta(value)
        for attr, value in original.__dict__.items():
            if isinstance(value, torch.Tensor):
                del module.__dict__[attr]
                module.register_buffer(attr, _meta(value), persistent=False)
    return copied


def _share(value: Any, memo: dict[int, Any]) -> None:
    """Keep objects of the configuration uncopied and alive, since the signature knows them by identity."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for entry in value:
            _share(entry, memo)
    elif not isinstance(value, (torch.nn.Module, torch.Tensor, types.MethodType, *VALUES)):
        memo[id(value)] = value


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
