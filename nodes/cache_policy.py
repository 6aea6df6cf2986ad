"""The node that says what the output cache may do."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..cache import comfy_cache
from ..ops.ledger import in_words
from .gigabytes import AUTO, gigabytes_input, given
from .inputs import CheckedNode
from .types import CATEGORY

log = logging.getLogger("spillway")


class SpillwayCachePolicy(CheckedNode):
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
                gigabytes_input(
                    "headroom_gb",
                    "RAM to keep free while this workflow runs: outputs are evicted when less is available. In "
                    "GB; -1 leaves it to Spillway. Of several such nodes the largest holds.",
                ),
                io.Boolean.Input(
                    "never_evict",
                    default=False,
                    tooltip="Keep what comes in, whatever happens, also while other workflows run. Switch it off and "
                    "run again to let it go, or free ComfyUI's memory.",
                ),
                gigabytes_input(
                    "disk_gb",
                    "Disk space for evicted outputs that took long to make, so that they need not be made "
                    "again. In GB; 0 writes none, -1 leaves it to the settings, where it is off.",
                    step=1.0,
                ),
            ],
            outputs=[io.AnyType.Output("value_out", display_name="value", tooltip="What came in.")],
        )

    @classmethod
    def execute(cls, value: Any, headroom_gb: float, never_evict: bool, disk_gb: float = AUTO) -> io.NodeOutput:
        headroom = given("Cache Policy (Spillway)", "headroom_gb", headroom_gb)
        disk = given("Cache Policy (Spillway)", "disk_gb", disk_gb)
        cache = comfy_cache.current()
        if cache is None:
            log.warning("[Spillway] cache policy: it has no effect, as ComfyUI's own output cache is in use.")
            return io.NodeOutput(value)
        if headroom is not None:
            cache.set_headroom(headroom)
        if disk is not None:
            cache.set_disk(disk)
        concerned = cache.engine.protect(value, never_evict)
        if never_evict:
            cache.engine.ledger.decide(f"never evicts {in_words(concerned)}: asked for by a Cache Policy node")
        return io.NodeOutput(value)
