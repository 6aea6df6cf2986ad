"""Measures the memory that a node's outputs hold, as blocks. A block counts once, however many outputs hold it."""

from __future__ import annotations

import io
import logging
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch

from ..ops.files.disk_map import locate
from ..ops.gather import memory_of
from ..ops.lending.idle_weight import as_stored

log = logging.getLogger("spillway")

# Outputs are trees of a few hundred objects at most. A larger tree than this is measured in part.
MAX_OBJECTS = 50_000
MAX_DEPTH = 12
WEIGHTLESS = (type(None), bool, int, float, complex, str, type, types.ModuleType, types.FunctionType, types.MethodType)


@dataclass(eq=False)
class Block:
    """A storage or a model. ram, vram: bytes when it was last measured. gauge: measures a model anew."""

    key: Hashable
    ram: int = 0
    vram: int = 0
    gauge: Callable[[], tuple[int, int]] | None = None
    name: str = ""

    @property
    def is_model(self) -> bool:
        """A model changes its size while it is held. Evicting one of the outputs that share it frees nothing of it."""
        return self.gauge is not None


class Model(NamedTuple):
    """A getter's answer for an object that stands for a model.

    module: the module that all clones share. gauge: tells its bytes of RAM and of device memory now, and must not keep
    the model alive. also: further objects that this one holds, such as patches and attached models.
    """

    module: object
    gauge: Callable[[], tuple[int, int]]
    also: Iterable[Any] = ()


# Is asked for every object that is no tensor and no container. Answers None for an object that is no model of its kind.
Getter = Callable[[Any], "Model | None"]


class Measurer:
    """Finds the blocks of node outputs. An object that raises counts nothing, and its type is logged once."""

    def __init__(self, getters: Iterable[Getter] = ()) -> None:
        self.getters = list(getters)
        self._failed: set[str] = set()

    def blocks(self, outputs: Any) -> dict[Hashable, Block]:
        """Find tensors in containers, models, arrays, buffers and objects that hold such things."""
        blocks: dict[Hashable, Block] = {}
        seen: set[int] = set()
        pending: list[tuple[Any, int]] = [(outputs, 0)]
        # Keeps every visited object alive. Without it an object made on the way could be freed and its id given to the
        # next object, which would pass for seen and not be counted.
        kept: list[Any] = []
        while pending and len(seen) < MAX_OBJECTS:
            value, depth = pending.pop()
            if isinstance(value, WEIGHTLESS) or id(value) in seen:
                continue
            seen.add(id(value))
            kept.append(value)
            try:
                inner = self._look(value, blocks)
                if depth < MAX_DEPTH:
                    pending.extend((item, depth + 1) for item in inner)
            except Exception as error:
                self._report(value, error)
        return blocks

    def _report(self, value: Any, error: Exception) -> None:
        name = type(value).__qualname__
        if name not in self._failed:
            self._failed.add(name)
            log.warning(
                "[Spillway] an output of type %s cannot be measured (%s: %s): it counts nothing, so the RAM that it "
                "holds is freed later than it could be.",
                name,
                type(error).__name__,
                error,
            )

    def _look(self, value: Any, blocks: dict[Hashable, Block]) -> Iterable[Any]:
        """Add the object's own block and return the objects inside it."""
        if isinstance(value, torch.Tensor):
            return _add_tensor(value, blocks)
        if isinstance(value, bytes | bytearray):
            _add(blocks, ("object", id(value)), len(value))
            return ()
        if isinstance(value, Mapping):
            return list(value.values())
        if isinstance(value, list | tuple | set | frozenset):
            return list(value)
        if isinstance(value, numpy.ndarray):
            base = value if value.base is None or not isinstance(value.base, numpy.ndarray) else value.base
            _add(blocks, ("object", id(base)), base.nbytes)
            return list(value.flat) if value.dtype == object else ()
        if isinstance(value, io.BytesIO):
            _add(blocks, ("object", id(value)), value.getbuffer().nbytes)
            return ()
        for getter in self.getters:
            model = getter(value)
            if model is not None:
                _add_model(blocks, model.module, model.gauge)
                return list(model.also)
        if isinstance(value, torch.nn.Module):
            _add_model(blocks, value, module_gauge(value))
            return ()
        # Wrappers such as videos, guiders and model descriptors hold what they wrap in attributes.
        return list(getattr(value, "__dict__", {}).values())


def _add(blocks: dict[Hashable, Block], key: Hashable, ram: int, vram: int = 0) -> None:
    if key not in blocks:
        blocks[key] = Block(key, ram, vram)


def _add_model(blocks: dict[Hashable, Block], module: object, gauge: Callable[[], tuple[int, int]]) -> None:
    key = ("model", id(module))
    if key not in blocks:
        ram, vram = gauge()
        blocks[key] = Block(key, ram, vram, gauge, type(module).__name__)


def _add_tensor(tensor: torch.Tensor, blocks: dict[Hashable, Block]) -> Iterable[Any]:
    tensor = as_stored(tensor)
    parts = memory_of(tensor)
    if parts[0] is not tensor:
        return parts
    if tensor.layout is not torch.strided:
        _add(blocks, ("object", id(tensor)), tensor.numel() * tensor.element_size())
        return ()
    key, ram, vram = storage(tensor)
    if key is not None:
        _add(blocks, key, ram, vram)
    return ()


def storage(tensor: torch.Tensor) -> tuple[Hashable | None, int, int]:
    """Return (identity, bytes of RAM, bytes of device memory) of a tensor's storage. Its views share all three.

    The identity of a storage without memory is None. A file's page cache counts no RAM, as the system takes it back by
    itself, unless it was written into.
    """
    data = tensor.untyped_storage()
    nbytes = data.nbytes()
    if nbytes == 0 or data.device.type == "meta":
        return None, 0, 0
    if data.device.type != "cpu":
        return ("storage", str(data.device), data.data_ptr()), 0, nbytes
    place = locate(tensor)
    in_file = place is not None and not place[0].written(*place[1:])
    mapped = in_file or getattr(data, "_comfy_tensor_file_slice", None) is not None
    return ("storage", "cpu", data.data_ptr()), 0 if mapped else nbytes, 0


class Sizes(NamedTuple):
    """Bytes in RAM, on devices, and in files that are only mapped."""

    ram: int
    vram: int
    mapped: int


def module_sizes(module: torch.nn.Module) -> Sizes:
    """Say where a module's parameters and buffers lie. Each storage counts once."""
    sizes: dict[Hashable, Sizes] = {}
    for owner in module.modules():
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):
            if tensor is None:
                continue
            for part in memory_of(as_stored(tensor)):
                key, ram, vram = storage(part)
                if key is not None:
                    mapped = 0 if ram or vram else part.numel() * part.element_size()
                    sizes[key] = Sizes(ram, vram, mapped)
    return Sizes(*(sum(column) for column in zip(*sizes.values(), strict=True))) if sizes else Sizes(0, 0, 0)


def module_bytes(module: torch.nn.Module) -> tuple[int, int]:
    """Return the bytes of RAM and of device memory of a module's parameters and buffers."""
    return module_sizes(module)[:2]


def module_gauge(module: torch.nn.Module) -> Callable[[], tuple[int, int]]:
    """Return a gauge that does not keep the module alive."""
    weak = weakref.ref(module)

    def gauge() -> tuple[int, int]:
        alive = weak()
        return (0, 0) if alive is None else module_bytes(alive)

    return gauge
