"""The output cache in the place of the host's own, for the executors of ComfyUI 0.22 to 0.33."""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import comfyui_version
import execution
import nodes
from comfy.cli_args import args
from comfy_execution import caching
from comfy_execution.graph_utils import is_link

from ..ops.allocator import what_was_done
from ..ops.available import available_ram
from ..ops.ledger import Ledger, in_words
from ..ops.never_raises import never_raises
from . import comfy_disk, comfy_settings, comfy_stamps
from .books import Entry
from .comfy_models import model_getter
from .disk_tier import DiskTier
from .output_cache import OutputCache

log = logging.getLogger("spillway")

GIB = 1 << 30
HISTORY_NEEDS_A_CLIENT = [int(part) for part in comfyui_version.__version__.split(".")[:2]] < [0, 28]
POLICY_NODE = "SpillwayCachePolicy"
# The system is asked this often at most by callers that ask for every weight they pin.
ASK_EVERY_SECONDS = 0.05
# Outputs smaller than this fit into the headroom.
WORTH_ROOM = 64 << 20

_current: weakref.ref[SpillwayCache] | None = None


def current() -> SpillwayCache | None:
    """The cache of the executor that was built last; None where the host's own is in use."""
    return _current() if _current is not None else None


class SpillwayCache(caching.BasicCache):
    """What the executor asks of an output cache. Entries are the executor's own named tuples of UI and outputs.

    Nothing that the executor calls raises: an output that is not kept is made again.
    """

    def __init__(
        self, key_class: Any, engine: OutputCache, host_headroom: int = 0, inactive_headroom: int | None = None
    ) -> None:
        """host_headroom: bytes that the executor means to keep free; asking for more says how much is needed above.

        inactive_headroom: below it, what the running prompt does not use goes; None where the user gave none.
        """
        super().__init__(key_class, enable_providers=True)
        self.engine = engine
        self.cache = engine.values
        self.base_headroom = engine.headroom
        self.host_headroom = host_headroom
        self.inactive_headroom = inactive_headroom
        # Newer executors report these.
        self.active_evictions = False
        self.full_evictions = False
        self.disk: DiskTier | None = None
        self.stamps = comfy_stamps.StampBook()
        engine.on_evict = self._write
        self._started: dict[str, float] = {}
        self._done: set[str] = set()
        self._asked: set[str] = set()
        self._expanded: dict[str, list[str]] = {}
        self._last_asked = 0.0

    @property
    def ledger(self) -> Ledger:
        """Where decisions and failures are told."""
        return self.engine.ledger

    # -- a prompt

    def _sit_out(self, *_: Any) -> None:
        """This prompt runs without a cache: under keys that are not its own it would be given what others made."""
        self.initialized = False

    @never_raises("output cache: beginning a prompt", _sit_out)
    async def set_prompt(self, dynprompt: Any, node_ids: Iterable[str], is_changed_cache: Any) -> None:
        await super().set_prompt(dynprompt, node_ids, is_changed_cache)
        self.active_evictions = self.full_evictions = False
        for books in (self._started, self._done, self._asked, self._expanded):
            books.clear()
        self.stamps.begin_prompt()
        if HISTORY_NEEDS_A_CLIENT:
            self._forget_old_outputs(node_ids)
        self.engine.begin_prompt([key for node in node_ids if (key := self._key(node)) is not None])
        with never_raises("output cache: a policy of this prompt"):
            self._apply_policies(node_ids)

    @never_raises("output cache: listing nodes", lambda *_: set())
    def all_node_ids(self) -> Any:
        return super().all_node_ids()

    def clean_unused(self) -> None:
        """Nothing goes for being unused: RAM decides."""

    @never_raises("output cache: nodes that a node became", lambda cache, *_: cache)
    async def ensure_subcache_for(self, node_id: str, children_ids: Iterable[str]) -> SpillwayCache:
        """Nodes that a node expanded into live in the same cache."""
        children = list(children_ids)
        await self.cache_key_set.add_keys(children)
        self._expanded[node_id] = children
        for child in children:
            self.engine.touch(self._key(child))
        return self

    def _key(self, node_id: str) -> Any:
        """None for a node that the cache was not told of."""
        return self.cache_key_set.get_data_key(node_id)

    def _forget_old_outputs(self, node_ids: Iterable[str]) -> None:
        """Save and preview nodes run again unless the last prompt had them, as with those executors' own cache.

        Their history has no outputs of cached nodes when nobody is connected, so programs would miss them.
        """
        for node_id in node_ids:
            entry = self.engine.entries.get(self._key(node_id))
            if entry is not None and entry.used < self.engine.prompt and self._is_output(node_id):
                self.engine.forget(entry.key)

    def _is_output(self, node_id: str) -> bool:
        kind = nodes.NODE_CLASS_MAPPINGS.get(self._node(node_id).get("class_type"))
        return bool(getattr(kind, "OUTPUT_NODE", False))

    # -- policy

    def _apply_policies(self, node_ids: Iterable[str]) -> None:
        """What the prompt's policy nodes say holds for it, also where their outputs are still cached."""
        self.engine.headroom = self.base_headroom
        self.disk = comfy_disk.make_tier(self.engine.ledger)
        for node_id in node_ids:
            node = self._node(node_id)
            if node.get("class_type") == POLICY_NODE:
                headroom, disk = node["inputs"].get("headroom_gb"), node["inputs"].get("disk_gb")
                if isinstance(headroom, int | float) and headroom >= 0:
                    self.set_headroom(headroom)
                if isinstance(disk, int | float) and disk >= 0:
                    self.set_disk(disk)

    def set_headroom(self, gigabytes: float) -> None:
        """For the running prompt; of several policies the largest holds."""
        wanted, before = int(gigabytes * GIB), self.engine.headroom
        self.engine.headroom = wanted if before == self.base_headroom else max(before, wanted)

    def set_disk(self, gigabytes: float) -> None:
        """For the running prompt: the disk tier's cap; 0 turns it off."""
        self.disk = comfy_disk.make_tier(self.engine.ledger, gigabytes)

    # -- disk

    def _write(self, entry: Entry, value: Any) -> None:
        """Of an evicted entry. What a node showed lies in files that may be gone by then."""
        if self.disk is None or entry.once or value.ui or entry.seconds < self.disk.least_seconds:
            return
        name, stamps = comfy_disk.file_name(entry.key), self.stamps.of(entry.number)
        if stamps is None:
            self.ledger.decide_once(
                f"disk tier: {entry.kind} is not written: what it was made from was not watched then, or has changed",
                level=logging.INFO,
            )
        elif name is not None:
            record = comfy_stamps.as_record(stamps)
            self.disk.store(name, value.outputs, seconds=entry.seconds, kind=entry.kind, stamps=record)

    def _read(self, node_id: str, key: Any) -> Any:
        if self.disk is None or key is None or not self.disk.folder.is_dir():
            return None
        name = comfy_disk.file_name(key)
        found = self.disk.load(name, comfy_stamps.still_hold) if name is not None else None
        if found is None:
            return None
        outputs, seconds, record = found
        value = execution.CacheEntry(ui=None, outputs=outputs)
        self._adopt(node_id, key, value, seconds)
        self.stamps.remember(hash(key), comfy_stamps.from_record(record))
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
            # The executor asks for all nodes as a prompt begins, and for each again right before it runs it.
            if node_id in self._started:
                self._make_room(node_id, key)
            self._started[node_id] = time.perf_counter()
            with never_raises("output cache: looking at the files of a node"):
                if self.disk is not None:
                    self.stamps.begin(node_id, self._node(node_id))
            value = await self._get_immediate(node_id)
            if value is None:
                return None
            self.stamps.forget(hash(key))
            self._adopt(node_id, key, value, 0.0)
        self._done.add(node_id)
        return value

    @never_raises("output cache: a lookup")
    def get_local(self, node_id: str) -> Any:
        if not self.initialized:
            return None
        self._asked.add(node_id)
        key = self._key(node_id)
        value = self.cache.get(key) if key is not None else None
        # Asked for from the outputs upwards, so nothing is read that nothing needs.
        return value if value is not None or self.disk is None else self._read(node_id, key)

    def _drop_unbooked(self, node_id: str, _: Any) -> None:
        """A value without an entry is never evicted."""
        key = self._key(node_id)
        if key not in self.engine.entries:
            self.cache.pop(key, None)

    @never_raises("output cache: keeping an output", _drop_unbooked)
    async def set(self, node_id: str, value: Any) -> None:
        if not self.initialized or self._key(node_id) is None:
            return
        now = time.perf_counter()
        seconds = now - self._started.pop(node_id, now)
        for child in self._expanded.get(node_id, ()):
            entry = self.engine.entries.get(self._key(child))
            seconds += entry.seconds if entry is not None else 0.0
        self._done.add(node_id)
        self._stamp(node_id, value)
        await self._set_immediate(node_id, value)
        self._adopt(node_id, self._key(node_id), value, seconds)
        self.relieve()

    @never_raises("output cache: looking at the files of a node")
    def _stamp(self, node_id: str, value: Any) -> None:
        """Of an output that was just made. Without a disk tier nothing asks for stamps."""
        number = hash(self._key(node_id))
        if self.disk is None:
            self.stamps.forget(number)
            return
        node = self._node(node_id)
        parents = [link[0] for link in node.get("inputs", {}).values() if is_link(link)]
        parents += self._expanded.get(node_id, ())
        numbers = [hash(self._key(parent)) for parent in dict.fromkeys(parents)]
        self.stamps.made(number, node_id, node, value.outputs, numbers)

    @never_raises("output cache: keeping an output", _drop_unbooked)
    def set_local(self, node_id: str, value: Any) -> None:
        """A node that ran puts back what it read; it may have been evicted since."""
        key = self._key(node_id) if self.initialized else None
        if key is None or self.cache.get(key) is value:
            return
        self._adopt(node_id, key, value, self.engine.seconds_of(key))

    def _adopt(self, node_id: str, key: Any, value: Any, seconds: float) -> None:
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
        )

    def _node(self, node_id: str) -> dict[str, Any]:
        return self.dynprompt.get_node(node_id) if self.dynprompt.has_node(node_id) else {}

    # -- eviction

    def relieve(self) -> int:
        """Evict where less than the headroom is available; returns the bytes freed."""
        self._last_asked = time.monotonic()
        freed = self.engine.relieve(self.engine.headroom, self.needed)
        self.active_evictions = self.active_evictions or bool(freed)
        return freed

    def _make_room(self, node_id: str, key: Any) -> None:
        """Before a node runs: free what it is likely to take, as far as it would cut into the headroom."""
        expected = self.engine.expected_bytes(key, self._node(node_id).get("class_type", ""))
        if expected >= WORTH_ROOM:
            self.engine.relieve(self.engine.headroom + expected, self.needed)

    @never_raises("output cache: making room", lambda *_, **__: 0)
    def ram_release(self, target: int, free_active: bool = False, min_entry_size: int = 0) -> int:
        """What the executor and its pins ask for; returns the bytes freed.

        The headroom decides, not `target`: unless told by a flag, newer executors ask for all of the RAM, to drop
        whatever the last prompt did not use. min_entry_size spares what is small; the score does that.
        """
        if free_active:
            above = max(0, int(target) - self.host_headroom)
            freed = self.engine.relieve(self.engine.headroom + above, self.needed)
            self.active_evictions = self.active_evictions or bool(freed)
            return freed
        if self.inactive_headroom is not None and target >= self.inactive_headroom:
            return self.engine.relieve(self.inactive_headroom, self.needed, current=False)
        if time.monotonic() - self._last_asked < ASK_EVERY_SECONDS:
            return 0
        return self.relieve()

    def needed(self) -> set[Any]:
        """Keys of what nodes that have yet to run will read."""
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
        if node_id in self._done:
            return False
        # The executor asks for all that it is going to run, save for where it starts from.
        return node_id in self._asked or self._is_output(node_id)


