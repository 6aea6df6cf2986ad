"""The times of a machine: its threads, the device's streams, the bus each way, memory and disk.

Nothing waits. Every call returns at once and moves the time of whoever makes it. Work is placed in the order of the
calls, so a thread that is behind in time may still take an earlier gap of the bus.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .devices import Machine
from .hazards import Hazards
from .page_cache import PageCache

COMPUTE, TO_DEVICE, TO_HOST, WAITS = "compute", "bus to device", "bus to host", "waits"


@dataclass
class Span:
    """What was busy from when to when, in seconds."""

    lane: str
    start: float
    end: float
    what: str


@dataclass(eq=False)
class Thread:
    """A thread of the host, and how far it has come."""

    name: str
    at: float = 0.0


@dataclass(eq=False)
class Stream:
    """A stream of the device. at: when all is done that it was given until now.

    What a thread gives it later than now is ahead of what another thread gives it later still, and behind what comes
    before.
    """

    name: str
    at: float = 0.0
    _later: list[tuple[float, float]] = field(default_factory=list)  # (when it is given, until when it takes)

    def ready(self, given: float) -> float:
        """Return when work begins, at the earliest, that is given then."""
        return max(self.at, *(until for when, until in self._later if when <= given), 0.0)

    def give(self, given: float, until: float, now: float) -> None:
        """Give it work that takes until then. now: before which nobody gives it anything any more."""
        self._later.append((given, until))
        self.at = self.ready(now)
        self._later = [(when, until) for when, until in self._later if when > now]

    def end(self) -> float:
        """Return when all is done that it has been given."""
        return max(self.at, *(until for _, until in self._later), 0.0)


class Server:
    """Serves one request at a time, the first to come first. A request takes the gaps that are left after it came."""

    def __init__(self) -> None:
        self._busy: list[list[float]] = []  # [start, end], by time, never touching each other
        self.seconds = 0.0

    def take(self, ready: float, seconds: float) -> list[tuple[float, float]]:
        """Return when the request is served: one stretch, or several around what is there already."""
        self.seconds += seconds
        busy = self._busy
        if not busy or ready >= busy[-1][0]:
            start = max(ready, busy[-1][1]) if busy else ready
            if busy and start == busy[-1][1]:
                busy[-1][1] = start + seconds
            else:
                busy.append([start, start + seconds])
            return [(start, start + seconds)]
        index = max(0, bisect_right(busy, [ready, float("inf")]) - 1)
        taken, at, left = [], ready, seconds
        while left > 0 and index < len(busy):
            start, end = busy[index]
            if at < start:
                part = min(left, start - at)
                taken.append((at, at + part))
                left -= part
            at = max(at, end)
            index += 1
        if left > 0:
            taken.append((at, at + left))
        for start, end in taken:
            insort(busy, [start, end])
        self._join()
        return taken or [(ready, ready)]

    def _join(self) -> None:
        joined: list[list[float]] = []
        for start, end in self._busy:
            if joined and start <= joined[-1][1]:
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        self._busy = joined

    def forget(self, before: float) -> None:
        """Drop what lies before a time at which nobody can ask any more."""
        while len(self._busy) > 1 and self._busy[0][1] <= before:
            del self._busy[0]


@dataclass
class Sums:
    """What the machine has done since the clock began."""

    compute_s: float = 0.0
    math_s: float = 0.0  # the part of it that casts, quantises and patches
    bytes_in: int = 0
    bytes_out: int = 0
    bytes_read: int = 0
    bytes_from_disk: int = 0  # of those
    locked_bytes: int = 0
    waited_s: float = 0.0  # of the launching thread, for the device


@dataclass
class Costs:
    """What calls cost the thread that makes them, in seconds."""

    launch: float = 30e-6  # of a layer: Python and the launch of its kernels
    copy: float = 6e-6
    call: float = 1.5e-6  # an event, a wait


class Clock:
    """The times of one machine. thread: whose time calls move now. cold: whether reads come from the disk."""

    def __init__(self, machine: Machine, costs: Costs | None = None, hazards: bool = False) -> None:
        self.machine = machine
        self.costs = costs or Costs()
        self.host = Thread("launching thread")
        self.thread = self.host
        self.main = Stream("main")
        self.buses = {TO_DEVICE: Server(), TO_HOST: Server()}
        self.memory, self.disk = Server(), Server()
        self.cold = False
        self.pages: PageCache | None = None
        self.sums = Sums()
        self.spans: list[Span] | None = None
        self.hazards = Hazards() if hazards else None

    @contextmanager
    def as_thread(self, thread: Thread) -> Iterator[Thread]:
        """Let calls move the time of another thread."""
        before, self.thread = self.thread, thread
        try:
            yield thread
        finally:
            self.thread = before

    def note(self, lane: str, start: float, end: float, what: str) -> None:
        if self.spans is not None and end > start:
            self.spans.append(Span(lane, start, end, what))

    def call(self, seconds: float | None = None) -> None:
        """Let the current thread spend the time of one call to the driver."""
        self.thread.at += self.costs.call if seconds is None else seconds

    # -- the device

    def compute(self, seconds: float, what: str = "", math: bool = False) -> tuple[float, float]:
        """Launch a computation on the main stream. Return when it begins and ends."""
        if not math:
            self.thread.at += self.costs.launch
        start = max(self.main.at, self.thread.at)
        self.main.at = end = start + seconds
        self.sums.compute_s += seconds
        if math:
            self.sums.math_s += seconds
        self.note(COMPUTE, start, end, what)
        return start, end

    def transfer(
        self, nbytes: int, stream: Stream | None, way: str = TO_DEVICE, pageable: bool = False, what: str = ""
    ) -> tuple[float, float]:
        """Copy over the bus. On the main stream, or from pageable memory, the current thread waits for the end."""
        self.thread.at += self.costs.copy
        rate = self.machine.bus if way == TO_DEVICE else self.machine.back
        if pageable:
            rate = min(rate, self.machine.pageable, self.machine.disk if self.cold else float("inf"))
        on, given = stream or self.main, self.thread.at
        taken = self.buses[way].take(max(on.ready(given), given), nbytes / rate)
        on.give(given, taken[-1][1], self.host.at)
        if stream is None or pageable:
            self.wait_until(taken[-1][1])
        if way == TO_DEVICE:
            self.sums.bytes_in += nbytes
        else:
            self.sums.bytes_out += nbytes
        for start, end in taken:
            self.note(way, start, end, what)
        self.buses[way].forget(self.host.at)
        return taken[0][0], taken[-1][1]

    def wait_until(self, at: float) -> None:
        """Block the current thread until then."""
        thread = self.thread
        if at > thread.at:
            if thread is self.host:
                self.sums.waited_s += at - thread.at
                self.note(WAITS, thread.at, at, WAITS)
            else:
                self.note(f"reads: {thread.name}", thread.at, at, WAITS)
            thread.at = at

    # -- the host

    def read(self, nbytes: int, what: str = "", part: Hashable = None) -> None:
        """Let the current thread copy bytes of a file: from the page cache, or from the disk where that is cold.

        part: of the file, which the page cache has or has not.
        """
        thread, machine = self.thread, self.machine
        start = thread.at
        end = start + nbytes / machine.memcpy
        cold = self.cold or (self.pages is not None and not self.pages.read(part, nbytes))
        server, rate = (self.disk, machine.disk) if cold else (self.memory, machine.memcpy_all)
        self.sums.bytes_from_disk += nbytes * cold
        thread.at = max(end, server.take(start, nbytes / rate)[-1][1])
        server.forget(self.host.at)
        self.sums.bytes_read += nbytes
        self.note(f"reads: {thread.name}", start, thread.at, what)

    def lock(self, nbytes: int) -> None:
        """Let the current thread page-lock memory."""
        start = self.thread.at
        self.thread.at += nbytes / self.machine.locking
        self.sums.locked_bytes += nbytes
        self.note(f"locks: {self.thread.name}", start, self.thread.at, "page-locking")


@dataclass
class Mark:
    """A moment, to count from. at: of the main stream."""

    at: float
    sums: Sums
    buses: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def now(clock: Clock) -> Mark:
        sums = Sums(**vars(clock.sums))
        return Mark(clock.main.at, sums, {way: bus.seconds for way, bus in clock.buses.items()})
