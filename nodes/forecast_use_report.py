"""Makes the forecast of what stands beside the samplers of a prompt: its text encoders, and each use of a VAE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..ops.gguf.header import is_gguf
from ..patcher.comfyui.forecast.companions import Tile, foresee_text_encoder, foresee_vae
from ..patcher.comfyui.loading.load import TEXT_DTYPES
from ..patcher.policy import Policy
from .forecast_uses import TEXT, Use, uses, walk_use
from .forecast_walk import lora_paths
from .forecast_ways import Choice, better, four_bits, gguf_beside, note, swap, told_of, widget

MOST_USES = 8
# By ComfyUI's node for one piece: the one that cuts it into tiles, which has the same wires.
IN_TILES = {"VAEDecode": "VAEDecodeTiled", "VAEEncode": "VAEEncodeTiled"}
EDGES = (512, 256, 128)  # of tiles in pixels, the first with fewest seams
OVERLAP = 64


def told_of_uses(prompt: dict[str, Any], policy: Policy | None, cap: int | None) -> tuple[list[dict[str, Any]], int]:
    """Give what is told of each text encoder and each use of a VAE, and how many are not looked at.

    A text encoder is told of once, whoever asks it.
    """
    found: dict[tuple[Any, ...], tuple[str, str]] = {}
    for name, what in uses(prompt):
        found.setdefault((what, *prompt[name]["inputs"]["clip"]) if what == TEXT else (what, name), (name, what))
    told = [_use(prompt, name, what, policy, cap) for name, what in list(found.values())[:MOST_USES]]
    return told, max(0, len(found) - MOST_USES)


def _use(prompt: dict[str, Any], name: str, what: str, policy: Policy | None, cap: int | None) -> dict[str, Any]:
    def look(told: dict[str, Any]) -> None:
        use = walk_use(prompt, name, what, policy)
        use.loaded = lora_paths(use.loaded)
        now = told["forecast"] = _foreseen(use, cap)
        note(told, prompt, use)
        if now["streamed"] or not now["fits"]:
            ways = better(prompt, _choices(prompt, use), lambda other: _foreseen(other, cap), now)
            told["ways"] = list(ways) if what == TEXT else _first_that_fits(ways)

    return {**told_of(prompt, name, look), "what": what}


def _first_that_fits(ways: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the way with the largest tiles that fit, or else with the smallest."""
    last: list[dict[str, Any]] = []
    for way in ways:
        last = [way]
        if way["forecast"]["fits"]:
            break
    return last


def _foreseen(use: Use, cap: int | None) -> dict[str, Any]:
    if use.what == TEXT:
        return foresee_text_encoder(use.loaded, use.text, cap)
    return foresee_vae(use.loaded, use.latent, use.what, use.tile, cap, use.tiles_last)


def _choices(prompt: dict[str, Any], use: Use) -> Iterator[Choice[Use]]:
    """Give what could be set, with what would then be used."""
    yield from _formats(prompt, use) if use.what == TEXT else _tiles(use)


def _formats(prompt: dict[str, Any], use: Use) -> Iterator[Choice[Use]]:
    where, loaded = use.quantised_by or use.loader, use.loaded
    kind, four = prompt[where]["class_type"], four_bits()
    named = "weight_dtype" if kind == "SpillwayLoadCLIP" else "clip_dtype"
    if (use.ours or use.quantised_by) and four in TEXT_DTYPES and four != loaded.weight_dtype:
        yield "four_bits", where, widget(named, four), replace(use, loaded=replace(loaded, weight_dtype=four))
    if kind == "SpillwayLoadCLIP" and not is_gguf(loaded.path):
        for name, path in gguf_beside(loaded.path, "text_encoders"):
            other = replace(loaded, path=path, weight_dtype="default")
            yield "gguf", where, widget("clip_name1", name), replace(use, loaded=other)


def _tiles(use: Use) -> Iterator[Choice[Use]]:
    """Give tiles, the largest first: with them in place of one piece, or smaller ones than now."""
    for edge in EDGES:
        tiled = replace(use, tile=Tile(edge), tiles_last=False)
        if use.kind in IN_TILES:
            values = {"tile_size": edge, "overlap": min(OVERLAP, edge // 4), "temporal_size": Tile.frames}
            yield "tiled", use.id, swap(IN_TILES[use.kind], {**values, "temporal_overlap": 8}), tiled
        elif use.tile is not None and edge < use.tile.pixels:
            smaller = replace(use, tile=Tile(edge, use.tile.frames))
            yield "tiles", use.id, widget("tile_size", edge), smaller
