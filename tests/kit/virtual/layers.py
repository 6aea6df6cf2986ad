"""Layers that hold weights of real shapes and compute nothing: their forward takes the time that it would take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .clock import Clock
from .devices import Machine

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
NARROWEST = 64  # a weight that is narrower keeps 16 bits


class Layer(torch.nn.Module):
    """One layer. flops: of a forward. activations: bytes of VRAM that it reads and writes beside its weights.

    asked: rows of a table that a forward uses; None where it uses all.
    """

    asked: int | None = None

    def __init__(self, shape: Sequence[int], flops: float, activations: float, bias: bool = False) -> None:
        torch.nn.Module.__init__(self)  # not Embedding's, which would fill the weight
        self.weight = _parameter(shape)
        if bias:
            self.bias = _parameter(shape[:1])
        self.flops, self.activations = flops, activations
        self.clock: Clock | None = None
        self.seconds = 0.0
        self.label = ""

    def forward(self, x: object) -> object:
        return run(self, x)


class Linear(Layer):
    """Multiplies `tokens` rows. attention: operations of the attention that follows."""

    def __init__(self, out: int, into: int, tokens: int, bias: bool = True, attention: float = 0.0) -> None:
        super().__init__((out, into), 2.0 * out * into * tokens + attention, 2.0 * tokens * (out + into), bias)
        self.out_features, self.in_features = out, into


class Norm(Layer):
    """Reads and writes `elements` numbers."""

    def __init__(self, width: int, elements: float, bias: bool = False) -> None:
        super().__init__((width,), 0.0, 4.0 * elements, bias)


class Table(Layer, torch.nn.Embedding):
    """An embedding, of which a forward asks for `asked` rows."""

    padding_idx = max_norm = None
    norm_type, scale_grad_by_freq, sparse = 2.0, False, False

    def __init__(self, rows: int, width: int, asked: int) -> None:
        super().__init__((rows, width), 0.0, 4.0 * asked * width)
        self.num_embeddings, self.embedding_dim = rows, width
        self.asked = min(asked, rows)

    def forward(self, x: object) -> object:
        # Looked up for real, so that an engine that brings rows sees which.
        torch.nn.functional.embedding(torch.arange(self.asked), self.weight)
        return run(self, x)


class Block(torch.nn.Module):
    """Layers by name in the order in which ComfyUI registers them. order: names in the order in which they run.

    table: rows and width of a parameter of the block itself, which is lent for as long as the block runs.
    """

    def __init__(
        self, layers: dict[str, Layer], order: Iterable[str] | None = None, table: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if table is not None:
            self.scale_shift_table = _parameter(table)
        for name, layer in layers.items():
            put(self, name, layer)
        self.order = [layers[name] for name in (order or layers)]
        self.clock: Clock | None = None
        self.seconds = 0.0
        self.label = ""
        self.flops = self.activations = 0.0

    def forward(self, x: object) -> object:
        if self.clock is not None and self._parameters:
            run(self, x)
        for layer in self.order:
            x = layer(x)
        return x


def put(module: torch.nn.Module, name: str, child: torch.nn.Module) -> None:
    """Add a module under a name with dots."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    module.add_module(last, child)


def _parameter(shape: Sequence[int]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=BF16), requires_grad=False)


def run(module: Layer | Block, x: object) -> object:
    """Take a module's time, and watch that its weights are there where that is asked for."""
    clock = module.clock
    assert clock is not None
    start, end = clock.compute(module.seconds, module.label)
    if clock.hazards is not None and getattr(module, "asked", None) is None:
        weight = next(iter(module._parameters.values()))
        clock.hazards.is_read(getattr(weight, "qdata", weight), start, end)
    return x


def seconds_on(module: torch.nn.Module, machine: Machine, dtype: str) -> float:
    """Return what a forward takes with weights in `dtype`: 'bf16', 'fp8' or 'int8'."""
    numel = sum(p.numel() for p in module._parameters.values() if p is not None)
    if getattr(module, "asked", None) is not None:
        return module.activations / machine.vram_speed
    rate, moved = machine.flops, 2.0 * numel
    if narrow(module):
        if dtype == "int8":
            rate, moved = machine.flops * machine.int8_gain, float(numel)
        elif dtype == "fp8":
            moved = 5.0 * numel  # cast to 16 bits before each product
    return max(module.flops / rate, (moved + module.activations) / machine.vram_speed)


def narrow(module: torch.nn.Module) -> bool:
    """Say whether the module's weight is one that fp8 and INT8 files keep in 8 bits."""
    return isinstance(module, Linear) and min(module.out_features, module.in_features) >= NARROWEST


class Model(torch.nn.Module):
    """Blocks and layers in the order in which they run. registered: names in ComfyUI's order.

    kind: the class of ComfyUI's model.
    """

    def __init__(self, kind: str, parts: dict[str, torch.nn.Module], registered: Iterable[str] | None = None) -> None:
        super().__init__()
        self.kind = kind
        for name in registered or parts:
            put(self, name, parts[name])
        self.parts = list(parts.items())

    def forward(self, x: object) -> object:
        for _, part in self.parts:
            x = part(x)
        return x

    def holders(self) -> list[tuple[str, torch.nn.Module]]:
        """List the modules that hold weights, by their names."""
        return [(name, module) for name, module in self.named_modules() if module._parameters]

    def store(self, dtype: str) -> None:
        """Let the weights lie in the file in `dtype`: fp8, else 16 bits."""
        if dtype != "fp8":
            return
        for _, module in self.holders():
            if narrow(module):
                weight = torch.empty(module.weight.shape, dtype=FP8)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)

    def run_on(self, clock: Clock, dtype: str) -> None:
        """Let the layers take their time on this clock."""
        for name, module in self.holders():
            module.clock, module.label = clock, name
            module.seconds = seconds_on(module, clock.machine, dtype)
