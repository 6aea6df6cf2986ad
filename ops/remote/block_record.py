"""A small file beside a sparse one, which says which of its blocks have come and are on the disk.

The data of a block is brought to the disk before its byte is written here. Whatever ends the process, a block may be
forgotten, and is then brought again. None is ever said to be there that is not.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import BinaryIO

from ..files.partial_file import sync_folder
from .store import State

FORMAT = 1
COME = b"\1"


class BlockRecord:
    """The record of a file, open for writing. See `read` and `create`."""

    def __init__(self, file: BinaryIO, base: int) -> None:
        self._file, self._base = file, base
        self._lock = threading.Lock()

    def note(self, blocks: range) -> None:
        """Say that these blocks are on the disk."""
        with self._lock:
            self._file.seek(self._base + blocks.start)
            self._file.write(COME * len(blocks))

    def close(self) -> None:
        self._file.close()


def _head(state: State, block_bytes: int) -> bytes:
    said = {"format": FORMAT, "bytes": state.nbytes, "mark": state.mark, "block_bytes": block_bytes}
    return json.dumps(said).encode() + b"\n"


def create(path: Path, state: State, block_bytes: int) -> BlockRecord:
    """Make a record in which no block has come. Raises OSError."""
    head = _head(state, block_bytes)
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(head + bytes(-(-state.nbytes // block_bytes)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)
    return BlockRecord(open(path, "r+b", buffering=0), len(head))


def read(path: Path, state: State, block_bytes: int) -> tuple[BlockRecord, bytearray] | None:
    """Return the record of a file in this state, with the blocks that have come; None where there is none.

    A record of another state, or a damaged one, is none.
    """
    head = _head(state, block_bytes)
    count = -(-state.nbytes // block_bytes)
    try:
        data = path.read_bytes()
        if not data.startswith(head) or len(data) != len(head) + count or data[len(head) :].strip(b"\0" + COME):
            return None
        return BlockRecord(open(path, "r+b", buffering=0), len(head)), bytearray(data[len(head) :])
    except FileNotFoundError:
        return None
