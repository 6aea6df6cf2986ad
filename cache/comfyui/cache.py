"""The output cache as the executors of ComfyUI 0.22 to 0.33 use it."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import comfyui_version
import execution
import nodes
from comfy_execution import caching
from comfy_execution.graph_utils import is_link

from ...ops.ledger import Ledger
from ...ops.never_raises import never_raises
from ..disk_format import is_storable
from ..disk_tier import DiskTier
from ..disk_writer import Job
from ..holdings import Entry
from ..output_cache import OutputCache
from . import stamps, tiers
from .disk import file_name, make_tier
from .provider import asking, register
from .settings import ram_cap
from .sharing import Sharing
from .stamp_book import StampBook
from .store import make_store

GIB = 1 << 30
HISTORY_NEEDS_A_CLIENT = [int(part) for part in comfyui_version.__version__.split(".")[:2]] < [0, 28]
POLICY_NODE = "SpillwayCachePolicy"
# ComfyUI asks for room before each weight that it pins. Free RAM is looked up again after this time only.
ASK_EVERY_SECONDS = 0.05
# The headroom has room for outputs smaller than this.
WORTH_ROOM = 64 << 20


@dataclass(slots=True)
class Prompt:
    """All that the executor told about the nodes of one prompt. The next prompt begins with a new object.

    started: the times of lookups that found nothing. done: nodes that ran or were found. asked: nodes that the executor
    asked for, as it does for all nodes that it will run. expanded: the nodes that a node expanded into.
    """

    started: dict[str, float] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    expanded: dict[str, list[str]] = field(default_factory=dict)


class SpillwayCache(caching.BasicCache):
    """Answers the executor's calls to an output cache. Its values are ComfyUI's named tuples of UI and outputs.

    Nothing that the executor calls raises: an output that is not kept is made again.
    """

    def __init__(
        self, key_class: Any, engine: OutputCache, executor_headroom: int = 0, inactive_headroom: int | None = None
    ) -> None:
        """Use `engine` to keep outputs.

        executor_headroom: bytes that the executor itself keeps free. When it asks for more, the rest is what a node
        needs. inactive_headroom: when less is available, outputs that the running prompt does not use go. None where
        the user gave none.
        """
        super().__init__(key_class, enable_providers=True)
        self.engine = engine
        self.cache = engine.values
        self.base_headroom = engine.headroom
        self.executor_headroom = executor_headroom
        self.inactive_headroom = inactive_headroom
        # Newer executors read these for their log.
        self.active_evictions = False
        self.full_evictions = False
        self.disk: DiskTier | None = None
        self.stamps = StampBook()
        self.sharing = Sharing(self, lambda: engine.available().available - engine.headroom // 2)
        engine.on_evict = self._write
        engine.writers.append(self.sharing.writer)
        self._prompt = Prompt()
        self._last_asked = 0.0

    @property
    def ledger(self) -> Ledger:
        """The ledger that decisions and failures are told to."""
        return self.engine.ledger

    # -- a prompt

    def _sit_out(self, *_: Any) -> None:
        """Run this prompt without a cache. Under keys that are not its own it would be given what others made."""
        self.initialized = False

    @never_raises("output cache: beginning a prompt", _sit_out)
    async def set_prompt(self, dynprompt: Any, node_ids: Iterable[str], is_changed_cache: Any) -> None:
        await super().set_prompt(dynprompt, node_ids, is_changed_cache)
        self.active_evictions = self.full_evictions = False
        self._prompt = Prompt()
        self.stamps.begin_prompt()
        if HISTORY_NEEDS_A_CLIENT:
            self._drop_old_outputs(node_ids)
        self.engine.begin_prompt([key for node in node_ids if (key := self._key(node)) is not None])
        with never_raises("output cache: a policy of this prompt"):
            self._apply_policies(node_ids)
        with never_raises("shared store: what the last prompt did"):
            self.sharing.log_prompt()
        former = self.sharing.store
        self.sharing.begin_prompt(None)  # whatever fails below, the last prompt's names are none of this one's
        with never_raises("shared store: beginning a prompt"):
            if not tiers.are_used():
                return
            store = make_store(self.sharing.ledger, former)
            self.sharing.begin_prompt(store if await register(store is not None) else None)

    @never_raises("output cache: listing nodes", lambda *_: set())
    def all_node_ids(self) -> Any:
        return super().all_node_ids()

    def clean_unused(self) -> None:
        """Keep outputs that this prompt does not use. RAM decides."""

    @never_raises("output cache: nodes that a node became", lambda cache, *_: cache)
    async def ensure_subcache_for(self, node_id: str, children_ids: Iterable[str]) -> SpillwayCache:
        """Keep the outputs of the nodes that a node expanded into in this cache too."""
        children = list(children_ids)
        await self.cache_key_set.add_keys(children)
        self._prompt.expanded[node_id] = children
        for child in children:
            self.engine.touch(self._key(child))
        return self

    def _key(self, node_id: str) -> Any:
        """Return a node's key. None for a node that the cache was not told of."""
        return self.cache_key_set.get_data_key(node_id)

    def is_here(self, node_id: str) -> bool:
        """Say whether an output is in RAM or on this machine's disk."""
        key = self._key(node_id)
        if key in self.cache or self.disk is None or key is None:
            return key in self.cache
        name = file_name(key)
        return name is not None and self.disk.path(name).exists()

    @property
    def _watches(self) -> bool:
        """Say whether anything asks for stamps."""
        # A run that leaves the tiers out gives nodes their files as any other does.
        return self.disk is not None or self.sharing.store is not None or not tiers.are_used()

    def _drop_old_outputs(self, node_ids: Iterable[str]) -> None:
        """Have save and preview nodes run again unless the last prompt had them, as ComfyUI's own cache does.

        The history of these executors lacks the outputs of cached nodes when no browser is connected. Without this,
        programs would miss them.
        """
        for node_id in node_ids:
            entry = self.engine.entries.get(self._key(node_id))
            if entry is not None and entry.used < self.engine.prompt and self._is_output(node_id):
                self.engine.drop(entry.key)

    def _is_output(self, node_id: str) -> bool:
        node_class = nodes.NODE_CLASS_MAPPINGS.get(self._node(node_id).get("class_type"))
        return bool(getattr(node_class, "OUTPUT_NODE", False))

    # -- policy

    def _apply_policies(self, node_ids: Iterable[str]) -> None:
        """Apply the prompt's policy nodes. Those whose outputs are still cached do not run, and count all the same."""
        self.engine.headroom = self.base_headroom
        self.engine.cap = ram_cap()
        self.disk = make_tier(self.engine.ledger, former=self.disk) if tiers.are_used() else None
        for node_id in node_ids:
            node = self._node(node_id)
            if node.get("class_type") == POLICY_NODE:
                headroom, disk = node["inputs"].get("headroom_gb"), node["inputs"].get("disk_gb")
                if isinstance(headroom, int | float) and headroom >= 0:
                    self.set_headroom(headroom)
                if isinstance(disk, int | float) and disk >= 0:
                    self.set_disk(disk)
                cap = node["inputs"].get("ram_gb")
                if isinstance(cap, int | float) and cap >= 0:
                    self.set_cap(cap)

    def set_headroom(self, gigabytes: float) -> None:
        """Set the headroom of the running prompt. Of several policies the largest holds."""
        wanted, before = int(gigabytes * GIB), self.engine.headroom
        self.engine.headroom = wanted if before == self.base_headroom else max(before, wanted)

    def set_cap(self, gigabytes: float) -> None:
        """Set the most RAM that outputs may hold in the running prompt. Of several policies the smallest holds."""
        wanted = int(gigabytes * GIB)
        self.engine.cap = wanted if self.engine.cap is None else min(self.engine.cap, wanted)

    def set_disk(self, gigabytes: float) -> None:
        """Set the cap of the disk tier for the running prompt. 0 turns it off."""
        if not tiers.are_used():
            return
        self.disk = make_tier(self.engine.ledger, gigabytes, former=self.disk)

    # -- disk

    def _write(self, entry: Entry, value: Any, nbytes: int) -> None:
        """Queue an evicted entry. Entries with UI stay out: it names files that may be gone when the entry is read."""
        if self.disk is None or entry.unfindable or value.ui or entry.seconds < self.disk.least_seconds:
            return
        name, made_from = file_name(entry.key), self.stamps.of(entry.number)
        if made_from is None:
            self.ledger.decide_once(
                f"disk tier: {entry.kind} is not written: what it was made from was not watched, or may have changed",
                level=logging.INFO,
            )
        elif name is not None and is_storable(value.outputs):
            record = stamps.as_record(made_from)
            self.engine.writer.put(
                Job(self.disk, name, value.outputs, entry.seconds, entry.kind, record, nbytes),
            )

    def _read(self, node_id: str, key: Any) -> Any:
        """Find an evicted output: among those that wait to be written, or on disk."""
        name = file_name(key) if self.disk is not None and key is not None else None
        if self.disk is None or name is None:
            return None
        stored = self.engine.writer.take_back(name)
        if stored is None or not stamps.still_hold(stored[2]):
            stored = self.disk.load(name, stamps.still_hold)
        if stored is None:
            return None
        outputs, seconds, record = stored
        if not isinstance(outputs, list) or not all(isinstance(items, list) for items in outputs):
            self.ledger.decide(
                f"disk tier: what lies there for node {node_id} is no output of a node: it is made again"
            )
            return None
        value = execution.CacheEntry(ui=None, outputs=outputs)
        self._adopt(node_id, key, value, seconds, found=True)
        self.stamps.remember(hash(key), stamps.from_record(record), outputs)
        return value

    # -- lookup and store

    @never_raises("output cache: a lookup")
    async def get(self, node_id: str) -> Any:
        if not self.initialized:
            return None
        key = self._key(node_id)
        if key is None:
            return None
        value = self.cache.get(key)
        if value is None:
            # The executor asks for all nodes when a prompt begins, and for each node again right before running it.
            if node_id in self._prompt.started:
                self._make_room(node_id, key)
            self._prompt.started[node_id] = time.perf_counter()
            with never_raises("output cache: looking at the files of a node"):
                self.stamps.begin(node_id, self._node(node_id), self._watches)
            with asking(self.sharing):
                value = await self._get_immediate(node_id)
            if value is None:
                self._prompt.started[node_id] = time.perf_counter()  # waiting for a store is no time of the node's
                return None
            seconds, made_from = self.sharing.given(node_id) or (0.0, None)
            self.stamps.forget(hash(key))
            if made_from is not None:
                self.stamps.remember(hash(key), made_from, value.outputs)
            self._adopt(node_id, key, value, seconds, found=True)
        self._prompt.done.add(node_id)
        return value

    @never_raises("output cache: a lookup")
    def get_local(self, node_id: str) -> Any:
        if not self.initialized:
            return None
        self._prompt.asked.add(node_id)
        key = self._key(node_id)
        value = self.cache.get(key) if key is not None else None
        # The executor asks from the outputs upwards, so only outputs that are needed are read from disk.
        return value if value is not None or self.disk is None else self._read(node_id, key)

    def _drop_unbooked(self, node_id: str, _: Any) -> None:
        """Drop a value without an entry, which would never be evicted."""
        key = self._key(node_id)
        if key not in self.engine.entries:
            self.cache.pop(key, None)

    @never_raises("output cache: keeping an output", _drop_unbooked)
    async def set(self, node_id: str, value: Any) -> None:
        if not self.initialized or self._key(node_id) is None:
            return
        now = time.perf_counter()
        seconds = now - self._prompt.started.pop(node_id, now)
        for child in self._prompt.expanded.get(node_id, ()):
            entry = self.engine.entries.get(self._key(child))
            seconds += entry.seconds if entry is not None else 0.0
        self._prompt.done.add(node_id)
        self._stamp(node_id, value)
        with asking(self.sharing, seconds):
            await self._set_immediate(node_id, value)
        self._adopt(node_id, self._key(node_id), value, seconds)
        self.relieve()

    @never_raises("output cache: looking at the files of a node")
    def _stamp(self, node_id: str, value: Any) -> None:
        """Stamp an output that was just made."""
        number = hash(self._key(node_id))
        if not self._watches:
            self.stamps.made_unwatched(number, value.outputs)
            return
        node = self._node(node_id)
        parents = [link[0] for link in node.get("inputs", {}).values() if is_link(link)]
        parents += self._prompt.expanded.get(node_id, ())
        numbers = [hash(self._key(parent)) for parent in dict.fromkeys(parents)]
        replaced = self.stamps.made(number, node_id, node, value.outputs, numbers)
        if replaced is not None:
            self.ledger.decide_once(
                f"{replaced} may have been replaced since it was first used. {node.get('class_type')} may have kept "
                "the old one, so what is made of it is neither written nor shared until the next start",
                level=logging.INFO,
            )

    @never_raises("output cache: keeping an output", _drop_unbooked)
    def set_local(self, node_id: str, value: Any) -> None:
        """Store a value that the executor read before. It may have been evicted since."""
        key = self._key(node_id) if self.initialized else None
        if key is None or self.cache.get(key) is value:
            return
        self._adopt(node_id, key, value, self.engine.seconds_of(key), found=True)

    def _adopt(self, node_id: str, key: Any, value: Any, seconds: float, *, found: bool = False) -> None:
        inputs = self._node(node_id).get("inputs", {}).values()
        parents = [self._key(link[0]) for link in inputs if is_link(link)]
        self.engine.put(
            key,
            value,
            value.outputs,
            seconds=seconds,
            kind=self._node(node_id).get("class_type", ""),
            label=node_id,
            parents=[parent for parent in parents if parent is not None],
            found=found,
        )

    def _node(self, node_id: str) -> dict[str, Any]:
        return self.dynprompt.get_node(node_id) if self.dynprompt.has_node(node_id) else {}

    # -- eviction

    def relieve(self) -> int:
        """Evict where less than the headroom is available. Returns the bytes freed."""
        self._last_asked = time.monotonic()
        freed = self.engine.relieve(self.engine.headroom, self.needed)
        self.active_evictions = self.active_evictions or bool(freed)
        return freed

    def _make_room(self, node_id: str, key: Any) -> None:
        """Free the RAM that a node will likely take, before it runs, as far as that would cut into the headroom."""
        expected = self.engine.expected_bytes(key, self._node(node_id).get("class_type", ""))
        if expected >= WORTH_ROOM:
            self.engine.relieve(self.engine.headroom + expected, self.needed)

    @never_raises("output cache: making room", lambda *_, **__: 0)
    def ram_release(self, target: int, free_active: bool = False, min_entry_size: int = 0) -> int:
        """Free RAM for the executor and its pins. Returns the bytes freed.

        The headroom decides, not `target`. Without a flag, newer executors ask for all of the RAM, to drop all that the
        last prompt did not use. min_entry_size would spare small outputs. The score does that.
        """
        if free_active:
            above = max(0, int(target) - self.executor_headroom)
            freed = self.engine.relieve(self.engine.headroom + above, self.needed)
            self.active_evictions = self.active_evictions or bool(freed)
            return freed
        if self.inactive_headroom is not None and target >= self.inactive_headroom:
            return self.engine.relieve(self.inactive_headroom, self.needed, current=False)
        if time.monotonic() - self._last_asked < ASK_EVERY_SECONDS:
            return 0
        return self.relieve()

    def needed(self) -> set[Any]:
        """Return the keys of the outputs that nodes yet to run will read."""
        if not self.initialized:
            return set()
        readers = defaultdict(list)
        for node_id in self.dynprompt.all_node_ids():
            for link in self._node(node_id).get("inputs", {}).values():
                if is_link(link):
                    readers[link[0]].append(node_id)
        return {
            self._key(source) for source, read_by in readers.items() if any(self._will_run(node) for node in read_by)
        }

    def _will_run(self, node_id: str) -> bool:
        if node_id in self._prompt.done:
            return False
        # The executor asks for all nodes that it will run, except for the output nodes that it starts from.
        return node_id in self._prompt.asked or self._is_output(node_id)
