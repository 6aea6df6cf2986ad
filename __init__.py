"""Spillway: runs models larger than the memory they are given. ComfyUI imports this file. It does nothing else."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Return the pack's nodes. ComfyUI's V3 API calls this by its name."""
    from .nodes.extension import SpillwayExtension

    return SpillwayExtension()
