"""The node that says what the output cache may do."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..cache import comfy_cache
from ..ops.ledger import in_words
from .types import CATEGORY

log = logging.getLogger("spillway")
AUTO = -1.0


class SpillwayCachePolicy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayCachePolicy",
            display_name="Cache Policy (Spillway)",
            category=CATEGORY,
            description="Says how much RAM the output cache leaves free while this workflow runs, and whether what "
            "comes in may be evicted at all.",
            search_aliases=["cache", "never evict", "keep in ram", "ram headroom", "pin output"],
            inputs=[
                io.AnyType.Input("value", tooltip="Anything. It is passed on."),
                io.Float.Input(
                    "headroom_gb",
                    default=AUTO,
                    min=AUTO,
                    max=1024.0,
                    step=0.1,
                    tooltip="RAM to keep free while this workflow runs: outputs are evicted when less is available. In "
                    "GB; -1 leaves it to Spillway. Of several such nodes the largest holds.",
                ),
                io.Boolean.Input(
                    "never_evict",
                    default=False,
                    tooltip="Keep what comes in, whatever happens, also while other workflows run. Switch it off and "
                    "run again to let it go, or free ComfyUI's memory.",
                ),
                io.Float.Input(
                    "disk_gb",
                    default=AUTO,
                    min=AUTO,
                    max=1024.0,
                    step=1.0,
                    tooltip="Disk space for evicted outputs that took long to make, so that they need not be made "
                    "again. In GB; 0 writes none, -1 leaves it to the settings, where it is off.",
                ),
            ],
            outputs=[io.AnyType.Output("value_out", display_name="value", tooltip="What came in.")],
        )

    @classmethod
    def execute(cls, value: Any, headroom_gb: float, never_evict: bool, disk_gb: float = AUTO) -> io.NodeOutput:
        for name, gigabytes in (("headroom_gb", headroom_gb), ("disk_gb", disk_gb)):
            if gigabytes != AUTO and not 0 <= gigabytes < float("inf"):
                raise ValueError(
                    f"Cache Policy (Spillway): {name} is {gigabytes}; give 0 or more GB, or -1 to leave it to Spillway."
                )
        cache = comfy_cache.current()
        if cache is None:
            log.warning("[Spillway] cache policy: it has no effect, as ComfyUI's own output cache is in use.")
            return io.NodeOutput(value)
        if headroom_gb != AUTO:
            cache.set_headroom(headroom_gb)
        if disk_gb != AUTO:
            cache.set_disk(disk_gb)
        concerned = cache.engine.protect(value, never_evict)
        if never_evict:
            cache.engine.ledger.decide(f"never evicts {in_words(concerned)}: asked for by a Cache Policy node")
        return io.NodeOutput(value)
