"""A model as what its layers weigh and take, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kit.virtual.devices import Machine
from kit.virtual.layers import Block, Model, narrow, seconds_on
from kit.virtual.math import math_seconds
from spillway.patcher.quantised_layers import Int8Layers


@dataclass(eq=False)
class Op:
    """One layer. nbytes: of its weights on the device. source: of the same in the file. seconds: of its forward.

    math: seconds to patch it. making: seconds to make the final form of the source, once. asked: bytes that its forward
    reads, where that is less than all.
    """

    name: str
    nbytes: int
    source: int
    tensors: int
    seconds: float
    math: float
    making: float
    asked: int


@dataclass(eq=False)
class Group:
    """Layers that others bring together. block: whether it is one of the repeated blocks."""

    name: str
    ops: list[Op]
    block: bool

    @property
    def nbytes(self) -> int:
        return sum(op.nbytes for op in self.ops)

    @property
    def source(self) -> int:
        return sum(op.source for op in self.ops)

    @property
    def tensors(self) -> int:
        return sum(op.tensors for op in self.ops)

    @property
    def tower(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(eq=False)
class Work:
    """A whole model on a machine. prefetches_blocks: ComfyUI brings its blocks ahead."""

    groups: list[Group]
    prefetches_blocks: bool = False
    ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ops = [op for group in self.groups for op in group.ops]
        self.nbytes = sum(op.nbytes for op in self.ops)
        self.source = sum(op.source for op in self.ops)
        self.compute = sum(op.seconds for op in self.ops)


def work_of(model: Model, machine: Machine, dtype: str, lora: bool) -> Work:
    """Describe a model. Its weights lie in the file as `model` has them."""
    groups: list[Group] = []
    int8 = Int8Layers(model.kind, "cuda") if dtype == "int8" else None
    for name, part in model.parts:
        block = isinstance(part, Block)
        modules = [(name, part), *part.named_modules(prefix=name)][1:]
        holders = {id(module): label for label, module in modules if module._parameters}
        order = part.order if block else [part]
        own = [part] if block and part._parameters else []
        ops = [_op(module, holders[id(module)], machine, dtype, int8, lora and block) for module in (*own, *order)]
        if block or not groups or groups[-1].block:
            groups.append(Group(name, ops, block))
        else:
            groups[-1].ops += ops
    return Work(groups, prefetches_blocks=model.kind == "LTXAVModel")


def _op(module: torch.nn.Module, name: str, machine: Machine, dtype: str, int8: Int8Layers | None, lora: bool) -> Op:
    parameters = [p for p in module._parameters.values() if p is not None]
    source = sum(p.numel() * p.element_size() for p in parameters)
    nbytes, making = source, 0.0
    weight = parameters[0]
    patched = lora and narrow(module)
    if int8 is not None and int8(module, name, weight):  # the engine leaves sensitive layers as they are
        kept = weight.numel() + 4 * weight.shape[0]
        making = math_seconds(machine, weight.numel(), 2 * weight.numel(), kept, patched)
        nbytes = source - 2 * weight.numel() + kept
    numel, size = weight.numel(), weight.numel() * weight.element_size()
    math = math_seconds(machine, numel, size, size, True) if patched else 0.0
    asked = getattr(module, "asked", None)
    share = nbytes if asked is None else nbytes * asked // module.weight.shape[0]
    seconds = seconds_on(module, machine, dtype)
    return Op(name, nbytes, source, len(parameters), seconds, math, making or math, share)
