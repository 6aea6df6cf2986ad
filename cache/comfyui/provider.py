"""Registers the shared store with ComfyUI's API for cache providers, beside those of others.

Providers are asked in the order in which they were registered, and the first one that has an output gives it. The
executor tells them of a node by its number alone. Which cache asks, and so which prompt it is of, says `asking`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from comfy_api import latest

from ...ops.never_raises import never_raises
from .sharing import Sharing

log = logging.getLogger("spillway")

_asking: ContextVar[tuple[Sharing, float] | None] = ContextVar("spillway_asking", default=None)


@contextmanager
def asking(sharing: Sharing, seconds: float = 0.0) -> Iterator[None]:
    """Within it, the provider answers for this cache. seconds: that the output took which is told of."""
    token = _asking.set((sharing, seconds))
    try:
        yield
    finally:
        _asking.reset(token)


if hasattr(latest, "Caching"):

    class SharedStoreProvider(latest.Caching.CacheProvider):
        """Answers for the cache that asks. ComfyUI's own caches do not say for which prompt, and get nothing."""

        @never_raises("shared store: looking at an output", lambda *_: False)
        def should_cache(self, context: Any, value: Any = None) -> bool:
            asked = _asking.get()
            if asked is None:
                return False
            sharing, seconds = asked
            if value is None:
                return sharing.may_share(context.node_id)
            # A task of `on_store` would be cancelled with the event loop of its prompt, before it has written anything.
            sharing.offer(context.node_id, value, seconds)
            return False

        @never_raises("shared store: a lookup")
        async def on_lookup(self, context: Any) -> Any:
            asked = _asking.get()
            outputs = await asked[0].find(context.node_id) if asked is not None else None
            return latest.Caching.CacheValue(outputs=outputs) if outputs is not None else None

        async def on_store(self, context: Any, value: Any) -> None:
            """Nothing is left to do."""

    _provider: Any = SharedStoreProvider()
else:
    _provider = None

_registered = False


async def register(wanted: bool) -> bool:
    """Register the provider where a store is in use: else ComfyUI would make names for nobody. Return whether it is."""
    global _registered
    if wanted and _provider is None:
        log.warning("[Spillway] shared store: it is off, as this version of ComfyUI has no API for cache providers")
        return False
    if wanted != _registered:
        caching = latest.ComfyAPI().caching
        await (caching.register_provider if wanted else caching.unregister_provider)(_provider)
        _registered = wanted
    return _registered
