"""A file of which a part has yet to come. Whoever reads a range of it waits for that range first.

A range that has not come is a hole in a sparse file. Whoever read it would get zeros, and no error.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

# Bytes that come together, or not at all. A lookup in a table needs one for each of its rows.
BLOCK_BYTES = 256 << 10
# That a buffered read waits for at once. Python 3.14 would make it 16 times as many, and a header waited for weights.
READ_BYTES = 8 << 10
# Seconds between two questions whether somebody wants the waiting to end.
ASK_EVERY = 0.1

# (first byte, bytes)
Range = tuple[int, int]


def _never() -> BaseException | None:
    return None


class Patience:
    """Says when to stop waiting: `interrupt` returns the exception to raise, or None. ComfyUI's side sets it."""

    interrupt: Callable[[], BaseException | None] = staticmethod(_never)

    def check(self) -> None:
        """Raise what ends the waiting, where somebody asks for it. Any thread may call this."""
        stop = self.interrupt()
        if stop is not None:
            raise stop


patience = Patience()


class ComingFile:
    """path: the name that the file gets when it is whole. data: the sparse file that it is until then.

    come: one byte for each block, 1 where the block is in the sparse file. bring: has somebody bring what is missing.
    It is called whenever something is waited for, so that bringing begins again after it has failed. stamp: what the
    system says of the file once it is whole. asked: ranges that somebody waits for now. foreseen: ranges that will be
    asked for, in their order.
    """

    def __init__(self, path: Path, data: Path, file_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self.path, self.data = path, data
        self.file_bytes, self.block_bytes = file_bytes, block_bytes
        self.come = bytearray(-(-file_bytes // block_bytes))
        self.condition = threading.Condition()
        self.bring: Callable[[], None] = lambda: None
        self.asked: list[Range] = []
        self.foreseen: list[Range] = []
        self.is_whole = False
        self.stamp: tuple[int, int] | None = None
        self._failures, self._failure = 0, Exception()

    @property
    def come_bytes(self) -> int:
        """Return how many bytes are in the file."""
        count = self.come.count(1)
        if not count:
            return 0
        short = len(self.come) * self.block_bytes - self.file_bytes if self.come[-1] else 0
        return count * self.block_bytes - short

    def blocks(self, offset: int, nbytes: int) -> range:
        """Return the blocks that hold a range of bytes."""
        end = min(offset + nbytes, self.file_bytes)
        return range(offset // self.block_bytes, -(-end // self.block_bytes))

    def has(self, offset: int, nbytes: int) -> bool:
        """Say whether a range of bytes has come."""
        if self.is_whole or nbytes <= 0 or offset >= self.file_bytes:
            return True
        blocks = self.blocks(offset, nbytes)
        return self.come.find(0, blocks.start, blocks.stop) < 0

    def wait(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Block this thread until a range of bytes has come; by default all of them.

        Raises what kept it from coming, and what `patience` says.
        """
        wanted = offset, self.file_bytes - offset if nbytes is None else nbytes
        if not self.has(*wanted):
            self._wait(lambda: self.has(*wanted), wanted)

    def wait_whole(self) -> None:
        """Block this thread until the file is whole and has its name."""
        self._wait(lambda: self.is_whole, (0, self.file_bytes))

    def _wait(self, done: Callable[[], bool], wanted: Range) -> None:
        with self.condition:
            before = self._failures
            self.asked.append(wanted)
            try:
                while not done():
                    self.bring()
                    self.condition.wait(ASK_EVERY)
                    if self._failures != before:
                        raise self._failure
                    patience.check()
            finally:
                self.asked.remove(wanted)

    def expect(self, ranges: Sequence[Range], soon: bool) -> None:
        """Have ranges brought in this order. soon: before all that was foreseen until now."""
        with self.condition:
            if soon:
                known = set(ranges)
                self.foreseen = [*ranges, *(one for one in self.foreseen if one not in known)]
            else:
                self.foreseen = [*self.foreseen, *ranges]
            self.condition.notify_all()

    def note_come(self, blocks: range) -> None:
        """Let everybody read these blocks."""
        with self.condition:
            self.come[blocks.start : blocks.stop] = b"\1" * len(blocks)
            self.condition.notify_all()

    def note_whole(self, stamp: tuple[int, int]) -> None:
        """Let it be a file like any other. stamp: its size and the time of its last change."""
        with self.condition:
            self.stamp, self.is_whole = stamp, True
            self.condition.notify_all()

    def note_failure(self, error: Exception) -> None:
        """Let whoever waits now raise an error."""
        with self.condition:
            self._failures, self._failure = self._failures + 1, error
            self.condition.notify_all()

    def open(self) -> BinaryIO:
        """Open the sparse file to read. Each read waits for what it reads."""
        try:
            return io.BufferedReader(_Reader(self, self.data), READ_BYTES)
        except FileNotFoundError:  # it has just got its name
            return io.BufferedReader(_Reader(self, self.path), READ_BYTES)


class _Reader(io.FileIO):
    """Waits for what is read through it."""

    def __init__(self, coming: ComingFile, path: Path) -> None:
        self.coming = coming
        super().__init__(path, "rb")

    def readinto(self, buffer: Any) -> int:
        self.coming.wait(self.tell(), memoryview(buffer).nbytes)
        return super().readinto(buffer)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        self.coming.wait(self.tell(), size)
        return super().read(size)

    def readall(self) -> bytes:
        self.coming.wait(self.tell())
        return super().readall()


_coming: dict[Path, ComingFile] = {}


def register(coming: ComingFile) -> None:
    """Let the file be found under the name that it will have."""
    _coming[coming.path] = coming


def forget(coming: ComingFile) -> None:
    """Let it be found no more."""
    if _coming.get(coming.path) is coming:
        del _coming[coming.path]


def coming_file(path: str | os.PathLike[str]) -> ComingFile | None:
    """Return the file that is coming under this name; None where none is."""
    return _coming.get(Path(os.path.abspath(path))) if _coming else None


def wait_whole(path: str | os.PathLike[str]) -> None:
    """Wait until the file that is coming under this name has it, for code that opens it by its name."""
    coming = coming_file(path)
    if coming is not None:
        coming.wait_whole()


def is_any_coming() -> bool:
    """Say whether any file is coming."""
    return bool(_coming)


def coming_of(file: BinaryIO) -> ComingFile | None:
    """Return the coming file that an open file is; None for an ordinary one."""
    return getattr(getattr(file, "raw", file), "coming", None)
