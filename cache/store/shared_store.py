"""Outputs in a place that several machines share. Whatever happens there, nobody here waits long, and nothing fails.

Entries have the bytes of the disk tier's (disk_format.py). Nobody who reads removes one: it may be another's, and right
for them. What is damaged is written anew by whoever makes that output next.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ...ops.ledger import Ledger, first_line, in_words
from ..disk_format import Description, NotStorable, Stopped, keyed_hash, plain_hash, read_outputs, read_record, write
from .breaker import LONGEST_PAUSE, Breaker
from .place import NoDriver, Place
from .reads import Reserved, Stoppable
from .tidy import going
from .waiting import Waiting
from .workers import Workers

# Threads that ask. With one alone, the questions about a workflow's nodes would wait for each other.
ASK_AT_ONCE = 8
# Bytes that may wait to be written, which are copies in RAM.
QUEUE_BYTES = 1 << 30
# The store is listed anew, for what others wrote, after this time and when this process wrote this part of the cap.
LIST_EVERY_SECONDS = 600.0
LIST_EVERY_PART = 20
MAX_BAD = 10_000
# The answer to a question that got none in time.
LATE = object()


@dataclass
class Counts:
    """What this process did with the store. late: questions that got no answer in time. refused: damaged or forged."""

    found: int = 0
    missed: int = 0
    saved_seconds: float = 0.0
    read_bytes: int = 0
    late: int = 0
    refused: int = 0
    written: int = 0
    written_bytes: int = 0
    evicted: int = 0
    evicted_bytes: int = 0


@dataclass(frozen=True)
class Options:
    """key: nobody reads or forges an entry who has another one; "" for none. least_seconds: that an output must have
    taken. wait_seconds: the most that a prompt waits. cap, days: of the store, 0 for no limit.
    """

    address: str
    key: str = field(default="", repr=False)
    least_seconds: float = 10.0
    wait_seconds: float = 5.0
    cap: int = 0
    days: float = 0.0


class SharedStore:
    """Asks a place for outputs and writes them there. Nothing here raises.

    room: tells how much RAM may be taken.
    """

    def __init__(self, options: Options, ledger: Ledger, room: Callable[[], int] = lambda: 1 << 62) -> None:
        self.options = options
        self.ledger = ledger
        self.reserved = Reserved(room)
        self.place = Place(options.address)
        self.counts = Counts()
        self.waiting = Waiting(options.wait_seconds)
        self.reads, self.writes = Breaker(), Breaker()
        self._key = options.key.encode("utf-8", "surrogateescape")
        self._seal = keyed_hash(self._key) if self._key else plain_hash
        self._workers = Workers(ASK_AT_ONCE, "spillway-shared-store")
        self._bad: set[str] = set()
        self._for_others: set[str] = set()  # right for them, and not asked for again
        self._too_slow: dict[str, float] = {}  # when it was
        self._held: int | None = None  # bytes in the store, as far as this process knows
        self._listed = 0.0
        self._since = 0  # bytes written since
        self._full = False  # so it was when it was listed, and nothing could be removed

    @property
    def waiting_cap(self) -> int:
        """The most bytes that may wait to be written."""
        return QUEUE_BYTES

    @property
    def state(self) -> str | None:
        """Say what is wrong. None while all is well."""
        return self.reads.why or self.writes.why

    def as_dict(self) -> dict[str, Any]:
        """Return figures, ready for JSON."""
        return {"address": str(self.place), "state": self.state, "waited_seconds": self.waiting.spent} | asdict(
            self.counts
        )

    def begin_prompt(self) -> None:
        """Begin a prompt, which may wait anew."""
        self.waiting = Waiting(self.options.wait_seconds)

    def name(self, plain: str) -> str:
        """Return the name of an entry for members that have this key. Those of another key have other names."""
        return hmac.new(self._key, plain.encode(), "sha256").hexdigest() if self._key else plain

    # -- reading

    async def there(self, name: str) -> bool:
        """Say whether an entry is there. False too where nobody says so in time, or it took too long to read."""
        if name in self._for_others:
            return False
        if time.monotonic() - self._too_slow.get(name, -LONGEST_PAUSE) < LONGEST_PAUSE:
            return False
        return await self._ask(lambda _: self.place.size(name)) not in (None, LATE)

    async def load(self, name: str) -> tuple[Any, float, Any] | None:
        """Read (outputs, seconds they took to make, stamps). None where none that is whole and sealed comes in time."""
        found = await self._ask(lambda stop: self._read(name, stop))
        if found is LATE:  # else each prompt would wait for it in vain
            self._too_slow[name] = time.monotonic()
        if found is LATE or found is None:
            return None
        outputs, record = found
        self.counts.found += 1
        self.counts.read_bytes += record.nbytes
        self.counts.saved_seconds += record.seconds
        self.waiting.saved(record.seconds)
        return outputs, record.seconds, record.stamps

    def _read(self, name: str, stop: Callable[[], bool]) -> Any:
        """Run in a worker. Raises OSError where the place fails, and Stopped."""
        try:
            with self.place.open(name) as opened:
                file: Any = Stoppable(opened, stop)
                record = read_record(file, name, self._seal)
                with self.reserved.of(record.nbytes) as fits:
                    if not fits:
                        more = "more than is free beside what is being read"
                        self.ledger.decide(f"{record.kind} is made again: its {in_words(record.nbytes)} are {more}")
                        return None
                    outputs = read_outputs(file, record)
            with contextlib.suppress(OSError):  # a member that may only read keeps no time of use
                self.place.touch(name)
            return outputs, record
        except FileNotFoundError:  # it may have been evicted while it was read
            return None
        except (OSError, NoDriver, Stopped):
            raise
        except Exception as error:  # however it is damaged, the node makes it again
            self.refuse(name, first_line(error))
            return None

    def refuse(self, name: str, why: str, *, damaged: bool = True) -> None:
        """Note that an entry cannot be used here. Where it is damaged, the next one of its name takes its place."""
        self.counts.refused += 1
        noted = self._bad if damaged else self._for_others
        if len(noted) < MAX_BAD:
            noted.add(name)
        self.ledger.decide_once(f"an entry is not used: {why} ({name[:12]})")

    async def _ask(self, work: Callable[[Callable[[], bool]], Any]) -> Any:
        """Have a worker ask, for as long as the prompt may still wait. None where that brings nothing, LATE in time.

        work: is given what tells it that nobody waits for it any more.
        """
        left = self.waiting.left
        if left <= 0 or not self.reads.allows():
            return None
        breaker, answered, over = self.reads, False, threading.Event()
        future = self._workers.submit(lambda: work(over.is_set))
        try:
            with self.waiting.counted():
                found = await asyncio.wait_for(asyncio.wrap_future(future), left)
            answered = True
        except asyncio.TimeoutError:
            self.counts.late += 1
            answered = True
            self._failed(breaker, f"no answer within {self.options.wait_seconds:g} s", at_once=True)
            return LATE
        except (OSError, NoDriver) as error:
            answered = True
            self._failed(breaker, self._words(error), at_once=isinstance(error, NoDriver))
            return None
        finally:
            over.set()
            if not answered:
                breaker.given_up()
        self._succeeded(breaker)
        return found

    # -- writing

    def store(
        self, name: str, outputs: Description, *, seconds: float, kind: str, stamps: Any, stop: Callable[[], bool]
    ) -> bool:
        """Write a described output, in the writer's thread. Returns whether it was written."""
        if not self.writes.allows():
            return False
        answered = False
        try:
            about = {"name": name, "kind": kind, "seconds": seconds, "stamps": stamps}
            written = self._write(name, outputs, about, stop)
            answered = True
        except (NotStorable, Stopped):
            return False
        except Exception as error:
            answered = True
            self._failed(self.writes, f"it cannot be written to: {self._words(error)}")
            return False
        finally:
            if not answered:
                self.writes.given_up()
        self._succeeded(self.writes)
        return written

    def _write(self, name: str, found: Description, about: dict[str, Any], stop: Callable[[], bool]) -> bool:
        if name not in self._bad and self.place.size(name) is not None:
            return False  # another member was faster
        if not self._make_room(found.nbytes):
            return False
        sizes: list[int] = []
        self.place.put(name, lambda file: sizes.append(write(file, found, about, stop, self._seal)))
        self._bad.discard(name)
        self._held = (self._held or 0) + sizes[0]
        self._since += sizes[0]
        self.counts.written += 1
        self.counts.written_bytes += sizes[0]
        took = f"which took {about['seconds']:.1f} s to make"
        self.ledger.decide(f"wrote {about['kind']}, {in_words(found.nbytes)}, {took}")
        return True

    def _make_room(self, more: int) -> bool:
        """Remove what is too old or too much. Returns whether `more` bytes may be written."""
        cap, days = self.options.cap, self.options.days
        if not cap and not days:
            return True
        if cap and more > cap:
            self.ledger.decide_once(f"{in_words(more)} are more than the store may hold ({in_words(cap)})")
            return False
        due = self._held is None or time.monotonic() - self._listed > LIST_EVERY_SECONDS
        due = due or bool(cap and self._since * LIST_EVERY_PART > cap)
        if due or (cap and self._held is not None and self._held + more > cap and not self._full):
            files = self.place.files()
            held = sum(file.nbytes for file in files)
            gone = [file for file in going(files, cap, days, time.time(), more) if self._remove(file.path)]
            freed = sum(file.nbytes for file in gone)
            self._held, self._listed, self._since = held - freed, time.monotonic(), 0
            self.counts.evicted += len(gone)
            self.counts.evicted_bytes += freed
            if gone:
                self.ledger.decide(f"evicted {len(gone)} entries, {in_words(freed)}, from {self.place}")
        self._full = bool(cap and self._held is not None and self._held + more > cap)
        if self._full:
            self.ledger.decide_once(f"{self.place} is full, and nothing in it can be removed: nothing more is written")
            return False
        return True

    def _remove(self, path: str) -> bool:
        try:
            return self.place.remove(path)
        except OSError as error:  # it is open on Windows, or this member may not
            self.ledger.decide_once(f"an entry cannot be removed: {self._words(error)}", level=logging.DEBUG)
            return False

    # -- trouble

    def _words(self, error: BaseException) -> str:
        """Word an error without the secrets that an address may hold."""
        return self.place.without_secrets(f"{type(error).__name__}: {first_line(error)}")[:300]

    def _failed(self, breaker: Breaker, why: str, *, at_once: bool = False) -> None:
        if breaker.failed(why, at_once=at_once):
            what = "read" if breaker is self.reads else "written"
            self.ledger.decide(f"{self.place}: {why}: nothing is {what} there for a while", level=logging.WARNING)

    def _succeeded(self, breaker: Breaker) -> None:
        if breaker.succeeded():
            self.ledger.decide(f"{self.place} answers again")
