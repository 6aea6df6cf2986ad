"""Keeps the process alive where a mapped file is cut short in the moment in which something reads it.

Whoever reads a range asks before whether the file is what it was. But an operation reads for milliseconds, and to a
read beyond a new end the system answers with a signal that ends the process (SIGBUS). Here, empty pages take the place
of what is gone, and the operation goes on. What it makes is worth nothing: `raise_since` tells whoever began it, and
the map is an error from then on. So it is where a disk does not give what it should.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from .safetensors_header import SourceError

# Elsewhere the structures below have other shapes, or (Windows) nobody can cut a mapped file.
KNOWN = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") and sys.maxsize > 1 << 32
CODE, ADDRESS = 8, 16  # where siginfo_t says what has happened, and has the address that was read
SA_SIGINFO, SA_NODEFER, SA_RESTART = 4, 0x40000000, 0x10000000
FIXED = 0x10 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000) if KNOWN else 0
TRIES = 5
FAILED = ctypes.c_void_p(-1).value


class Mapped(Protocol):
    """A map of a file, and who says whether it can still be used."""

    address: int
    file_bytes: int

    def lose(self) -> None:
        """Let every use from now on be an error."""

    @property
    def path(self) -> Path: ...


class _Action(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_lock = threading.Lock()
_lost: list[Path] = []
_installed: list[object] = []  # what the system keeps the addresses of


def lost_so_far() -> int:
    """Count the maps that have lost pages. For `raise_since`."""
    return len(_lost)


def raise_since(before: int) -> None:
    """Raise SourceError where a map has lost pages since `lost_so_far` was `before`."""
    if len(_lost) > before:
        raise lost(_lost[before])


def times_lost(path: str | Path) -> int:
    """Count how often a map of that file has lost pages. Its time and size may be what they were."""
    return _lost.count(Path(path))


def lost(path: Path) -> SourceError:
    """Word the error for a file of which a part is gone."""
    return SourceError(
        f"{path}: a part of this file could not be read while it was in use, so what was made of it is not kept. It "
        "was cut short, or its disk has failed. Put it in its place again, and run the workflow again. A loader of "
        "another pack does so after a restart."
    )


def install(maps: Callable[[], Iterable[Mapped]]) -> None:
    """Handle the signal from now on. A second call does nothing. maps: gives those that are open."""
    with _lock:
        if _installed or not KNOWN:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        before = _Action()

        def handle(number: int, info: int, _: int) -> None:
            if ctypes.c_int.from_address(info + CODE).value <= 0:  # somebody has sent it, and nothing was read
                libc.sigaction(number, ctypes.byref(before), None)
                signal.raise_signal(number)
                return
            try:
                if is_ours(ctypes.c_size_t.from_address(info + ADDRESS).value):
                    return
            except BaseException:  # whatever it is: without an end, the same read would come here for ever
                pass
            # Who handled it before does so again, or it ends the process.
            libc.sigaction(number, ctypes.byref(before), None)

        def is_ours(address: int) -> bool:
            """Say whether the address lies in a map of ours, and put empty pages there up to its end."""
            for one in _listed(maps):
                end = one.address + -(-one.file_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                if one.address <= address < end:
                    one.lose()
                    _lost.append(one.path)
                    page = address - address % mmap.PAGESIZE
                    rights = mmap.PROT_READ | mmap.PROT_WRITE
                    return bool(libc.mmap(page, end - page, rights, FIXED, -1, 0) != FAILED)
            return False

        try:
            wanted = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)(handle)
        except (MemoryError, OSError):  # of a system that lets no program make code: files load there as well
            _installed.append(None)
            return
        action = _Action()
        action.handler = ctypes.cast(wanted, ctypes.c_void_p).value
        action.flags = SA_SIGINFO | SA_NODEFER | SA_RESTART
        if libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(before)) == 0:
            _installed.extend((wanted, before, libc))


def _listed(maps: Callable[[], Iterable[Mapped]]) -> list[Mapped]:
    """List the maps. Another thread may open one in that moment, which the list does not survive."""
    for _ in range(TRIES):
        try:
            return list(maps())
        except RuntimeError:
            continue
    return []
