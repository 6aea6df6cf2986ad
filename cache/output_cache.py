"""Keeps node outputs with the seconds that they cost and the bytes that they hold, and evicts when RAM is short."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from ..ops.ledger import Ledger, in_words
from ..ops.ram import allocator, shortage
from ..ops.ram.arena_log import arenas_logged
from ..ops.ram.available import Available, available_ram, refusing_limit
from ..ops.ram.garbage import collect_garbage
from .choose import Candidates, choose
from .disk_writer import DiskWriter
from .eviction import ALL, Eviction, Taken
from .expendable import Expendable, Kind
from .give_up import Grip
from .holdings import Entry, Holdings, never_equal
from .measure import Getter, Measurer
from .runs import Run

# Bytes that an entry's Python objects take, above all its key. No measurement finds them.
ENTRY_BYTES = 16 << 10
MAX_ENTRIES = 10_000
# Freed memory shows in the system's figures at once. Where it does not, another process took it. Without this limit the
# whole cache would go for that process.
ROUNDS = 3
# Seconds to make again, from which on a user hears of an eviction.
COSTS_SOMETHING = 5.0
# Prompts of which the figures are kept.
RUNS = 20


class OutputCache:
    """The engine of the output cache. Keys are hashable, values are of any kind. A lookup is `values.get(key)`.

    headroom: bytes of RAM to keep available. cap: the most bytes of RAM that the entries may hold, None for as many as
    the headroom leaves. run, runs: what it did in the running prompt, and in those before. available: tells how many
    bytes there are. on_evict: is called with (entry, value, bytes of RAM that go with it) before a value goes. It may
    queue the value with `writer`. writers: that one, and those of others, whose queues give way when RAM is short.
    """

    def __init__(
        self,
        headroom: int,
        *,
        getters: Iterable[Getter] = (),
        available: Callable[[], Available] = available_ram,
        ledger: Ledger | None = None,
        on_evict: Callable[[Entry, Any, int], None] | None = None,
        entry_bytes: int = ENTRY_BYTES,
    ) -> None:
        self.headroom = headroom
        self.cap: int | None = None
        self.run = Run()
        self.runs: deque[Run] = deque(maxlen=RUNS)
        self.available = available
        self.ledger = ledger or Ledger("output cache")
        self.on_evict = on_evict
        self.writer = DiskWriter(self.ledger)
        self.writers = [self.writer]
        self.entry_bytes = entry_bytes
        self.measurer = Measurer(getters)
        self.lock = threading.RLock()
        self.prompt = 0
        self.evicted = 0
        self.freed_bytes = 0
        self.values: dict[Hashable, Any] = {}
        self.holdings = Holdings()
        self.kinds: defaultdict[str, Kind] = defaultdict(Kind)
        self._expendable = Expendable(self.holdings, self.kinds, entry_bytes)
        self.protected: set[Hashable] = set()
        self._needed: Callable[[], Collection[Hashable]] = tuple  # as `relieve` was told last
        shortage.register(self)

    @property
    def entries(self) -> dict[Hashable, Entry]:
        """The record of each value, by key."""
        return self.holdings.entries

    # -- told by the executor

    def begin_prompt(self, keys: Collection[Hashable]) -> None:
        """Begin a prompt that consists of these keys. It uses their entries; all others become one prompt older.

        Unfindable entries of earlier prompts go at once.
        """
        with self.lock:
            self.prompt += 1
            if self.run != Run():
                self.runs.append(self.run)
                self.ledger.decide(f"the last run {self.run.words}", level=logging.DEBUG)
                self.run = Run()
            for key in keys:
                self.touch(key)
            for entry in [entry for entry in self.entries.values() if entry.unfindable and entry.used < self.prompt]:
                self._remove(entry)

    def touch(self, key: Hashable) -> None:
        """Note that the running prompt uses this key."""
        entry = self.entries.get(key)
        if entry is not None and entry.used < self.prompt:
            entry.used = self.prompt
            entry.hits += 1
            self.run.found(entry.added, entry.seconds)
            if entry.hits == 1:
                self.kinds[entry.kind].reused += 1

    def put(
        self,
        key: Hashable,
        value: Any,
        outputs: Any,
        *,
        seconds: float = 0.0,
        kind: str = "",
        label: str = "",
        parents: Iterable[Hashable] = (),
        found: bool = False,
    ) -> Entry:
        """Store a value. outputs: its part that holds memory. seconds: the time to make it, without its parents.

        found: it was not made now, but found elsewhere, such as on disk.
        """
        blocks = self.measurer.blocks(outputs)
        with self.lock:
            old = self.entries.get(key)
            if old is not None:
                self._remove(old)
            ids = tuple(dict.fromkeys(hash(parent) for parent in parents))
            entry = Entry(key, kind, label, seconds, ids, tuple(blocks), self.prompt, self.prompt)
            entry.unfindable = never_equal(key)
            if old is not None:
                entry.hits = old.hits
            else:
                self.kinds[kind].made += 1
            self.holdings.add(entry, blocks)
            self.kinds[kind].ram = entry.added
            if found:
                self.run.found(entry.added, seconds)
            else:
                self.run.made(entry.added, seconds)
            self.values[key] = value
            return entry

    def seconds_of(self, key: Hashable) -> float:
        """Return the seconds that making a key's value took, also after it was evicted. 0 where that is not known."""
        entry = self.entries.get(key)
        if entry is not None:
            return entry.seconds
        ghost = self.holdings.ghosts.get(hash(key))
        return ghost.seconds if ghost is not None else 0.0

    def expected_bytes(self, key: Hashable, kind: str) -> int:
        """Estimate the RAM that making a key's value will take: as much as before, or as the last of its kind."""
        ghost = self.holdings.ghosts.get(hash(key))
        return ghost.ram if ghost is not None else self.kinds[kind].ram if kind in self.kinds else 0

    def drop(self, key: Hashable) -> None:
        """Remove an entry. Nothing is told, written to disk or remembered of it."""
        with self.lock:
            entry = self.entries.get(key)
            if entry is not None:
                self._remove(entry)

    def clear(self) -> int:
        """Remove all entries. Returns the bytes that they held."""
        with self.lock:
            held = self.ram_bytes()
            for entry in list(self.entries.values()):
                self._remove(entry)
            self.protected.clear()
        self._give_back(models=True)
        return held

    def protect(self, outputs: Any, keep: bool = True) -> int:
        """Never evict entries that hold any of these outputs' memory; with keep=False, allow it again.

        Returns the bytes of RAM that the outputs hold.
        """
        blocks = self.measurer.blocks(outputs)
        with self.lock:
            (self.protected.update if keep else self.protected.difference_update)(blocks)
        return sum(block.ram for block in blocks.values())

    # -- figures

    def ram_bytes(self) -> int:
        """Add up the RAM that the entries hold, in bytes. Each block counts once."""
        with self.lock:
            return sum(block.ram for block in self.holdings.blocks.values()) + self.entry_bytes * len(self.entries)

    def vram_bytes(self) -> int:
        """Add up the device memory that the entries hold, in bytes. Each block counts once."""
        with self.lock:
            return sum(block.vram for block in self.holdings.blocks.values())

    def largest(self, count: int) -> list[dict[str, Any]]:
        """List the entries that hold the most RAM, ready for JSON. Shared blocks count for each of their holders."""
        with self.lock:
            return self.holdings.largest(count, self.prompt, self.protected)

    def as_dict(self, largest: int = 10) -> dict[str, Any]:
        """Return figures, the largest entries and the last decisions, ready for JSON."""
        return {
            "entries": len(self.entries),
            "ram_bytes": self.ram_bytes(),
            "vram_bytes": self.vram_bytes(),
            "headroom_bytes": self.headroom,
            "cap_bytes": self.cap,
            "run": self.run.as_dict(),
            "runs": [run.as_dict() for run in self.runs],
            "evicted_entries": self.evicted,
            "evicted_bytes": self.freed_bytes,
            "writing_bytes": self.writer.nbytes,
            "written_entries": self.writer.written,
            "unwritten_entries": self.writer.dropped,
            "largest": self.largest(largest),
            "decisions": list(self.ledger.decisions)[-20:],
        }

    # -- eviction

    def relieve(self, target: int, needed: Callable[[], Collection[Hashable]] = tuple, *, current: bool = True) -> int:
        """Evict until `target` bytes of RAM are available, and no more than the cap is held. Returns the bytes freed.

        needed: tells which keys the running prompt will still read. current: False spares all entries of this prompt.
        What is being written to disk counts as freed, as long as half of the headroom is available without it.
        """
        freed = 0
        with self.lock:
            self._needed = needed
            for _ in range(ROUNDS):
                state = self.available()
                short = target - state.available - self.writer.nbytes
                surplus = len(self.entries) - MAX_ENTRIES
                if short <= 0 and surplus <= 0:
                    break
                if short <= 0:
                    short = surplus * self.entry_bytes
                eviction = self.evict(short, needed(), current=current, reason=state.reason)
                freed += eviction.freed
                if not eviction.entries:
                    break
            freed += self._obey_the_cap(needed)
            if current and any(writer.nbytes for writer in self.writers):
                self._hurry(target - self.headroom // 2)
        return freed

    def _obey_the_cap(self, needed: Callable[[], Collection[Hashable]]) -> int:
        """Evict what the cache holds beyond its cap. What the running prompt will still read stays, as RAM is free."""
        over = 0 if self.cap is None else self.ram_bytes() - self.cap
        if over <= 0:
            return 0
        reason = f"the cap of {in_words(self.cap or 0)} on cached outputs"
        return self.let_go(self.take(over, needed(), reason=reason, spare_needed=True)).freed

    def give_ram(self, nbytes: int) -> int:
        """Evict for an allocation that the system has refused. Returns the bytes that this freed."""
        # Do not wait. Who holds the lock may be freeing a model, and wait for a lock that the caller holds.
        if not self.lock.acquire(blocking=False):
            return 0
        try:
            limit = refusing_limit()
            return self.evict(nbytes, self._needed(), reason=f"memory was refused by {limit.reason}").freed
        finally:
            self.lock.release()

    def _hurry(self, least: int) -> None:
        """Drop what waits to be written where less than that is available. A disk may take minutes for it."""
        short = least - self.available().available
        if short <= 0:
            return
        dropped = 0
        for writer in reversed(self.writers):  # copies for a shared store before what is nowhere else
            dropped += writer.drop(short - dropped) if short > dropped else 0
        if dropped:
            allocator.trim()

    def relieve_device(self, device: str, short: int, needed: Callable[[], Collection[Hashable]] = tuple) -> int:
        """Evict outputs whose tensors lie on a device until `short` bytes of it are freed. Returns the bytes freed.

        device: as torch writes it. What the running prompt will still read stays, as weights can give way to it.
        """
        with self.lock:
            held = [(entry, self.holdings.bytes_on(device, entry)) for entry in self.entries.values()]
            if short <= 0 or not any(nbytes for _, nbytes in held):
                return 0
            spared, stay = set(needed()), self._protected_entries()
            candidates = Candidates()
            for entry, nbytes in held:
                if nbytes and entry.key not in spared and id(entry) not in stay:
                    chance = 1.0 if entry.hits else self.kinds[entry.kind].chance
                    candidates.add((entry,), nbytes, self._expendable.seconds(entry), self.prompt - entry.used, chance)
            going = [candidates.entries[place][0] for place in choose(candidates, short)]
            taken = self._take(going, short, f"a model needs the room on {device}", self.vram_bytes)
        return self.let_go(taken).freed

    def evict(
        self, short: int, needed: Collection[Hashable] = (), *, current: bool = True, reason: str = "asked for"
    ) -> Eviction:
        """Evict entries until `short` bytes are freed, and give the memory back to the system."""
        return self.let_go(self.take(short, needed, current=current, reason=reason))

    def take(
        self,
        short: int,
        needed: Collection[Hashable] = (),
        *,
        current: bool = True,
        reason: str = "asked for",
        spare_needed: bool = False,
    ) -> Taken:
        """Take entries out of the cache as `evict` does, but leave their memory to `let_go`, which takes time.

        spare_needed: leave what is needed even where all the rest is not enough.
        """
        with self.lock:
            candidates = self.candidates(set(needed), current=current)
            chosen = choose(candidates, short)
            if spare_needed:
                chosen = [place for place in chosen if not candidates.needed[place]]
            going = list(dict.fromkeys(entry for place in chosen for entry in candidates.entries[place]))
            return self._take(going, short, reason, self.ram_bytes)

    def _take(self, going: Sequence[Entry], short: int, reason: str, held: Callable[[], int]) -> Taken:
        """held: tells the bytes of the memory that is wanted. The caller holds the lock."""
        models = any(self.holdings.blocks[key].is_model for entry in going for key in entry.blocks)
        before = held()
        gone = deque(self._evict(entry) for entry in going)
        freed = before - held()
        self.evicted += len(going)
        self.freed_bytes += freed
        self.run.evicted(len(going), freed)
        return Taken(short, freed, reason, gone, models, sum(entry.seconds for entry in going))

    def let_go(self, taken: Taken) -> Eviction:
        """Give up what was taken, one by one: to `on_evict`, and to the system."""
        count, words = len(taken.gone), taken.words
        with arenas_logged(f"evicting {count} outputs") if count else nullcontext():
            while taken.gone:
                entry, value, nbytes = taken.gone.popleft()
                self._tell(entry, value, nbytes)
                grip = Grip(value)
                del value
                grip.let_go()
            if count:
                self._give_back(taken.models)
        if count:
            self.ledger.decide(words)
            if taken.seconds >= COSTS_SOMETHING and taken.short < ALL:  # else somebody asked for it
                self.ledger.notice(f"{words}. They took {taken.seconds:.0f} s to make")
        return Eviction(taken.short, taken.freed, count, words)

    def _tell(self, entry: Entry, value: Any, nbytes: int) -> None:
        if self.on_evict is not None:
            try:
                self.on_evict(entry, value, nbytes)
            except Exception as error:  # memory is short, and only a copy on disk is lost
                self.ledger.decide_once(f"an evicted output was not kept: {error}")

    def candidates(self, needed: Collection[Hashable] = (), *, current: bool = True) -> Candidates:
        """List what could be evicted."""
        self._measure_models()
        return self._expendable.candidates(self.prompt, self._protected_entries(), needed, current=current)

    def _protected_entries(self) -> set[int]:
        return {id(entry) for key in self.protected for entry in self.holdings.holders.get(key, ())}

    def _measure_models(self) -> None:
        for block in self.holdings.blocks.values():
            if block.gauge is not None:
                try:
                    block.ram, block.vram = block.gauge()
                except Exception as error:
                    self.ledger.decide_once(
                        f"the model {block.name} cannot be measured ({error}): its last size holds."
                    )

    def _evict(self, entry: Entry) -> tuple[Entry, Any, int]:
        gone = entry, self.values[entry.key], self.holdings.ram_alone(entry)
        self._remove(entry)
        self.holdings.bury(entry)
        return gone

    def _remove(self, entry: Entry) -> None:
        self.values.pop(entry.key, None)
        self.protected.difference_update(self.holdings.remove(entry))

    def _give_back(self, models: bool) -> None:
        if models:  # its modules refer to each other in cycles, which only the collector frees
            collect_garbage()
        allocator.trim()
