"""The cost of making final forms, in place of making them: gathering, casting, quantising and patching."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from spillway.ops.gather import is_wrapper, tensor_bytes
from spillway.ops.int8.weight import Int8Weight
from spillway.ops.lending import caster as _caster  # noqa: F401 - the modules below are looked up in sys.modules
from spillway.ops.lending.bundle import Bundle

from .clock import Clock
from .devices import Machine

RANK = 16


class LowRankPatch:
    """Stands for a LoRA of rank 16 on one weight. Nobody calls it."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the virtual device makes no final form")


def math_seconds(machine: Machine, numel: int, source: int, final: int, patched: bool) -> float:
    """Return the device's seconds to make one weight of `numel` numbers from `source` bytes to `final` bytes."""
    moved = 0.0
    if source != final or patched:
        moved += source + final
    if final < source:
        moved += source  # the largest number of each row first, then the rounding
    if patched:  # the product, then the sum in 16 bits
        moved += 6.0 * numel
    return max(moved / machine.vram_speed, 2.0 * RANK * numel * patched / machine.flops)


@contextmanager
def virtual_math(clock: Clock) -> Iterator[None]:
    """Let gathering and final forms cost time on the clock, and do nothing."""

    def copied(
        target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False, *, alone=False, read=None
    ) -> None:
        clock.read(tensor_bytes(source), part=id(source))

    def made(bundle, source, views, counters, *, in_place):
        for param, view, tensor in zip(bundle.params, views, source, strict=True):
            numel, patched = param.source.numel(), param.patch is not None
            quantised = isinstance(view, Int8Weight)
            seconds = math_seconds(clock.machine, numel, tensor_bytes(tensor), tensor_bytes(view), patched)
            clock.call(clock.costs.launch)
            start, end = clock.compute(seconds, bundle.name, math=True)
            if clock.hazards is not None and not is_wrapper(tensor):
                clock.hazards.is_read(tensor, start, end)
            counters.patched += patched
            counters.quantised += quantised
        return views

    def dropped(bundle, from_cache: bool = False) -> None:
        for param in bundle.params if from_cache and clock.pages is not None else ():
            clock.pages.leave(id(param.source))

    stand_ins = {"copy_into": copied, "make_final": made}
    engine = [module for name, module in sys.modules.items() if name.startswith("spillway.ops.lending.")]
    places = [(module, name) for module in engine for name in stand_ins if name in vars(module)]
    patches = [patch.object(module, name, stand_ins[name]) for module, name in places]
    patches.append(patch.object(Bundle, "drop_pages", dropped))
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()
