"""Quantises a patched weight again, piece by piece, straight into the place where its final form is to lie.

ComfyUI's formats round by chance, with random numbers for the whole weight at once, in some twenty operations that each
make another tensor of its size. On a processor the memory for these costs more than the arithmetic. The bits are those
that ComfyUI's own functions give, which is compared once for each format. A format that is not known here, or no longer
computes as it did, goes through them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.float
import comfy.quant_ops
import torch

from ....ops.gather import inner_tensors
from .pieces import PIECE_BYTES, number_pieces

FP8 = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout")
INT8 = "TensorWiseINT8Layout"
NUMBERS = PIECE_BYTES // 4
_AT_START = (comfy.float.stochastic_rounding, getattr(comfy.float, "_ck_stochastic_rounding_fp8", None))

# Writes to numbers and a scale what is made of a patched weight in fp32, by random numbers of a seed.
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]


class Requantiser(NamedTuple):
    """Takes a weight out of a format of ComfyUI's, and puts it back. numbers, scale: where its new form is to lie."""

    like: Any
    numbers: torch.Tensor
    scale: torch.Tensor
    make: Write

    def dequantise(self) -> torch.Tensor:
        """Make the weight in fp32, as it was before it is patched."""
        return _dequantised(self.like)

    def write(self, value: torch.Tensor, seed: int) -> None:
        """Write the quantised form of the patched weight, which is overwritten. seed: of the random numbers."""
        self.make(self.numbers.view(-1), self.scale, value.view(-1), seed)


def requantiser(out: torch.Tensor, like: torch.Tensor) -> Requantiser | None:
    """Make what patches a weight of such a format to `out`. None where it is for ComfyUI's own functions to do.

    like: the weight before it is patched.
    """
    layout = getattr(like, "_layout_cls", None)
    if layout is None or getattr(out, "_layout_cls", None) != layout or out.shape != like.shape:
        return None
    if layout not in (*FP8, INT8) or not _is_plain(like) or not _is_plain(out):
        return None
    if not rounds_as_known() or not is_comfyuis(layout):
        return None
    make = _of_layout(layout, like)
    return None if make is None else Requantiser(like, *inner_tensors(out), make)


def rounds_as_known() -> bool:
    """Say whether ComfyUI's functions are still those of its start. A pack that replaces one wants to be asked."""
    now = (comfy.float.stochastic_rounding, getattr(comfy.float, "_ck_stochastic_rounding_fp8", None))
    return now == _AT_START


def _is_plain(weight: torch.Tensor) -> bool:
    """Say whether a weight is numbers in host memory, in their order, and one scale."""
    parts = inner_tensors(weight)
    if len(parts) != 2 or parts[1].numel() != 1 or any(part.device.type != "cpu" for part in parts):
        return False
    return parts[0].shape == weight.shape and parts[0].is_contiguous() and parts[0].numel() > 0


def _of_layout(layout: str, like: Any) -> Write | None:
    if layout in FP8:
        return _fp8
    if layout == INT8:
        options = like.layout_cls.requantize_kwargs(like)
        # A scale for each row, and weights that are rotated, have other functions.
        known = options.get("is_weight") and not options.get("per_channel") and not options.get("convrot")
        return _int8 if known else None
    return None


def _dequantised(like: torch.Tensor) -> torch.Tensor:
    numbers, scale = inner_tensors(like)
    value = torch.empty(numbers.shape, dtype=torch.float32, device="cpu")
    flat, stored, factor = value.view(-1), numbers.view(-1), scale.float().view(())
    for begin, end in number_pieces(flat.numel()):
        flat[begin:end].copy_(stored[begin:end]).mul_(factor)
    return value


def _largest(value: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(value)
    return torch.maximum(-low, high).abs()  # not -0


def _fp8(numbers: torch.Tensor, scale: torch.Tensor, value: torch.Tensor, seed: int) -> None:
    made = _largest(value) / torch.finfo(numbers.dtype).max
    factor, generator, table = 1.0 / made, torch.Generator().manual_seed(seed), _roundings(numbers.dtype)
    stored = numbers.view(torch.uint8)
    chances = torch.empty(min(NUMBERS, value.numel()), dtype=torch.uint8, device="cpu")
    for begin, end in number_pieces(value.numel()):
        chance = chances[: end - begin].random_(0, 256, generator=generator)
        halves = value[begin:end].mul_(factor).half().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        found = table.index_select(0, halves)
        torch.bitwise_right_shift(found, 16, out=halves)  # the first chance by which it is rounded up
        stored[begin:end] = torch.where(chance < halves, found, found.bitwise_right_shift(8))
    scale.copy_(made)


@functools.cache
def _roundings(dtype: torch.dtype) -> torch.Tensor:
    """Tell for each half how ComfyUI rounds it to FP8, [65536] int32: bits 0 to 7 are the number that it is rounded to
    by small chances, bits 8 to 15 by large ones, and the rest says from which chance on (0 to 256).
    """
    halves = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.float16)

    def rounded(chance: torch.Tensor) -> torch.Tensor:
        made = comfy.float._ck_stochastic_rounding_fp8(halves.clone(), chance.to(torch.uint8), dtype)
        return made.view(torch.uint8).to(torch.int32)

    first = torch.zeros(1 << 16, dtype=torch.int32, device="cpu")
    down, up = rounded(first), rounded(first + 255)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        longer = first + step
        first = torch.where(rounded(longer - 1) == down, longer, first)
    first = torch.where(down == up, torch.full_like(first, 256), first)
    return down | up << 8 | first << 16


def _int8(numbers: torch.Tensor, scale: torch.Tensor, value: torch.Tensor, seed: int) -> None:
    made = (_largest(value) / 127.0).clamp(min=1e-30)
    generator = torch.Generator().manual_seed(seed)
    chances = torch.empty(min(NUMBERS, value.numel()), dtype=torch.float32, device="cpu")
    for begin, end in number_pieces(value.numel()):
        chance = chances[: end - begin].uniform_(generator=generator)
        numbers[begin:end] = value[begin:end].div_(made).add_(chance).floor_().clamp_(-128.0, 127.0)
    scale.copy_(made)


@functools.cache
def is_comfyuis(layout: str) -> bool:
    """Compare bits with ComfyUI's own functions once, on a small weight. They may come to compute in another way."""
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(140, 4097, generator=generator, device="cpu")  # more than one piece
    try:
        like = comfy.quant_ops.QuantizedTensor.from_float(value, layout, scale="recalculate")
        make = _of_layout(layout, like)
        if make is None or not _is_plain(like) or not _same_bits(_dequantised(like), like.dequantize()):
            return False
        value += 0.1 * torch.randn(value.shape, generator=generator, device="cpu")
        wanted = like.requantize_from_float(
            value.clone(), scale="recalculate", stochastic_rounding=77, inplace_ops=True
        )
        got = [torch.empty_like(part) for part in inner_tensors(wanted)]
        make(got[0].view(-1), got[1], value.view(-1), 77)
        return all(map(_same_bits, got, inner_tensors(wanted)))
    except Exception:  # of a ComfyUI whose classes are others
        return False


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
