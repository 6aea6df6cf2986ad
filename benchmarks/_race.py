"""Runs contestants in processes of their own, one lap at a time and in turns, so that noise meets all of them alike.

A contestant is a process that uses `Laps`: it waits for its turn, runs one timed lap (a load, a step), tells the
seconds, and waits again. Its memory is its own, and no two contestants compute at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from demo.memory import AnonymousPeak, peak_rss

TURN = "turn\n"


def environment(threads: int) -> dict[str, str]:
    """What every contestant's process is started with; MKL and OpenMP read it before torch is imported."""
    return {
        **os.environ,
        "MKL_CBWR": "AUTO",  # else MKL picks its code path by a buffer's alignment, and bits differ
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of a waiting process would cost the running one its core
        "HF_HUB_OFFLINE": "1",
    }


# -- in the contestant's process


class Laps:
    """The contestant's side. Make it before anything that prints."""

    def __init__(self) -> None:
        # Libraries print to stdout; the line to the parent is a copy of it, and theirs leads to stderr.
        self._line = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._label, self._rss = "", 0
        self._began = self._began_cpu = self._seconds = self._cpu_seconds = 0.0
        self._anonymous: AnonymousPeak | None = None
        self.begun_rss, self.begun_anonymous = 0, None

    def begin(self, label: str) -> None:
        """Wait for this contestant's turn and start the clock."""
        if sys.stdin.readline() != TURN:
            raise SystemExit(0)  # the parent needs no more of us, or is gone
        if not self.begun_rss:
            self.begun_rss = psutil.Process().memory_info().rss
            self._anonymous = AnonymousPeak()
            self.begun_anonymous = self._anonymous.peak
            self._anonymous.start()
        self._label, self._began_cpu, self._began = label, time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Stop the clock; the turn goes on."""
        self._seconds = time.perf_counter() - self._began
        self._cpu_seconds = time.process_time() - self._began_cpu
        self._rss = psutil.Process().memory_info().rss

    def tell(self, **more: Any) -> None:
        """End the turn and say how long it took."""
        self._send(
            lap=self._label,
            seconds=self._seconds,
            cpu_seconds=self._cpu_seconds,
            rss=self._rss,
            begun_rss=self.begun_rss,
            peak_rss=peak_rss(),
            begun_anonymous=self.begun_anonymous,
            peak_anonymous=self._anonymous.peak if self._anonymous is not None else None,
            **more,
        )

    @contextlib.contextmanager
    def lap(self, label: str) -> Iterator[None]:
        """One timed turn."""
        self.begin(label)
        yield
        self.stop()
        self.tell()

    def fail(self, error: BaseException) -> None:
        """Say why this contestant cannot go on."""
        text = str(error).strip().splitlines() or [""]
        self._send(failed=f"{type(error).__name__}: {text[0]}")

    def _send(self, **message: Any) -> None:
        self._line.write(json.dumps(message) + "\n")


def contest(body: Callable[[Laps], None]) -> int:
    """Run a contestant's body to its end; whatever it raises is told to the parent."""
    laps = Laps()
    try:
        body(laps)
    except Exception as error:
        import traceback

        traceback.print_exc()
        laps.fail(error)
    return 0


# -- in the parent


class Contestant:
    """The parent's handle of one contestant's process."""

    def __init__(self, name: str, command: Sequence[str], threads: int) -> None:
        self.name = name
        self.failed: str | None = None
        self.laps: list[dict[str, Any]] = []
        # What libraries say is of interest only where a contestant fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(
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
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(TURN)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        message = json.loads(line) if line else {"failed": f"ended with code {self._process.wait()}"}
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
        """The seconds of all laps of that name; clock "cpu_seconds": of all the process's threads."""
        return [lap[clock] for lap in self.laps if lap["lap"] == label]

    def last(self) -> Mapping[str, Any]:
        """What was told at the end of the last lap, memory included."""
        return self.laps[-1] if self.laps else {}

    def close(self) -> None:
        """End the process and wait for it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def race(commands: Mapping[str, Sequence[str]], laps: int, threads: int, *, settle: int = 0) -> dict[str, Contestant]:
    """All contestants alive at once: `settle` laps each on its own, then `laps` rounds in turns.

    The order is turned by one each round, so nobody always follows the same neighbour.
    """
    running = {name: Contestant(name, command, threads) for name, command in commands.items()}
    try:
        for contestant in running.values():
            for _ in range(settle):
                contestant.turn()
        order = list(running.values())
        for round_ in range(laps):
            for contestant in order[round_ % len(order) :] + order[: round_ % len(order)]:
                contestant.turn()
            progress(f"round {round_ + 1} of {laps}")
    finally:
        for contestant in running.values():
            contestant.close()
    progress("")
    return running


def solo(name: str, command: Sequence[str], laps: int, threads: int) -> Contestant:
    """One contestant alone: nobody else's memory maps or caches are alive beside it."""
    contestant = Contestant(name, command, threads)
    try:
        for _ in range(laps):
            contestant.turn()
    finally:
        contestant.close()
    return contestant


def progress(text: str) -> None:
    """One changing line on stderr, where that is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text:<60}" if text else "\r" + " " * 60 + "\r")
        sys.stderr.flush()


def drop_from_cache(path: Path) -> bool:
    """Make the system forget a file's pages, so that the next read comes from the disk. False where it cannot."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def read_into_cache(path: Path) -> None:
    """Read a file once, so that nobody is the first."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def difference(one: Path, other: Path) -> float | None:
    """Largest absolute difference between two saved tensors; None where one is missing."""
    if not one.is_file() or not other.is_file():
        return None
    a, b = (torch.load(path, weights_only=True).float() for path in (one, other))
    return float((a - b).abs().max())
