"""Adds plain LoRAs to a weight in less memory than ComfyUI's own function, with the same bits; others go through it.

That one makes the product of a LoRA's matrices and then the product times its strength, each of the weight's size in
fp32. Here the second takes the place of the first, and in host memory only a piece of it is made at a time. Fresh
memory costs a CPU as much as the arithmetic, and with a large layer a card does not have it. Whatever is more than up
times down goes through ComfyUI's function.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import comfy.lora
import comfy.model_management
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ....ops.device.out_of_memory import is_out_of_memory
from ....ops.gather import is_wrapper
from .pieces import add_product, row_pieces

# A pack that replaces one of these wants something else done.
_CALCULATE = comfy.lora.calculate_weight
_ADAPTED = LoRAAdapter.calculate_weight


class Plain(NamedTuple):
    """A LoRA that is up times down times factor. part: of the weight that it is added to."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    part: torch.Tensor

    def matrices(self) -> list[torch.Tensor]:
        """Give up and down as matrices in fp32, where the weight is."""
        return [
            comfy.model_management.cast_to_device(matrix, self.part.device, torch.float32).flatten(start_dim=1)
            for matrix in (self.up, self.down)
        ]


def calculate_weight(
    patches: list[tuple], weight: torch.Tensor, key: str, originals: dict[str, list[tuple]] | None = None
) -> torch.Tensor:
    """Return the patched weight. It is written into.

    Raises the error of a patch that finds no memory. ComfyUI's adapters log any error and leave the patch out, and the
    picture would be another one.
    """
    for patch in patches:
        plain = as_plain(patch, weight) if is_comfyuis_own() else None
        if plain is None:
            with _memory_errors():
                weight = comfy.lora.calculate_weight([patch], weight, key, original_weights=originals)
        else:
            _add(plain)
    return weight


class _MemoryErrors(logging.Filter):
    """Raises the error of which ComfyUI is about to say in the log that it goes on without a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()
        self.least = logging.NOTSET  # the level that the log is to have, where it was lowered to see errors

    def filter(self, record: logging.LogRecord) -> bool:
        error = sys.exc_info()[1]
        patching = getattr(self.here, "patching", False)
        if patching and error is not None and error is not self.here.before and is_out_of_memory(error):
            raise error
        return record.levelno >= self.least


_filter = _MemoryErrors()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Let errors that say out of memory come out of ComfyUI's adapters, which say so by the root logger."""
    root, here = logging.getLogger(), _filter.here
    root.addFilter(_filter)  # which is there once, however often it is added
    # A patch that is made again is called while the error of the first time is being handled.
    here.patching, here.before = True, sys.exc_info()[1]
    level, disabled = root.level, root.manager.disable
    hidden = not root.isEnabledFor(logging.ERROR)
    try:
        if hidden:
            _filter.least = max(level, disabled + 1)
            root.setLevel(logging.ERROR)
            logging.disable(logging.NOTSET)
        yield
    finally:
        here.patching, here.before = False, None
        if hidden:
            root.setLevel(level)
            logging.disable(disabled)
            _filter.least = logging.NOTSET


def as_plain(patch: tuple, weight: torch.Tensor) -> Plain | None:
    """Give the matrices of a patch that is a LoRA and nothing more; None for any other. weight: as it is to be."""
    strength, adapter, strength_model, offset, function = patch
    if type(adapter) is not LoRAAdapter or function is not None or strength_model != 1.0 or is_wrapper(weight):
        return None
    up, down, alpha, *others = adapter.weights
    if any(other is not None for other in others) or is_wrapper(up) or is_wrapper(down) or min(up.ndim, down.ndim) < 2:
        return None
    if not all(isinstance(number, int | float) for number in (strength, 1.0 if alpha is None else alpha)):
        return None
    part = weight if offset is None else weight.narrow(*offset)
    if up[0].numel() != down.shape[0] or up.shape[0] * down[0].numel() != part.numel():
        return None  # ComfyUI says so in the log, and leaves it out
    return Plain(up, down, strength * (1.0 if alpha is None else alpha / down.shape[0]), part)


def _add(plain: Plain) -> None:
    up, down = plain.matrices()
    rows = _as_rows(plain.part, up, down)
    if rows is None:
        product = torch.mm(up, down)
        product.mul_(plain.factor)
        plain.part.add_(product.reshape(plain.part.shape).type(plain.part.dtype))
        return
    cut = list(row_pieces(*rows.shape))
    memory = torch.empty(max(end - begin for begin, end in cut) * rows.shape[1], dtype=torch.float32, device="cpu")
    for begin, end in cut:
        add_product(rows[begin:end], up[begin:end], down, plain.factor, memory)


def _as_rows(part: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor | None:
    """View a part of a weight in host memory as the matrix that is added to it. None where it cannot be cut."""
    if part.device.type != "cpu" or part.numel() == 0 or part.ndim == 0 or len(up) != len(part):
        return None
    if part.ndim > 2 and not part.is_contiguous():
        return None
    return part if part.ndim == 2 else part.view(len(up), down.shape[1])


def is_comfyuis_own() -> bool:
    """Say whether ComfyUI's functions are those that this file knows. They may come to compute in another way."""
    if comfy.lora.calculate_weight is not _CALCULATE or LoRAAdapter.calculate_weight is not _ADAPTED:
        return False
    return _is_known()


@functools.cache
def _is_known() -> bool:
    """Compare bits with ComfyUI's function once, on a small weight and on one of several pieces."""
    if (_CALCULATE.__module__, _ADAPTED.__module__) != ("comfy.lora", LoRAAdapter.__module__):
        return False
    return _has_its_bits(24, 3, 16) and _has_its_bits(1100, 33, 1500)


def _has_its_bits(rows: int, rank: int, columns: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, rank), (rank, columns), (rows, columns)
    up, down, weight = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    try:
        patch = (0.7, LoRAAdapter(set(), (up, down, 2.0, None, None, None)), 1.0, None, None)
        for dtype in (torch.float32, torch.bfloat16):
            wanted, got = weight.to(dtype, copy=True), weight.to(dtype, copy=True)
            wanted = _CALCULATE([patch], wanted, "")
            plain = as_plain(patch, got)
            if plain is None:
                return False
            _add(plain)
            if not torch.equal(wanted, got):
                return False
    except Exception:  # of a ComfyUI whose classes are others
        return False
    return True
