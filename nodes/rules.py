"""Says where weights of single layers lie, and in which dtypes. The nodes chain."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..patcher.policy import Policy, Rule
from .checked_node import CheckedNode
from .inputs import CATEGORY, PolicyType
from .ours import check_ours

AS_IT_IS = "as it is"
DTYPES = {
    AS_IT_IS: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class SpillwayPlacementRules(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayPlacementRules",
            display_name="Placement Rules (Spillway)",
            category=CATEGORY,
            description="Says where the weights of some layers lie while they are not in use, in which dtypes they are "
            "kept and computed, and whether they stay on the device. Connect several of these nodes one after the "
            "other: the first rule whose pattern matches a layer holds.",
            search_aliases=["block swap", "placement", "device map", "pin layers", "layer dtype", "prefetch", "vbar"],
            inputs=[
                PolicyType.Input(
                    "policy",
                    optional=True,
                    tooltip="A policy that this rule is added to, from another such node or a Spillway Policy node.",
                ),
                io.Model.Input("model", optional=True, tooltip="A MODEL from a Spillway node. It gets the policy."),
                io.String.Input(
                    "pattern",
                    default="*",
                    tooltip="The names of layers, with * for any text and ? for any letter, such as "
                    "diffusion_model.double_blocks.*. Empty adds no rule.",
                ),
                io.Combo.Input(
                    "offload",
                    options=["auto", "disk", "ram", "pin"],
                    default="auto",
                    tooltip="Where these weights lie while they are not on the device. disk: in their file alone. ram: "
                    "in ordinary memory. pin: in page-locked memory.",
                ),
                io.Combo.Input(
                    "storage_dtype",
                    options=list(DTYPES),
                    default=AS_IT_IS,
                    tooltip="The number format in which these weights lie on the device.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(DTYPES),
                    default=AS_IT_IS,
                    tooltip="The number format in which the layers get these weights.",
                ),
                io.Boolean.Input(
                    "resident",
                    default=True,
                    tooltip="False: these weights never stay on the device and are brought for every use.",
                ),
                io.Int.Input(
                    "prefetch",
                    default=-1,
                    min=-1,
                    max=64,
                    tooltip="How many layers are begun ahead at most, for the whole model. -1 leaves it as it is.",
                ),
                io.Int.Input(
                    "streams",
                    default=-1,
                    min=-1,
                    max=8,
                    tooltip="How many streams bring weights, for the whole model. 0 brings each when it is used. -1 "
                    "leaves it as it is.",
                ),
                io.Combo.Input(
                    "vbar",
                    options=[AS_IT_IS, "auto", "aimdo", "software"],
                    default=AS_IT_IS,
                    tooltip="Who manages the device memory of the whole model: comfy-aimdo, or Spillway itself.",
                ),
            ],
            outputs=[
                PolicyType.Output("policy_out", display_name="policy", tooltip="The policy with this rule added."),
                io.Model.Output(tooltip="The model with the policy. Empty if none was connected."),
            ],
        )

    @classmethod
    def execute(cls, model: Any = None, policy: Policy | None = None, **given: Any) -> io.NodeOutput:
        if model is not None:
            check_ours("Placement Rules (Spillway)", model)
        made = cls.made(policy=policy, **given)
        if model is not None:
            model = model.clone()
            model.set_policy(made)
        return io.NodeOutput(made, model)

    @classmethod
    def made(
        cls,
        pattern: str,
        offload: str,
        storage_dtype: str,
        compute_dtype: str,
        resident: bool,
        prefetch: int,
        streams: int,
        vbar: str,
        policy: Policy | None = None,
    ) -> Policy:
        """Make the policy of these inputs: the given one, with one more rule."""
        base = policy or Policy()
        changes: dict[str, Any] = {"prefetch": prefetch, "streams": streams}
        changes = {name: number for name, number in changes.items() if number >= 0}
        if vbar != AS_IT_IS:
            changes["vbar"] = vbar
        if pattern.strip():
            rule = Rule(
                pattern.strip(),
                offload,  # type: ignore[arg-type]
                DTYPES[storage_dtype],
                DTYPES[compute_dtype],
                resident,
            )
            changes["rules"] = (*base.rules, rule)
        return base.with_changes(**changes)
