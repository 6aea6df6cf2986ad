"""Foresees what text encoders and VAEs take: their weights, and ComfyUI's own estimate of what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import sizes
from ..loads import expected_bytes
from .companion_sketch import sketch_text_encoder, sketch_vae
from .sampling import Latent
from .sketch import Loaded
from .use import foresee_use, place_of

# By what a VAE does, the layers that it does not use.
IDLE = {"decode": ("encoder.", "quant_conv."), "encode": ("decoder.", "post_quant_conv.")}


@dataclass(frozen=True)
class Tile:
    """What a VAE computes at once, in pixels of each side and in frames."""

    pixels: int
    frames: int = 64


def foresee_text_encoder(wanted: Loaded, text: str | None, all_models: int | None) -> dict[str, Any]:
    """Foresee the encoding of a prompt, ready for JSON. text: None where it is not known.

    all_models: the cap over all models, in bytes. Raises what the loaders raise.
    """
    clip, unknown = sketch_text_encoder(wanted)
    try:
        estimate = getattr(clip.cond_stage_model, "memory_estimation_function", None)
        needed = 0
        if estimate is not None and text is not None:
            needed = int(estimate(clip.tokenize(text), device=clip.patcher.load_device))
        if not needed:  # ComfyUI has no estimate for most text encoders
            unknown.append("text")
        told = foresee_use(clip.patcher, sizes.TEXT, needed, expected_bytes(needed), all_models, unknown)
        if told["learnt"]:
            told["unknown"] = [code for code in unknown if code != "text"]
        return told
    finally:
        clip.patcher.state.close()


def foresee_vae(
    wanted: Loaded, latent: Latent, way: str, tile: Tile | None, all_models: int | None, tiles_last: bool = False
) -> dict[str, Any]:
    """Foresee the use of a VAE, ready for JSON. tiled: whether it computes in tiles.

    way: 'decode' or 'encode'. tile: None for one piece. tiles_last: it goes over to tiles where one piece does not fit.
    Raises what the loaders raise, and ValueError for a VAE that knows no pictures.
    """
    vae = sketch_vae(wanted)
    try:
        if vae.latent_dim not in (2, 3):
            raise ValueError(f"{wanted.path}: this VAE is not for pictures, and nothing is foreseen for it.")
        told = _whole(vae, latent, way, None if tiles_last else tile, all_models)
        if tiles_last and not told["fits"]:
            return _whole(vae, latent, way, tile, all_models) | {"tiled": True}
        return told | {"tiled": tile is not None and not tiles_last}
    finally:
        vae.patcher.state.close()


def _whole(vae: Any, latent: Latent, way: str, tile: Tile | None, all_models: int | None) -> dict[str, Any]:
    shown, shape, tile_shown, piece = _shapes(vae, latent, way, tile)
    estimate = vae.memory_used_decode if way == "decode" else vae.memory_used_encode
    needed = max(1, int(estimate(piece, vae.vae_dtype)))
    model = vae.patcher.dynamic
    room = place_of(model, all_models).reach - model.total_bytes
    # ComfyUI computes as many pictures at once as there is room for by its estimate. Tiles come one by one.
    at_once = 1 if tile is not None else min(shape[0], max(1, room // needed))
    size = sizes.of_vae(way, shown, tile_shown)
    told = foresee_use(vae.patcher, size, needed * at_once, expected_bytes(needed), all_models, [], IDLE[way])
    return told | {"fits": told["peak"] <= max(room, 0) + model.total_bytes}


Shape = tuple[int, ...]


def _shapes(vae: Any, latent: Latent, way: str, tile: Tile | None) -> tuple[Shape, Shape, Shape, Shape]:
    """Give the shape that the VAE is called with, the one it computes, a tile's sides, and the shape of one tile.

    Without tiles the sides are empty, and the tile is the whole.
    """
    is_video = vae.latent_dim == 3
    if way == "decode":
        sides = vae.spacial_compression_decode()
        along = vae.temporal_compression_decode() or 1
        frames = ((latent.length - 1) // along + 1,) if is_video else ()
        shape: Shape = (latent.batch, vae.latent_channels, *frames, latent.height // sides, latent.width // sides)
        shown, side, most = shape, sides, max(2, tile.frames // along) if tile is not None else 0
    else:
        pictures = latent.batch * latent.length
        shown = (pictures, latent.height, latent.width, 3)
        whole = pictures, 3, latent.height, latent.width
        shape = (1, 3, pictures, *whole[2:]) if is_video and not getattr(vae, "not_video", False) else whole
        if is_video and getattr(vae, "not_video", False):
            shape = (pictures, 3, 1, *whole[2:])
        side, most = 1, tile.frames if tile is not None else 0
    if tile is None:
        return shown, shape, (), shape
    edge = tile.pixels // side
    bounded = (*shape[:2], *(min(most, count) for count in shape[2:-2]), *(min(edge, count) for count in shape[-2:]))
    return shown, shape, (edge, edge), bounded
