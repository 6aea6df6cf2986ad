"""Sets how much memory a model may take, and how much the output cache leaves free."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..cache.comfyui.install import current_cache
from ..ops.ledger import in_words
from ..patcher.comfyui.loading.load import is_ours
from ..patcher.policy import Policy
from .checked_node import CheckedNode
from .inputs import AUTO, CATEGORY, PolicyType, gigabytes_input, given

log = logging.getLogger("spillway")

GIB = 1 << 30


def _gigabytes(name: str, tooltip: str) -> io.Input:
    return gigabytes_input(name, f"{tooltip} In GB; -1 leaves it to Spillway.")


def _bytes(name: str, gigabytes: float) -> int | None:
    amount = given("Spillway Policy", name, gigabytes)
    return None if amount is None else int(amount * GIB)


class SpillwayPolicy(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayPolicy",
            display_name="Spillway Policy",
            category=CATEGORY,
            description="Says how much memory a model may take. Connect the policy to Spillway loaders, or put the "
            "node between a Spillway loader and a sampler.",
            search_aliases=["vram budget", "reserve vram", "headroom", "low vram", "unload model", "keep loaded"],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="A MODEL from a Spillway node. It gets this policy."),
                _gigabytes("vram_gb", "The most device memory that the weights may hold. 0 keeps none there."),
                _gigabytes("headroom_gb", "Device memory to keep free for the computation and other programs."),
                _gigabytes(
                    "pinned_gb",
                    "Page-locked RAM for weights that are not on the device. It makes their transfers faster.",
                ),
                io.Combo.Input(
                    "keep",
                    options=["auto", "always", "free after use"],
                    default="auto",
                    tooltip="auto: gives way when memory is needed elsewhere. always: never gives way to other models. "
                    "free after use: gives everything back after each run.",
                ),
                io.Int.Input(
                    "priority", default=0, min=-100, max=100, tooltip="Models with a higher priority give way later."
                ),
                io.Combo.Input(
                    "int8_lora",
                    options=["auto", "merge", "side branch"],
                    default="auto",
                    optional=True,
                    tooltip="LoRAs on a model that is quantised as it is loaded. merge: rounded together with the "
                    "weight, free at every step. side branch: kept beside it, exact, a little slower. auto: merge "
                    "where that rounds no worse, and keep it beside weights of 4 bits.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with this policy. Empty if none was connected."),
                PolicyType.Output("policy", tooltip="For the policy input of any Spillway node."),
            ],
        )

    @classmethod
    def execute(
        cls,
        vram_gb: float,
        headroom_gb: float,
        pinned_gb: float,
        keep: str,
        priority: int,
        model: Any = None,
        int8_lora: str = "auto",
    ) -> io.NodeOutput:
        policy = Policy(
            vram_bytes=_bytes("vram_gb", vram_gb),
            headroom_bytes=_bytes("headroom_gb", headroom_gb),
            pinned_bytes=_bytes("pinned_gb", pinned_gb),
            keep=keep,  # type: ignore[arg-type]
            priority=priority,
            int8_lora=int8_lora,  # type: ignore[arg-type]
        )
        if model is None:
            missing = "Spillway Policy: its MODEL output is used, but no model is connected to its input."
            return io.NodeOutput(ExecutionBlocker(missing), policy)
        if not is_ours(model):
            raise ValueError(
                "Spillway Policy: this MODEL is not managed by Spillway. Load it with a Spillway loader, or put a "
                "Make Dynamic (Spillway) node before this one."
            )
        model = model.clone()
        model.set_policy(policy)
        return io.NodeOutput(model, policy)


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
                    "RAM to keep free while this workflow runs. Outputs are evicted when less is available. In "
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
        cache = current_cache()
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
