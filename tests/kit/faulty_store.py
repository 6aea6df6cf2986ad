"""A file system of fsspec's on a folder of this machine that does not do what it should."""

import errno
import os
import threading
import time

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Faults:
    """slow: seconds before each answer. hangs: until it is cleared. read_only, full, broken: raise what a drive does.

    keeps: nobody may remove anything. calls: by method.
    """

    def __init__(self):
        self.slow = 0.0
        self.read_only = self.full = self.keeps = False
        self.broken = None
        self.hangs = threading.Event()
        self.calls = []

    def meet(self, what, writes=False):
        self.calls.append(what)
        end = time.monotonic() + self.slow
        while self.slow and time.monotonic() < end:
            time.sleep(0.01)
        while self.hangs.is_set():
            time.sleep(0.01)
        if self.broken is not None:
            raise self.broken
        if writes and self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))


class FullFile:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        if len(data) > self.left:
            self.file.write(data[: self.left])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= len(data)
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class FaultyFileSystem(LocalFileSystem):
    """As a drive that is mounted."""

    protocol = ("faulty",)
    faults = Faults()

    def info(self, path, **kwargs):
        self.faults.meet("info")
        return super().info(path, **kwargs)

    def find(self, path, **kwargs):
        self.faults.meet("find")
        return super().find(path, **kwargs)

    def makedirs(self, path, exist_ok=False):
        self.faults.meet("makedirs", writes=True)
        super().makedirs(path, exist_ok=exist_ok)

    def rm_file(self, path):
        self.faults.meet("rm_file", writes=True)
        if self.faults.keeps:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        super().rm_file(path)

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.faults.meet("cat_file")
        return super().cat_file(path, start=start, end=end, **kwargs)

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        self.faults.meet(f"open {mode}", writes="w" in mode)
        file = super()._open(path, mode, block_size, **kwargs)
        return FullFile(file, 100) if self.faults.full and "w" in mode else file


class FarFileSystem(FaultyFileSystem):
    """As a server that is asked for ranges."""

    protocol = ("far",)
    local_file = False


class DriveError(OSError):
    """An error with a number that Python has a class for, and not of that class."""


class ShareFileSystem(FarFileSystem):
    """As SMB's driver: with errors of its own, no rename onto a file, and no folder made below one that is missing."""

    protocol = ("share",)

    def info(self, path, **kwargs):
        try:
            return super().info(path, **kwargs)
        except FileNotFoundError as error:
            raise DriveError(error.errno, "nothing is there") from None

    def rm_file(self, path):
        try:
            super().rm_file(path)
        except FileNotFoundError as error:
            raise DriveError(error.errno, "nothing is there") from None

    def makedirs(self, path, exist_ok=False):
        if not os.path.isdir(os.path.dirname(path)):
            raise DriveError(errno.EACCES, "there is no folder above it")
        super().makedirs(path, exist_ok=exist_ok)

    def mv(self, path1, path2, **kwargs):
        if os.path.exists(path2):
            raise DriveError(errno.EEXIST, "it is there")
        os.rename(path1, path2)


for kind in (FaultyFileSystem, FarFileSystem, ShareFileSystem):
    fsspec.register_implementation(kind.protocol[0], kind, clobber=True)


def fresh_faults(monkeypatch):
    """A fixture: the faults of this test, which end with it."""
    found = Faults()
    monkeypatch.setattr(FaultyFileSystem, "faults", found)
    yield found
    found.hangs.clear()
    found.slow = 0.0