# -- in the host's place


def unrecognised() -> str | None:
    """Why the executor is none that this cache fits; None where it fits."""
    cache_set = getattr(execution, "CacheSet", None)
    for name in ("init_ram_cache", "init_classic_cache"):
        if not callable(getattr(cache_set, name, None)):
            return f"execution.CacheSet has no {name}"
    if list(inspect.signature(cache_set.init_ram_cache).parameters) != ["self", "min_headroom"]:
        return "init_ram_cache takes other arguments"
    if getattr(execution.CacheEntry, "_fields", None) != ("ui", "outputs"):
        return "a cache entry has other fields"
    methods = ("set_prompt", "all_node_ids", "clean_unused", "get_local", "set_local")
    missing = [name for name in (*methods, "_get_immediate", "_set_immediate") if not hasattr(caching.BasicCache, name)]
    missing += [name for name in ("HierarchicalCache", "CacheKeySetInputSignature") if not hasattr(caching, name)]
    if missing:
        return f"its caches have no {', '.join(missing)}"
    theirs = {name for name in dir(caching.RAMPressureCache) if not name.startswith("_")}
    ours = {name for name in dir(SpillwayCache) if not name.startswith("_")}
    if theirs - ours:
        return f"it asks for {', '.join(sorted(theirs - ours))}"
    release = list(inspect.signature(caching.RAMPressureCache.ram_release).parameters)
    if not {"self", "target"} <= set(release) <= {"self", "target", "free_active", "min_entry_size"}:
        return "ram_release takes other arguments"
    return None


