"""Measures whether INT8 wins on a device, by the model's own shapes."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch

from .linear import group_count, int8_linear, quantise_rows

# How many shapes are measured, those with the most weights. The others are taken to behave alike.
SHAPES = 3
# Below this gain the rounding is not worth it.
WORTHWHILE = 1.05

_measured: dict[tuple[torch.device, torch.dtype, int, int, int], tuple[float, float]] = {}


@dataclass(frozen=True)
class Timing:
    """Seconds of the products of some layers.

    shapes: for each, (rows, columns) of the weight, how many layers have it, and the seconds of a product of `tokens`
    tokens in floating point and in INT8.
    """

    dtype: torch.dtype
    device: torch.device
    tokens: int
    shapes: tuple[tuple[tuple[int, int], int, float, float], ...]

    @property
    def gain(self) -> float:
        """Return seconds in floating point over seconds in INT8."""
        in_floats = sum(layers * seconds for _, layers, seconds, _ in self.shapes)
        quantised = sum(layers * seconds for _, layers, _, seconds in self.shapes)
        return in_floats / quantised if quantised else 1.0

    @property
    def wins(self) -> bool:
        """Say whether INT8 is faster by more than timing noise."""
        return self.gain >= WORTHWHILE

    def in_words(self) -> str:
        """Return every shape, and the sum, for the log."""
        name = str(self.dtype).removeprefix("torch.")
        shapes = ", ".join(
            f"{columns}->{rows} {1e3 * floats:.2f} ms {name}, {1e3 * quantised:.2f} ms INT8"
            for (rows, columns), _, floats, quantised in self.shapes
        )
        faster = f"{self.gain:.2f}x as fast as {name}"
        return f"INT8 is {faster} on {self.device} ({self.tokens} tokens: {shapes})"


def measure(shapes: Counter[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Timing:
    """Time linear layers of those (rows, columns) in `dtype` and in INT8 on `device`.

    shapes: how many layers have each. Takes well under a second on a GPU and a few on a CPU, once in a process for each
    shape.
    """
    tokens = 256 if device.type == "cpu" else 4096
    chosen = sorted(shapes, key=lambda shape: -shapes[shape] * shape[0] * shape[1])[:SHAPES]
    timed = []
    with torch.inference_mode():
        for rows, columns in chosen:
            key = (device, dtype, tokens, rows, columns)
            if key not in _measured:
                _measured[key] = _time(tokens, rows, columns, dtype, device)
            timed.append(((rows, columns), shapes[rows, columns], *_measured[key]))
    return Timing(dtype, device, tokens, tuple(timed))


def _time(tokens: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    weight = torch.randn(rows, columns, device=device, dtype=dtype)
    qdata, scale = quantise_rows(weight, group_count(columns, device.type))
    best = [float("inf"), float("inf")]
    for turn in range(3):  # in turns, so that a machine that is busy for a moment slows both
        for int8 in (0, 1):
            began = time.perf_counter()
            _ = int8_linear(x, qdata, scale) if int8 else torch.nn.functional.linear(x, weight)
            if device.type != "cpu":
                torch.get_device_module(device).synchronize(device)
            if turn:  # the first turn chooses kernels
                best[int8] = min(best[int8], time.perf_counter() - began)
    return best[0], best[1]
