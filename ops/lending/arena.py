"""An arena: a budget of bytes that bundles on their way lie in, each in as many bytes as it needs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..device.backend import Event
from ..gather import aligned


@dataclass(eq=False)
class Segment:
    """A range of a block, in bytes. done: event after the last use of what lies there.

    given: counts when it was given back, so that the range that has been free for longest is used first.
    """

    start: int
    nbytes: int
    done: Event | None = None
    given: int = 0
    taken: bool = False

    @property
    def is_idle(self) -> bool:
        """Say whether nothing uses it any more."""
        if self.done is not None and self.done.query():
            self.done = None
        return self.done is None and not self.taken


@dataclass(eq=False)
class Block:
    """Memory of an arena. segments: all of it, by address. nbytes: of all of them."""

    nbytes: int
    segments: list[Segment]
    _empty: Callable[[int], torch.Tensor]
    _buffer: torch.Tensor | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def buffer(self) -> torch.Tensor:
        """Return the memory, uint8. Who first asks allocates it, and gets what an allocation raises."""
        with self._lock:
            if self._buffer is None:
                self._buffer = self._empty(self.nbytes)
            return self._buffer

    @property
    def is_taken(self) -> bool:
        """Say whether somebody holds a part of it."""
        return any(segment.taken for segment in self.segments)


@dataclass(eq=False)
class Extent:
    """A range that is taken. nbytes: just those that were asked for.

    after: the last uses of what lies there. Whoever writes waits for them, or would overwrite what is still read.
    """

    block: Block
    segment: Segment
    nbytes: int
    after: list[Event] = field(default_factory=list)

    @property
    def view(self) -> torch.Tensor:
        start = self.segment.start
        return self.block.buffer[start : start + self.nbytes]


class Arena:
    """Memory of at most `capacity` bytes, which comes in blocks when it is asked for.

    born: gives the event after which memory that was just allocated may be written to. later: memory is allocated when
    a view is first asked for, by whoever asks. Any thread may call.
    """

    def __init__(
        self,
        empty: Callable[[int], torch.Tensor],
        born: Callable[[], Event | None] = lambda: None,
        *,
        later: bool = False,
    ) -> None:
        self.capacity = 0
        self._block_bytes: int | None = None  # None: one block of all the capacity
        self._empty, self._born, self._later = empty, born, later
        self._blocks: list[Block] = []
        self._given = 0
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Return the bytes of all blocks."""
        return sum(block.nbytes for block in self._blocks)

    @property
    def taken_bytes(self) -> int:
        """Return the bytes of the extents that are taken."""
        with self._lock:
            return sum(one.nbytes for block in self._blocks for one in block.segments if one.taken)

    def resize(self, capacity: int, block_bytes: int | None = None) -> None:
        """Change the capacity, and the least size of blocks. Blocks above it go as soon as nothing lies in them."""
        with self._lock:
            self.capacity, self._block_bytes = capacity, block_bytes
            self._shrink()

    def take(self, nbytes: int) -> Extent | None:
        """Return an extent of `nbytes`, the one whose bytes were given back longest ago. None where none is free.

        Raises what an allocation raises.
        """
        with self._lock:
            self._shrink()
            size = aligned(max(1, nbytes))
            found = self._find(size)
            # New memory is there sooner than the end of a use. Without a block size there is but one block.
            if (found is None or not self._is_idle(*found)) and self._grow(size, at_all=found is None):
                found = self._find(size)
            return None if found is None else self._cut(*found, size, nbytes)

    def give(self, extent: Extent, done: Event | None) -> None:
        """Give an extent back, to be taken again after `done`."""
        with self._lock:
            self._given += 1
            segment = extent.segment
            segment.taken, segment.done, segment.given = False, done, self._given
            self._join(extent.block)

    def clear(self) -> None:
        """Free the blocks that nothing lies in, once their last uses are done."""
        with self._lock:
            for block in [block for block in self._blocks if not block.is_taken]:
                self._drop(block)

    # -- with the lock held

    def _find(self, size: int) -> tuple[Block, int, int] | None:
        """Return (block, first, last) of the run of free segments that has been free for longest."""
        best, chosen = None, None
        for block in self._blocks:
            segments = block.segments
            for first in range(len(segments)):
                total, latest = 0, 0
                for last in range(first, len(segments)):
                    segment = segments[last]
                    if segment.taken:
                        break
                    total += segment.nbytes
                    latest = max(latest, segment.given)
                    if total >= size:
                        if best is None or latest < best:
                            best, chosen = latest, (block, first, last)
                        break
        return chosen

    @staticmethod
    def _is_idle(block: Block, first: int, last: int) -> bool:
        return all(segment.is_idle for segment in block.segments[first : last + 1])

    @staticmethod
    def _cut(block: Block, first: int, last: int, size: int, nbytes: int) -> Extent:
        run = block.segments[first : last + 1]
        start, end = run[0].start, run[-1].start + run[-1].nbytes
        taken = Segment(start, size, taken=True)
        rest = []
        if end - start > size:  # the last segment was larger than what was left to find
            rest = [Segment(start + size, end - start - size, run[-1].done, run[-1].given)]
        block.segments[first : last + 1] = [taken, *rest]
        after = [segment.done for segment in run if segment.done is not None and not segment.is_idle]
        return Extent(block, taken, nbytes, [done for done in after if done is not None])

    @staticmethod
    def _join(block: Block) -> None:
        """Join neighbours that nothing uses, so that their number stays small."""
        joined: list[Segment] = []
        for segment in block.segments:
            before = joined[-1] if joined else None
            if before is not None and not before.taken and not segment.taken and before.is_idle and segment.is_idle:
                before.nbytes += segment.nbytes
                before.given = max(before.given, segment.given)
            else:
                joined.append(segment)
        block.segments = joined

    def _grow(self, size: int, at_all: bool) -> bool:
        """Add a block in which `size` bytes fit. at_all: in the place of smaller ones, where it must be."""
        idle = at_all * [block for block in self._blocks if not block.is_taken]
        if size > self.capacity - self.nbytes + sum(block.nbytes for block in idle):
            return False
        while size > self.capacity - self.nbytes:
            self._drop(idle.pop(0))
        room = self.capacity - self.nbytes
        nbytes = room if self._block_bytes is None else min(room, max(size, self._block_bytes))
        block = Block(nbytes, [Segment(0, nbytes)], self._empty)
        if not self._later:
            _ = block.buffer
        block.segments[0].done = self._born()
        self._blocks.append(block)
        return True

    def _shrink(self) -> None:
        """Free idle blocks while the arena is larger than it may be."""
        while self.nbytes > self.capacity:
            idle = next((block for block in self._blocks if not block.is_taken), None)
            if idle is None:
                return
            self._drop(idle)

    def _drop(self, block: Block) -> None:
        for segment in block.segments:
            if segment.done is not None:
                segment.done.synchronize()  # else a transfer or kernel would still use what others get
        self._blocks.remove(block)
