"""Makes pictures that can be laid side by side without a seam."""

from __future__ import annotations

import copy
from typing import Any

from comfy_api.latest import io

from ..patcher.comfyui.patches.tiling import AXES, tiled
from .checked_node import CheckedNode
from .inputs import CATEGORY
from .ours import check_ours


class SpillwaySeamlessTiling(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwaySeamlessTiling",
            display_name="Seamless Tiling (Spillway)",
            category=CATEGORY,
            description="Lets the convolutions of a model and its VAE go on at the opposite edge of the picture, so "
            "that pictures can be laid side by side without a seam. For U-Nets such as SD 1.5 and SDXL.",
            search_aliases=["seamless", "tile", "tiling", "circular padding", "texture", "pattern", "panorama"],
            inputs=[
                io.Combo.Input(
                    "axes",
                    options=list(AXES),
                    default="x and y",
                    tooltip="Along which axes the pictures tile. x: side by side. y: one above the other.",
                ),
                io.Model.Input("model", optional=True, tooltip="A MODEL from a Spillway node."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE from a Spillway node. Without it a seam may remain."),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that tiles. The one that came in is not changed."),
                io.Vae.Output(tooltip="The VAE that tiles. The one that came in is not changed."),
            ],
        )

    @classmethod
    def execute(cls, axes: str, model: Any = None, vae: Any = None) -> io.NodeOutput:
        if model is None and vae is None:
            raise ValueError("Seamless Tiling (Spillway): connect 'model' or 'vae'.")
        for name, patcher in (("MODEL", model), ("VAE", getattr(vae, "patcher", None))):
            if patcher is not None:
                check_ours("Seamless Tiling (Spillway)", patcher, name)
        tiling_vae = None
        if vae is not None:
            tiling_vae = copy.copy(vae)
            tiling_vae.patcher = tiled(vae.patcher, axes)
        return io.NodeOutput(None if model is None else tiled(model, axes), tiling_vae)
