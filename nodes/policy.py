"""Sets how much memory a model may take, and how much the output cache leaves free."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..cache.comfyui.install import current_cache
from ..ops.ledger import in_words
from ..patcher.comfyui import graph_policy
from ..patcher.policy import Policy
from .checked_node import CheckedNode
from .inputs import AUTO, CATEGORY, PolicyType, gigabytes_input, given
from .ours import check_ours

log = logging.getLogger("spillway")

GIB = 1 << 30


GB, PERCENT = "GB", "percent"
NO_PROFILE = "none"
# The card and the RAM in GB.
PROFILES = {
    f"{card} GB card, {ram} GB RAM": (card, ram) for card, ram in ((6, 16), (8, 16), (12, 32), (16, 32), (24, 64))
}


def _gigabytes(name: str, tooltip: str) -> io.Input:
    return gigabytes_input(name, f"{tooltip} In the unit; -1 leaves it to Spillway.")


def _of_profile(profile: str) -> dict[str, float]:
    """Give the amounts in GB that a profile stands for: all of the card but the headroom, and a quarter of the RAM."""
    if profile == NO_PROFILE:
        return {}
    card, ram = PROFILES[profile]
    headroom = min(max(card / 20, 0.5), 2.0)
    room = card - headroom
    return {"vram_gb": room, "headroom_gb": headroom, "pinned_gb": ram / 4, "all_models_gb": room}


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
                    tooltip="LoRAs on a quantised model. merge: rounded together with the weight, free at every step. "
                    "side branch: kept beside it, exact, a little slower. auto: merge where that rounds no worse, and "
                    "into weights of 8 bits from a file as ComfyUI does; keep it beside weights of 4 bits.",
                ),
                PolicyType.Input(
                    "policy",
                    optional=True,
                    tooltip="A policy whose rules, prefetch, streams and VBAR kind this one keeps, from a Placement "
                    "Rules node.",
                ),
                io.Combo.Input(
                    "unit",
                    options=[GB, PERCENT],
                    default=GB,
                    optional=True,
                    tooltip="GB: the amounts are in GB. percent: of the device's memory, and pinned_gb of the RAM.",
                ),
                io.Combo.Input(
                    "profile",
                    options=[NO_PROFILE, *PROFILES],
                    default=NO_PROFILE,
                    optional=True,
                    tooltip="Amounts for a card and a RAM of that size, for each amount that is -1: all of the card "
                    "but the headroom, for each model and for all together, and a quarter of the RAM for pins.",
                ),
                gigabytes_input(
                    "all_models_gb",
                    "The most device memory that the weights of all Spillway models may hold together while this "
                    "workflow runs. Of several such nodes the smallest holds. In the unit; -1 sets no such limit.",
                    optional=True,
                ),
                io.Boolean.Input(
                    "whole_graph",
                    default=False,
                    optional=True,
                    tooltip="This policy is for all Spillway models of the workflow that have none of their own. No "
                    "wire is needed.",
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
        **more: Any,
    ) -> io.NodeOutput:
        policy, cap = cls.made(vram_gb, headroom_gb, pinned_gb, keep, priority, **more)
        # For values that came by wire. Others hold from the beginning of the prompt.
        graph_policy.add(policy if more.get("whole_graph") else None, cap)
        if model is None:
            missing = "Spillway Policy: its MODEL output is used, but no model is connected to its input."
            return io.NodeOutput(ExecutionBlocker(missing), policy)
        check_ours("Spillway Policy", model)
        model = model.clone()
        model.set_policy(policy)
        return io.NodeOutput(model, policy)

    @classmethod
    def made(
        cls,
        vram_gb: float,
        headroom_gb: float,
        pinned_gb: float,
        keep: str,
        priority: int,
        int8_lora: str = "auto",
        policy: Policy | None = None,
        unit: str = GB,
        profile: str = NO_PROFILE,
        all_models_gb: float = AUTO,
        whole_graph: bool = False,
    ) -> tuple[Policy, int | None]:
        """Make the policy of these inputs, and the cap over all models in bytes -> (policy, cap or None)."""
        amounts = {"vram": vram_gb, "headroom": headroom_gb, "pinned": pinned_gb, "all_models": all_models_gb}
        of_profile = _of_profile(profile)
        fields: dict[str, Any] = {}
        for name, amount in amounts.items():
            value = given("Spillway Policy", f"{name}_gb", amount)
            if value is None:
                value = of_profile.get(f"{name}_gb")
                fields[f"{name}_bytes"] = None if value is None else int(value * GIB)
            elif unit == GB:
                fields[f"{name}_bytes"] = int(value * GIB)
            elif value > 100:
                raise ValueError(f"Spillway Policy: {name}_gb is {value:g} percent; give 0 to 100, or -1.")
            else:
                fields[f"{name}_bytes"], fields[f"{name}_share"] = None, value / 100
        cap, share = fields.pop("all_models_bytes"), fields.pop("all_models_share", None)
        if share is not None:
            cap = int(share * comfy.model_management.get_total_memory(comfy.model_management.get_torch_device()))
        base = policy or Policy()
        return base.with_changes(**fields, keep=keep, priority=priority, int8_lora=int8_lora), cap


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
                gigabytes_input(
                    "ram_gb",
                    "The most RAM that outputs may take while this workflow runs, however much is free. In GB; -1 "
                    "leaves it to the settings, where there is no limit. Of several such nodes the smallest holds.",
                    step=0.5,
                    optional=True,
                ),
            ],
            outputs=[io.AnyType.Output("value_out", display_name="value", tooltip="What came in.")],
        )

    @classmethod
    def execute(
        cls, value: Any, headroom_gb: float, never_evict: bool, disk_gb: float = AUTO, ram_gb: float = AUTO
    ) -> io.NodeOutput:
        headroom = given("Cache Policy (Spillway)", "headroom_gb", headroom_gb)
        disk = given("Cache Policy (Spillway)", "disk_gb", disk_gb)
        cap = given("Cache Policy (Spillway)", "ram_gb", ram_gb)
        cache = current_cache()
        if cache is None:
            log.warning("[Spillway] cache policy: it has no effect, as ComfyUI's own output cache is in use.")
            return io.NodeOutput(value)
        if headroom is not None:
            cache.set_headroom(headroom)
        if disk is not None:
            cache.set_disk(disk)
        if cap is not None:
            cache.set_cap(cap)
        concerned = cache.engine.protect(value, never_evict)
        if never_evict:
            cache.engine.ledger.decide(f"never evicts {in_words(concerned)}: asked for by a Cache Policy node")
        return io.NodeOutput(value)
