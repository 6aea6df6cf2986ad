"""Run contestants in processes of their own, one lap at a time and in turns, so that noise meets all of them alike.

A contestant is a process that uses `Laps`. Its memory is its own, and no two contestants compute at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .laps import TURN
from .turns import rotated


def environment(threads: int) -> dict[str, str]:
    """Return what every contestant's process is started with; MKL and OpenMP read it before torch is imported."""
    return {
        **os.environ,
        "MKL_CBWR": "AUTO",  # else MKL picks its code path by a buffer's alignment, and bits differ
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of a waiting process would cost the running one its core
        "HF_HUB_OFFLINE": "1",
    }


def command_of(python: Path | str, name: str, *more: object) -> list[str]:
    """Start this benchmark again as one of its contestants, with the arguments that it was given, and more."""
    script, *arguments = sys.argv
    return [str(python), str(Path(script).resolve()), *arguments, "--contestant", name, *map(str, more)]


class Contestant:
    """The parent's handle of one contestant's process."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self.failed: str | None = None
        self.laps: list[dict[str, Any]] = []
        # What libraries say is of interest only where a contestant fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(threads),
        )

    def turn(self) -> dict[str, Any] | None:
        """Let it run one lap; None once it failed."""
        if self.failed is not None:
            return None
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(TURN)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        message = json.loads(line) if line else {"failed": f"ended with code {self.process.wait()}"}
        if "failed" in message:
            self.failed = message["failed"]
            self._show_log()
            return None
        self.laps.append(message)
        return message

    def _show_log(self) -> None:
        self._log.seek(0)
        lines = self._log.read().splitlines()
        print(f"\n{self.name} failed: {self.failed}", *lines[-4:], sep="\n    ", file=sys.stderr)

    def seconds(self, label: str, clock: str = "seconds") -> list[float]:
        """Return the seconds of all laps of that name; the clock "cpu_seconds" counts all of the process's threads."""
        return [lap[clock] for lap in self.laps if lap["lap"] == label]

    def last(self) -> Mapping[str, Any]:
        """Return what was told at the end of the last lap, memory included."""
        return self.laps[-1] if self.laps else {}

    def close(self) -> None:
        """End the process and wait for it."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def race(commands: Mapping[str, Sequence[str]], laps: int, threads: int, *, settle: int = 0) -> dict[str, Contestant]:
    """Run `settle` laps of each contestant on its own, then `laps` rounds in turns, with all of them alive at once."""
    running = {name: Contestant(name, command, threads) for name, command in commands.items()}
    try:
        for contestant in running.values():
            for _ in range(settle):
                contestant.turn()
        for number in range(laps):
            for contestant in rotated(list(running.values()), number):
                contestant.turn()
            progress(f"round {number + 1} of {laps}")
    finally:
        for contestant in running.values():
            contestant.close()
    progress("")
    return running


def solo(name: str, command: Sequence[str], laps: int, threads: int) -> Contestant:
    """Run one contestant alone, with nobody else's memory maps and caches alive beside it."""
    contestant = Contestant(name, command, threads)
    try:
        for _ in range(laps):
            contestant.turn()
    finally:
        contestant.close()
    return contestant


def must_have_run(*contestants: Contestant) -> None:
    """End the program if one of them failed."""
    for contestant in contestants:
        if contestant.failed is not None:
            sys.exit(f"{contestant.name} failed: {contestant.failed}")


def progress(text: str) -> None:
    """Show one changing line on stderr, where that is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text:<60}" if text else "\r" + " " * 60 + "\r")
        sys.stderr.flush()


def drop_from_cache(path: Path) -> None:
    """Make the system forget a file's pages, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(path: Path) -> None:
    """Read a file once, so that nobody is the first."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def difference(one: Path, other: Path) -> float | None:
    """Return the largest absolute difference between two saved tensors; None where one is missing."""
    if not one.is_file() or not other.is_file():
        return None
    import torch  # here, as a contestant may have to do something before torch is imported

    a, b = (torch.load(path, weights_only=True).float() for path in (one, other))
    return float((a - b).abs().max())


def slug(name: str) -> str:
    """Turn a contestant's name into one for a file."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)
