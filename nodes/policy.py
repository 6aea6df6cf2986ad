"""The node that says how much memory a model may take."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..patcher.comfy_load import is_ours
from ..patcher.policy import Policy
from .gigabytes import gigabytes_input, given
from .inputs import CheckedNode
from .types import CATEGORY, PolicyType

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
                _gigabytes("vram_gb", "The most device memory that the weights may hold; 0 keeps none there."),
                _gigabytes("headroom_gb", "Device memory to keep free for the computation and other programs."),
                _gigabytes(
                    "pinned_gb", "Page-locked RAM for weights that are not on the device; makes their transfers faster."
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
                    tooltip="LoRAs on a model in INT8. merge: rounded together with the weight, free at every step. "
                    "side branch: kept beside it, exact, a little slower. auto: merge where that rounds no worse.",
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
