"""Patches a weight in host memory piece by piece, straight into the place where its final form is to lie.

The arithmetic of each number is that of ComfyUI's function, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ....ops.gather import is_wrapper
from .pieces import LEAST_ROWS, add_product, row_pieces
from .plain_lora import as_plain, is_comfyuis_own
from .requantise import rounds_as_known

ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # to the nearest, one number at a time


class Added(NamedTuple):
    """A product of matrices for the rows from `begin` to `end` of a weight, and for `columns` of them."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    begin: int
    end: int
    columns: slice


def write_in_pieces(out: torch.Tensor, weight: torch.Tensor, stages: Sequence[Sequence[tuple]]) -> bool:
    """Write the patched weight to `out`, and return whether that could be done in this way. If not, nothing was done.

    out: in the model's dtype. stages: ComfyUI's patches; after each stage there is rounded.
    """
    if not stages or not _fits(out, weight) or not rounds_as_known() or not is_comfyuis_own():
        return False
    found = [[_added(patch, out) for patch in patches] for patches in stages]
    added = [[one for one in some if one is not None] for some in found]
    if any(len(some) != len(all_) for some, all_ in zip(added, found, strict=True)):
        return False
    columns = out[0].numel()
    edges = {edge for some in added for one in some for edge in (one.begin, one.end)}
    pieces = list(row_pieces(len(out), columns, edges))
    if min(end - begin for begin, end in pieces) < min(LEAST_ROWS, len(out)):
        return False
    # A weight that is joined of several stays so: reshaped, it would be copied as a whole.
    target, source = out.view(len(out), columns), weight if weight.ndim == 2 else weight.reshape(len(out), columns)
    most = max(end - begin for begin, end in pieces) * columns
    rounds = out.dtype != torch.float32  # else the numbers are made where they are to lie
    product = torch.empty(most, dtype=torch.float32, device="cpu")
    value = torch.empty_like(product) if rounds else out
    for begin, end in pieces:
        there = target[begin:end]
        piece = value[: (end - begin) * columns].view(end - begin, columns) if rounds else there
        piece.copy_(source[begin:end].to(out.dtype) if rounds else source[begin:end])
        for number, some in enumerate(added):
            if number and rounds:
                piece.copy_(there)
            for one in some:
                if one.begin <= begin < one.end:
                    up = one.up[begin - one.begin : end - one.begin]
                    add_product(piece[:, one.columns], up, one.down, one.factor, product)
            if rounds:
                there.copy_(piece)
    return True


def _fits(out: torch.Tensor, weight: torch.Tensor) -> bool:
    if is_wrapper(out) or is_wrapper(weight) or weight.device.type != "cpu" or out.device.type != "cpu":
        return False
    if out.dtype not in ROUNDED or not weight.dtype.is_floating_point or out.numel() == 0 or out.ndim == 0:
        return False
    return out.shape == weight.shape and out.is_contiguous() and weight.is_contiguous()


def _added(patch: tuple, out: torch.Tensor) -> Added | None:
    """Give what a patch adds; None where it does anything else."""
    plain, offset = as_plain(patch, out), patch[3]
    if plain is None:
        return None
    begin, end, columns = 0, len(out), slice(None)
    if offset is not None:
        dimension, start, length = offset
        if start < 0:
            return None
        if dimension == 0:
            begin, end = start, start + length
        elif dimension == 1 and out.ndim == 2:
            columns = slice(start, start + length)
        else:
            return None
    up, down = plain.matrices()
    if len(up) != end - begin:
        return None  # of a shape that only as a whole is the weight's
    return Added(up, down, plain.factor, begin, end, columns)
