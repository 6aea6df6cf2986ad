"""Writes outputs in a thread of its own, so that nobody who evicts or computes waits for a disk or a network."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..ops.ledger import Ledger, in_words
from .disk_format import Description
from .give_up import Grip

# How long the end of the process waits for what is still to be written.
EXIT_SECONDS = 10.0

_writers: weakref.WeakSet[DiskWriter] = weakref.WeakSet()


class Tier(Protocol):
    """Where outputs are written to. `store` returns whether it wrote one, and raises nothing."""

    @property
    def waiting_cap(self) -> int: ...

    def store(
        self, name: str, outputs: Any, *, seconds: float, kind: str, stamps: Any, stop: Callable[[], bool]
    ) -> bool: ...


@dataclass(eq=False)
class Job:
    """An output to write, or its description. nbytes: RAM that is free when nothing here holds it any more."""

    tier: Tier
    name: str
    outputs: Any
    seconds: float
    kind: str
    stamps: Any
    nbytes: int
    stop: threading.Event = field(default_factory=threading.Event)


class DiskWriter:
    """A queue of outputs, bounded in bytes by their tier, and the thread that writes them.

    An output in the queue is still in RAM, and can be found here. Where RAM is short it is dropped instead of written.
    The thread ends when nothing is left to write. what: names the tier. written, dropped: outputs so far.
    """

    def __init__(self, ledger: Ledger, what: str = "disk tier") -> None:
        self.ledger = ledger
        self.what = what
        self.written = 0
        self.dropped = 0
        self._waiting: dict[str, Job] = {}
        self._waiting_bytes = 0
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._changed = threading.Condition()
        _writers.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of RAM that become free when everything is written."""
        with self._changed:
            return self._waiting_bytes + (self._current.nbytes if self._current is not None else 0)

    def _jobs(self) -> list[Job]:
        return [*self._waiting.values(), *([self._current] if self._current is not None else [])]

    def _pop(self, name: str) -> Job | None:
        job = self._waiting.pop(name, None)
        self._waiting_bytes -= job.nbytes if job is not None else 0
        return job

    def put(self, job: Job) -> None:
        """Queue an output. It is dropped where the queue is full."""
        with self._changed:
            self._pop(job.name)
            if self._closed or self.nbytes + job.nbytes > job.tier.waiting_cap:
                self._say_dropped([job], "as much as the tier may hold is waiting already")
                return
            self._waiting[job.name] = job
            self._waiting_bytes += job.nbytes
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"spillway-{self.what.replace(' ', '-')}", daemon=True
                )
                self._thread.start()

    def take_back(self, name: str) -> tuple[Any, float, Any] | None:
        """Return (outputs, seconds, stamps) of an output that is not written yet; None where there is none.

        One that still waits is then not written: it will be when it is evicted again.
        """
        with self._changed:
            job = self._pop(name)
            if job is None and self._current is not None and self._current.name == name:
                job = self._current
                job.nbytes = 0  # whoever asked holds it now
            self._changed.notify_all()
            return (job.outputs, job.seconds, job.stamps) if job is not None else None

    def drop(self, nbytes: int) -> int:
        """Give up writing until that many bytes are free. What took the fewest seconds for its bytes goes first.

        Returns the bytes.
        """
        with self._changed:
            going: list[Job] = []
            freed = 0
            for job in sorted(self._waiting.values(), key=lambda job: job.seconds / max(1, job.nbytes)):
                if freed >= nbytes:
                    break
                self._pop(job.name)
                going.append(job)
                freed += job.nbytes
            if freed < nbytes and self._current is not None and not self._current.stop.is_set():
                self._current.stop.set()
                going.append(self._current)
                freed += self._current.nbytes
            if going:
                self._say_dropped(going, "RAM is short")
            self._changed.notify_all()
            return freed

    def _say_dropped(self, jobs: list[Job], why: str) -> None:
        self.dropped += len(jobs)
        size = in_words(sum(job.nbytes for job in jobs))
        self.ledger.decide(f"{self.what}: {len(jobs)} outputs ({size}) are lost instead of written: {why}")

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until everything is written. Returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs(), seconds)

    def close(self, seconds: float) -> None:
        """Write what is left for as long as that, and give up the rest."""
        with self._changed:
            self._closed = True
            jobs = self._jobs()
            if jobs:
                size = in_words(sum(job.nbytes for job in jobs))
                self.ledger.decide(f"{self.what}: writing {len(jobs)} outputs ({size}) before the end")
        if not self.wait(seconds):
            with self._changed:
                self._say_dropped(self._jobs(), "the process ends")
                self._waiting.clear()
                self._waiting_bytes = 0
                if self._current is not None:
                    self._current.stop.set()
            self.wait(seconds)

    def _run(self) -> None:
        grip = None
        while True:
            with self._changed:
                self._current = None
                if grip is not None:
                    grip.let_go()
                    grip = None
                self._changed.notify_all()
                if not self._waiting:
                    self._thread = None
                    return
                job = self._waiting[next(iter(self._waiting))]
                self._current = self._pop(job.name)
            try:
                self.written += job.tier.store(
                    job.name,
                    job.outputs,
                    seconds=job.seconds,
                    kind=job.kind,
                    stamps=job.stamps,
                    stop=job.stop.is_set,
                )
            except BaseException as error:  # this thread is nobody's: there is no one to tell but the log
                self.ledger.decide_once(f"{self.what}: writing {job.kind} failed ({error})")
            grip = Grip(job.outputs.tensors if isinstance(job.outputs, Description) else job.outputs)
            del job  # else this would keep the output until the next one


@atexit.register
def _finish() -> None:
    for writer in list(_writers):
        writer.close(EXIT_SECONDS)
