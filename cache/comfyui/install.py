"""Puts the output cache in the place of ComfyUI's own, where no flag or setting says no."""

from __future__ import annotations

import inspect
import logging
import weakref
from typing import Any

import execution
from comfy.cli_args import args
from comfy_execution import caching

from ...ops.ledger import Ledger, in_words
from ...ops.never_raises import never_raises
from ...ops.ram.allocator import what_was_done
from ...ops.ram.available import available_ram
from ..output_cache import OutputCache
from . import device_memory, settings
from .cache import SpillwayCache
from .first_seen import first_seen
from .models import model_getter

log = logging.getLogger("spillway")

GIB = 1 << 30

_current: weakref.ref[SpillwayCache] | None = None


def current_cache() -> SpillwayCache | None:
    """Return the cache of the executor that was built last. None where ComfyUI's own is in use."""
    return _current() if _current is not None else None


def unrecognised() -> str | None:
    """Say why this cache does not fit ComfyUI's executor. None where it fits."""
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
    """Return the numbers given with --cache-ram, in GB. Older versions take one number, where -1 stands for none."""
    given = getattr(args, "cache_ram", None)
    if isinstance(given, list):
        return given
    return [given] if given is not None and given > 0 else []


def default_headroom() -> int:
    """Return a tenth of the RAM that this process may have, but 1 to 10 GiB, in bytes."""
    return min(max(available_ram().total // 10, GIB), 10 * GIB)


def make_cache(executor_headroom: float = 0.0) -> SpillwayCache:
    """Make the cache of an executor, which itself keeps that many GB free. `current_cache` returns it from then on."""
    global _current
    given = given_headrooms()
    headroom = int(given[0] * GIB) if given else default_headroom()
    engine = OutputCache(headroom, getters=[model_getter], ledger=Ledger("output cache"))
    inactive = int(given[1] * GIB) if len(given) > 1 else None
    cache = SpillwayCache(caching.CacheKeySetInputSignature, engine, int(executor_headroom * GIB), inactive)
    _current = weakref.ref(cache)
    state = available_ram()
    engine.ledger.decide(
        f"in use: keeps {in_words(headroom)} of RAM free; {in_words(state.available)} of {in_words(state.total)} are "
        f"available by {state.reason}"
    )
    engine.ledger.decide(f"allocator: {what_was_done()}")
    return cache


def install() -> bool:
    """Have executors that are built from now on use this cache, where no flag chose another.

    It is called once, when the pack is loaded. The setting is read each time that an executor is built. Returns whether
    the cache fits this ComfyUI.
    """
    reason = unrecognised()
    if reason is not None:
        log.warning("[Spillway] output cache: ComfyUI's own is left in place, as its executor is not known: %s", reason)
        return False
    own_ram, own_classic = execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache

    @never_raises("output cache: putting it in place of ComfyUI's own", lambda *_: False)
    def use(caches: Any, executor_headroom: float = 0.0) -> bool:
        off = settings.cache_turned_off()
        if off is not None:
            log.info("[Spillway] output cache: ComfyUI's own is in use (%s)", off)
            first_seen.pass_all()
            return False
        caches.outputs = make_cache(executor_headroom)
        caches.objects = caching.HierarchicalCache(caching.CacheKeySetID)
        return True

    def init_ram_cache(caches: Any, min_headroom: float) -> None:
        if not use(caches, min_headroom):
            own_ram(caches, min_headroom)

    def init_classic_cache(caches: Any) -> None:
        # Older versions come here by default, newer ones only by a flag.
        if getattr(args, "cache_classic", False) or not use(caches):
            own_classic(caches)

    device_memory.install(current_cache)
    execution.CacheSet.init_ram_cache = init_ram_cache
    execution.CacheSet.init_classic_cache = init_classic_cache
    return True
