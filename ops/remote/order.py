"""Which blocks of a file are brought next."""

from __future__ import annotations

from collections.abc import Iterable

from ..files.coming_file import ComingFile, Range


class Order:
    """First what somebody waits for, then what will be asked for, in the order in which layers run, then the rest.

    The caller holds the file's condition.
    """

    def __init__(self, coming: ComingFile) -> None:
        self._coming = coming
        self._busy = bytearray(coming.come)  # 1 where a block has come, or is on its way

    def take(self, most: int) -> range | None:
        """Return the next blocks, at most so many, and let them be on their way. None where nothing is left to take."""
        coming = self._coming
        while coming.foreseen and coming.has(*coming.foreseen[0]):
            coming.foreseen.pop(0)
        run = (
            self._of(coming.asked, most) or self._of(coming.foreseen, most) or self._of([(0, coming.file_bytes)], most)
        )
        if run is not None:
            self._busy[run.start : run.stop] = b"\1" * len(run)
        return run

    def give_back(self, run: range) -> None:
        """Note that blocks which were on their way have not come."""
        for block in run:
            self._busy[block] = self._coming.come[block]

    def _of(self, ranges: Iterable[Range], most: int) -> range | None:
        """Return the first blocks of the ranges that are not on their way, as far as they follow one another."""
        start = stop = -1
        for offset, nbytes in ranges:
            blocks = self._coming.blocks(offset, nbytes)
            if start < 0:
                start = stop = self._busy.find(0, blocks.start, blocks.stop)
                if start < 0:
                    continue
            elif not blocks.start <= stop <= blocks.stop:
                break
            while stop < blocks.stop and stop - start < most and not self._busy[stop]:
                stop += 1
            if stop < blocks.stop:
                break
        return range(start, stop) if start >= 0 else None
