"""Spillway: runs models larger than the memory they are given. What ComfyUI imports; nothing else happens here."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """ComfyUI's V3 entry point: the pack's nodes."""
    from .nodes.extension import SpillwayExtension

    return SpillwayExtension()