def given_headrooms() -> list[float]:
    """What the user gave with --cache-ram, in GB; older versions take one number, -1 meaning none."""
    given = getattr(args, "cache_ram", None)
    if isinstance(given, list):
        return given
    return [given] if given is not None and given > 0 else []


def default_headroom() -> int:
    """Bytes: a tenth of the RAM that this process may have, between 1 and 10 GiB."""
    return min(max(available_ram().total // 10, GIB), 10 * GIB)


def make_cache(host_headroom: float = 0.0) -> SpillwayCache:
    """The cache for one executor, which means to keep that many GB free; nodes and report find it by `current`."""
    global _current
    given = given_headrooms()
    headroom = int(given[0] * GIB) if given else default_headroom()
    engine = OutputCache(headroom, getters=[model_getter], ledger=Ledger("output cache"))
    inactive = int(given[1] * GIB) if len(given) > 1 else None
    cache = SpillwayCache(caching.CacheKeySetInputSignature, engine, int(host_headroom * GIB), inactive)
    _current = weakref.ref(cache)
    state = available_ram()
    engine.ledger.decide(
        f"in use: keeps {in_words(headroom)} of RAM free; {in_words(state.available)} of {in_words(state.total)} are "
        f"available by {state.reason}"
    )
    engine.ledger.decide(f"allocator: {what_was_done()}")
    return cache


def install() -> bool:
    """Have executors built from now on use this cache where no flag chose another; whether it was put in place.

    Called once, when the pack is loaded. Whether it is turned on is asked each time that an executor is built.
    """
    reason = unrecognised()
    if reason is not None:
        log.warning("[Spillway] output cache: ComfyUI's own is left in place, as its executor is not known: %s", reason)
        return False
    own_ram, own_classic = execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache

    @never_raises("output cache: putting it in place of ComfyUI's own", lambda *_: False)
    def use(caches: Any, host_headroom: float = 0.0) -> bool:
        off = comfy_settings.cache_turned_off()
        if off is not None:
            log.info("[Spillway] output cache: ComfyUI's own is in use (%s)", off)
            return False
        caches.outputs = make_cache(host_headroom)
        caches.objects = caching.HierarchicalCache(caching.CacheKeySetID)
        return True

    def init_ram_cache(caches: Any, min_headroom: float) -> None:
        if not use(caches, min_headroom):
            own_ram(caches, min_headroom)

    def init_classic_cache(caches: Any) -> None:
        # The default of older versions; newer ones come here only by a flag.
        if getattr(args, "cache_classic", False) or not use(caches):
            own_classic(caches)

    execution.CacheSet.init_ram_cache = init_ram_cache
    execution.CacheSet.init_classic_cache = init_classic_cache
    return True
