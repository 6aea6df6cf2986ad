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
            ],
            outputs=[io.AnyType.Output("value_out", display_name="value", tooltip="What came in.")],
        )

    @classmethod
    def execute(cls, value: Any, headroom_gb: float, never_evict: bool) -> io.NodeOutput:
        if headroom_gb != AUTO and not 0 <= headroom_gb < float("inf"):
            raise ValueError(
                f"Cache Policy (Spillway): headroom_gb is {headroom_gb}; give 0 or more GB, or -1 to leave it to "
                "Spillway."
            )
        cache = comfy_cache.current()
        if cache is None:
            log.warning("[Spillway] cache policy: it has no effect, as ComfyUI's own output cache is in use.")
            return io.NodeOutput(value)
        if headroom_gb != AUTO:
            cache.set_headroom(headroom_gb)
        concerned = cache.engine.protect(value, never_evict)
        if never_evict:
            cache.engine.ledger.decide(f"never evicts {in_words(concerned)}: asked for by a Cache Policy node")
        return io.NodeOutput(value)
