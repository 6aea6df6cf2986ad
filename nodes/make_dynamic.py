"""The node that turns models of other loaders into dynamic ones."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patcher.comfy_adopt import dynamic_clip, dynamic_model, dynamic_vae
from .inputs import CheckedNode
from .types import CATEGORY, policy_input


class SpillwayMakeDynamic(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayMakeDynamic",
            display_name="Make Dynamic (Spillway)",
            category=CATEGORY,
            description="Hands a MODEL from any other loader to Spillway, with the LoRAs and patches it carries; a "
            "CLIP and a VAE too. The models that come in are not changed.",
            search_aliases=["convert model", "low vram", "offload", "dynamic vram", "block swap"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from any loader, with or without LoRAs."),
                io.Clip.Input("clip", optional=True, tooltip="A CLIP that Spillway is to manage too."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE that Spillway is to manage too."),
                policy_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model and patches, managed by Spillway."),
                io.Clip.Output(tooltip="The same CLIP, managed by Spillway. Empty if none was connected."),
                io.Vae.Output(tooltip="The same VAE, managed by Spillway. Empty if none was connected."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any = None, vae: Any = None, policy: Any = None) -> io.NodeOutput:
        return io.NodeOutput(
            dynamic_model(model, policy),
            None if clip is None else dynamic_clip(clip, policy),
            None if vae is None else dynamic_vae(vae, policy),
        )
