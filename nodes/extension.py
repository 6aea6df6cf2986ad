"""The list of the pack's nodes, as ComfyUI's V3 API asks for it."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from ..ops.partial_file import sweep_noted
from ..patcher.comfy_save_target import journal
from .load import SpillwayLoadCheckpoint, SpillwayLoadCLIP, SpillwayLoadDiffusionModel, SpillwayLoadVAE
from .make_dynamic import SpillwayMakeDynamic
from .merge import SpillwayMergeModels
from .policy import SpillwayPolicy
from .probe import SpillwayProbeModel
from .save import SpillwaySaveCheckpoint, SpillwaySaveDiffusionModel
from .save_lora import SpillwaySaveLora

log = logging.getLogger("spillway")


class SpillwayExtension(ComfyExtension):
    async def on_load(self) -> None:
        """Remove what an earlier run was killed while it saved."""
        for path in sweep_noted(journal()):
            log.info("[Spillway] removed %s, which an earlier run left unfinished", path)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SpillwayLoadDiffusionModel,
            SpillwayLoadCheckpoint,
            SpillwayLoadCLIP,
            SpillwayLoadVAE,
            SpillwayMakeDynamic,
            SpillwayPolicy,
            SpillwayMergeModels,
            SpillwaySaveDiffusionModel,
            SpillwaySaveCheckpoint,
            SpillwaySaveLora,
            SpillwayProbeModel,
        ]
