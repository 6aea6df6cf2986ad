"""Works on a weight in host memory piece by piece, so that what is made on the way stays in the processor's cache.

As a whole it would go to memory and back several times, into pages that the system has to clear first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch

PIECE_BYTES = 2 << 20  # of a piece in fp32. Smaller ones make threads wait for each other more often.
# A product of very few rows may be summed in another order than one of many.
LEAST_ROWS = 16


def row_pieces(rows: int, columns: int, edges: Iterable[int] = ()) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into pieces (begin, end). edges: rows at which a piece is to end."""
    for begin, end in itertools.pairwise(sorted({0, rows, *edges})):
        count = max(1, min((end - begin) // LEAST_ROWS, (end - begin) * columns * 4 // PIECE_BYTES))
        ends = [begin + (end - begin) * number // count for number in range(count + 1)]
        yield from itertools.pairwise(ends)


def number_pieces(count: int) -> Iterator[tuple[int, int]]:
    """Cut a row of `count` numbers into pieces (begin, end)."""
    step = PIECE_BYTES // 4
    for begin in range(0, count, step):
        yield begin, min(count, begin + step)


def add_product(
    target: torch.Tensor, up: torch.Tensor, down: torch.Tensor, factor: float, memory: torch.Tensor
) -> None:
    """Add up @ down * factor to a piece. memory: fp32, of at least as many numbers."""
    product = memory[: target.numel()].view(target.shape)
    torch.mm(up, down, out=product)
    product.mul_(factor)
    target.add_(product if target.dtype == product.dtype else product.type(target.dtype))
