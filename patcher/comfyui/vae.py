"""Runs VAEs: makes room first, tries again after a full eviction, and tiles last."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ...ops.device.out_of_memory import is_out_of_memory
from ...ops.errors import SpillwayError
from ...ops.ram.garbage import collect_garbage
from .running import drop_unloaded, free_models, free_pins

log = logging.getLogger("spillway")

# ComfyUI goes over to these by itself when memory runs out without tiles.
TILED_WAYS = (
    *("decode_tiled_", "decode_tiled_1d", "decode_tiled_3d", "_decode_tiled_owned"),
    *("encode_tiled_", "encode_tiled_1d", "encode_tiled_3d", "_encode_tiled_owned"),
)
PLAIN = "plain"
AFTER_EVICTION = "plain, after everything else was evicted"
FRAMES_A_TILE, FRAMES_OVERLAP = 64, 8


class _OutOfRoom(SpillwayError, Exception):
    """Stands for the out-of-memory error that ComfyUI has caught and answers by tiling."""


def decode(vae: Any, latent: torch.Tensor, tile_size: int, evict: Callable[[], Any]) -> tuple[torch.Tensor, str]:
    """Decode latents -> (images [N, height, width, channels], how). tile_size: in pixels, for the last resort.

    evict: frees what else can be freed (the output cache). Raises what the VAE raises, save for lack of memory before
    the last resort.
    """

    def tiled() -> torch.Tensor:
        return vae.decode_tiled(latent, **_tiles(vae, tile_size, vae.spacial_compression_decode()))  # type: ignore[no-any-return]

    images, how = _in_turn(vae, vae.memory_used_decode, latent, lambda v: v.decode(latent), tiled, tile_size, evict)
    if images.ndim == 5:  # a video's batch and frames are one
        images = images.reshape(-1, *images.shape[-3:])
    return images, how


def encode(vae: Any, pixels: torch.Tensor, tile_size: int, evict: Callable[[], Any]) -> tuple[torch.Tensor, str]:
    """Encode images [N, height, width, channels] -> (latent, how), as `decode` does."""

    def tiled() -> torch.Tensor:
        return vae.encode_tiled(pixels, **_tiles(vae, tile_size, 1))  # type: ignore[no-any-return]

    shape = pixels.movedim(-1, 1)
    return _in_turn(vae, vae.memory_used_encode, shape, lambda v: v.encode(pixels), tiled, tile_size, evict)


def _in_turn(
    vae: Any,
    estimate: Callable[[Any, Any], float],
    work: torch.Tensor,
    untiled: Callable[[Any], torch.Tensor],
    tiled: Callable[[], torch.Tensor],
    tile_size: int,
    evict: Callable[[], Any],
) -> tuple[torch.Tensor, str]:
    drop_unloaded()
    comfy.model_management.free_memory(_estimated(vae, estimate, work), vae.device)
    refusing = _without_tiling(vae)
    for how in (PLAIN, AFTER_EVICTION):
        result = _attempt(lambda: untiled(refusing))
        if result is not None:
            return result, how
        log.warning("[Spillway] VAE: out of memory (%s); freeing everything else", how)
        free_everything(vae, evict)
    return tiled(), f"tiled, {tile_size} pixels a tile: it did not fit otherwise"


def _attempt(work: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """Give the result, or None where memory ran out.

    The error is gone when this returns. It holds tensors, which could not be freed while it lives.
    """
    try:
        return work()
    except _OutOfRoom:
        return None
    except Exception as error:
        if not is_out_of_memory(error) and not comfy.model_management.is_oom(error):
            raise
        return None


def _without_tiling(vae: Any) -> Any:
    """Copy a VAE. The copy raises _OutOfRoom where ComfyUI's would tile at once."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise _OutOfRoom

    refusing = copy.copy(vae)
    for name in TILED_WAYS:
        if hasattr(vae, name):
            setattr(refusing, name, refuse)
    return refusing


def _estimated(vae: Any, estimate: Callable[[Any, Any], float], work: torch.Tensor) -> float:
    try:
        return estimate(work.shape, vae.vae_dtype)
    except Exception:  # some VAEs' estimates want another shape. ComfyUI makes room too.
        return 0.0


def _tiles(vae: Any, tile_size: int, compression: int) -> dict[str, Any]:
    temporal = vae.temporal_compression_decode()
    tile, overlap = tile_size // compression, tile_size // 8 // compression
    tiles = {"tile_x": tile, "tile_y": tile, "overlap": overlap, "tile_t": None, "overlap_t": None}
    if temporal is not None:
        frames = max(2, FRAMES_A_TILE // temporal) if compression != 1 else FRAMES_A_TILE
        overlap_t = max(1, FRAMES_OVERLAP // temporal) if compression != 1 else FRAMES_OVERLAP
        tiles.update(tile_t=frames, overlap_t=overlap_t)
    return tiles


def free_everything(vae: Any, evict: Callable[[], Any]) -> None:
    """Take all models off all devices and free their pins. Call `evict` too where the VAE computes in RAM."""
    free_models()
    free_pins()
    if vae.device.type == "cpu":
        evict()
    collect_garbage()
    comfy.model_management.soft_empty_cache()
