"""Decodes and encodes with a VAE, and frees memory before cutting the picture into tiles."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..cache.comfyui.install import current_cache
from ..patcher.comfyui import vae as tiled_last
from .checked_node import CheckedNode
from .inputs import CATEGORY


def _tile_input() -> io.Input:
    return io.Int.Input(
        "tile_size",
        default=512,
        min=64,
        max=4096,
        step=64,
        tooltip="Edge of a tile in pixels, for tiling alone. Small tiles take less memory, but show seams.",
    )


def _how_output() -> io.Output:
    return io.String.Output(
        "how", display_name="how", tooltip="Which way it went: plain, plain after a full eviction, or tiled."
    )


def _evict() -> None:
    cache = current_cache()
    if cache is not None:
        cache.engine.evict(1 << 62, cache.needed(), reason="a VAE ran out of memory")


class SpillwayVAEDecode(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayVAEDecode",
            display_name="VAE Decode (Spillway)",
            category=CATEGORY,
            description="Decodes latents in one piece. If memory runs out it frees everything else and tries again, "
            "and cuts the picture into tiles only when that fails too.",
            search_aliases=["vae decode", "decode latent", "vae decode tiled", "vae out of memory", "low vram"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="A VAE from any loader."),
                _tile_input(),
            ],
            outputs=[io.Image.Output(tooltip="The decoded images."), _how_output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, tile_size: int) -> io.NodeOutput:
        latent = samples["samples"]
        if getattr(latent, "is_nested", False):
            latent = latent.unbind()[0]
        return io.NodeOutput(*tiled_last.decode(vae, latent, tile_size, _evict))


class SpillwayVAEEncode(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayVAEEncode",
            display_name="VAE Encode (Spillway)",
            category=CATEGORY,
            description="Encodes images in one piece. If memory runs out it frees everything else and tries again, "
            "and cuts the picture into tiles only when that fails too.",
            search_aliases=["vae encode", "encode image", "vae encode tiled", "vae out of memory", "low vram"],
            inputs=[
                io.Image.Input("pixels", tooltip="The images to encode."),
                io.Vae.Input("vae", tooltip="A VAE from any loader."),
                _tile_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The encoded latent."), _how_output()],
        )

    @classmethod
    def execute(cls, pixels: Any, vae: Any, tile_size: int) -> io.NodeOutput:
        latent, how = tiled_last.encode(vae, pixels, tile_size, _evict)
        return io.NodeOutput({"samples": latent}, how)
