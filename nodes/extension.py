"""The list of the pack's nodes, as ComfyUI's V3 API asks for it."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from ..cache import comfy_cache
from ..ops.never_raises import never_raises
from ..ops.partial_file import sweep_noted
from ..patcher.comfy_save_target import journal
from . import routes
from .cache_policy import SpillwayCachePolicy
from .compile import INT8LazyTorchCompile
from .load import SpillwayLoadCheckpoint, SpillwayLoadCLIP, SpillwayLoadDiffusionModel, SpillwayLoadVAE
from .lora import SpillwayLoraLoader, SpillwayLoraLoaderModelOnly, SpillwayLoraStack
from .make_dynamic import SpillwayMakeDynamic
from .memory import SpillwayDeviceControl, SpillwayMemoryReport
from .merge import SpillwayMergeModels
from .policy import SpillwayPolicy
from .probe import SpillwayProbeModel
from .save import SpillwaySaveCheckpoint, SpillwaySaveDiffusionModel
from .save_lora import SpillwaySaveLora
from .vae import SpillwayVAEDecode, SpillwayVAEEncode

log = logging.getLogger("spillway")


class SpillwayExtension(ComfyExtension):
    async def on_load(self) -> None:
        """Before the executor is built: its output cache is ours from then on, unless a flag or a setting says no.

        And what an earlier run was killed while it saved is removed.
        """
        with never_raises("output cache: putting it in place of ComfyUI's own"):
            comfy_cache.install()
        with never_raises("adding /spillway/memory and /spillway/free to the server"):
            routes.install()
        with never_raises("removing what an earlier run left unfinished"):
            for path in sweep_noted(journal()):
                log.info("[Spillway] removed %s, which an earlier run left unfinished", path)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SpillwayLoadDiffusionModel,
            SpillwayLoadCheckpoint,
            SpillwayLoadCLIP,
            SpillwayLoadVAE,
            SpillwayMakeDynamic,
            SpillwayLoraLoader,
            SpillwayLoraLoaderModelOnly,
            SpillwayLoraStack,
            SpillwayPolicy,
            INT8LazyTorchCompile,
            SpillwayMergeModels,
            SpillwaySaveDiffusionModel,
            SpillwaySaveCheckpoint,
            SpillwaySaveLora,
            SpillwayProbeModel,
            SpillwayCachePolicy,
            SpillwayDeviceControl,
            SpillwayMemoryReport,
            SpillwayVAEDecode,
            SpillwayVAEEncode,
        ]
