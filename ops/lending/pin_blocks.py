"""Large blocks of host memory that pins are laid out in, since each locking call costs time and is rounded up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..gather import aligned

BLOCK_BYTES = 256 << 20


@dataclass(eq=False)
class Block:
    """A block of host memory. gaps: (start, bytes) of the ranges that no pin uses, by address."""

    buffer: torch.Tensor
    gaps: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gaps = [(0, self.nbytes)]

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()

    @property
    def is_free(self) -> bool:
        """Say whether no pin lies in it."""
        return sum(size for _, size in self.gaps) == self.nbytes

    def cut(self, nbytes: int) -> Extent | None:
        """Cut `nbytes` from the first gap that is large enough. Return None where no gap is."""
        wanted = aligned(nbytes)
        for index, (start, size) in enumerate(self.gaps):
            if size >= nbytes:
                rest = size - wanted
                self.gaps[index : index + 1] = [(start + wanted, rest)] if rest > 0 else []
                return Extent(self, start, min(wanted, size), self.buffer[start : start + nbytes])
        return None

    def join(self, extent: Extent) -> None:
        """Make an extent a gap again, joined with its neighbours."""
        gaps: list[tuple[int, int]] = []
        for start, size in sorted([*self.gaps, (extent.start, extent.nbytes)]):
            if gaps and sum(gaps[-1]) == start:
                gaps[-1] = (gaps[-1][0], gaps[-1][1] + size)
            else:
                gaps.append((start, size))
        self.gaps = gaps


@dataclass(eq=False)
class Extent:
    """A part of a block. nbytes: with alignment. view: uint8, just the bytes asked for."""

    block: Block
    start: int
    nbytes: int
    view: torch.Tensor


class PinBlocks:
    """The blocks of one model's pins."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    @property
    def nbytes(self) -> int:
        """Return the bytes of all blocks, used or not."""
        return sum(block.nbytes for block in self.blocks)

    def cut(self, nbytes: int) -> Extent | None:
        """Return an extent of `nbytes` of a block that is there; None where no gap is large enough."""
        for block in self.blocks:
            extent = block.cut(nbytes)
            if extent is not None:
                return extent
        return None

    def room_for(self, nbytes: int, wanted: int, budget: int, room: Callable[[], int]) -> int:
        """Return the bytes that a new block for `nbytes` may have, `wanted` at most; 0 where there is no room.

        budget: bytes of all blocks. room: bytes of RAM.
        """
        size = min(max(nbytes, wanted), budget - self.nbytes)
        size = min(size, room()) if size >= nbytes else size
        return size if size >= nbytes else 0

    def add(self, buffer: torch.Tensor) -> Block:
        """Use a buffer as a block."""
        self.blocks.append(Block(buffer))
        return self.blocks[-1]

    def drop(self, block: Block) -> int:
        """Forget a block that no pin lies in. Return its bytes, which the system has back once no view is left."""
        self.blocks.remove(block)
        return block.nbytes
