"""The list of the pack's nodes, as ComfyUI's V3 API asks for it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..cache import comfy_cache
from . import routes
from .cache_policy import SpillwayCachePolicy
from .load import SpillwayLoadCheckpoint, SpillwayLoadCLIP, SpillwayLoadDiffusionModel, SpillwayLoadVAE
from .make_dynamic import SpillwayMakeDynamic
from .memory import SpillwayDeviceControl, SpillwayMemoryReport
from .policy import SpillwayPolicy
from .vae import SpillwayVAEDecode, SpillwayVAEEncode


class SpillwayExtension(ComfyExtension):
    async def on_load(self) -> None:
        """Before the executor is built: its output cache is ours from then on, unless a flag or a setting says no."""
        comfy_cache.install()
        routes.install()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SpillwayLoadDiffusionModel,
            SpillwayLoadCheckpoint,
            SpillwayLoadCLIP,
            SpillwayLoadVAE,
            SpillwayMakeDynamic,
            SpillwayPolicy,
            SpillwayCachePolicy,
            SpillwayDeviceControl,
            SpillwayMemoryReport,
            SpillwayVAEDecode,
            SpillwayVAEEncode,
        ]
