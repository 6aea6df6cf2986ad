"""Lists the pack's nodes for ComfyUI's V3 API, and sets the pack up when it is loaded."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from ..cache.comfyui import disk
from ..cache.comfyui import install as output_cache
from ..ops.files.partial_file import sweep, sweep_noted
from ..ops.never_raises import never_raises
from ..patcher.comfyui import graph_policy, loads, lost_files, run_record
from ..patcher.comfyui.forecast import learning
from ..patcher.comfyui.saving.target import journal
from . import between_prompts, compare, log_streams, manage, routes
from .compile import SpillwayLazyTorchCompile
from .convert import SpillwayConvertToSafetensors
from .forecast import SpillwayMemoryForecast
from .graph_policy import read
from .load import (
    SpillwayLoadCheckpoint,
    SpillwayLoadCLIP,
    SpillwayLoadDiffusionModel,
    SpillwayLoadVAE,
    SpillwayMakeDynamic,
)
from .load_companions import LOADERS
from .lora import SpillwayLoraLoader, SpillwayLoraLoaderModelOnly, SpillwayLoraStack
from .lora_growing import SpillwayGrowingLoraStack, SpillwayLora
from .memory import SpillwayDeviceControl, SpillwayMemoryReport
from .merge import SpillwayMergeModels
from .merge_blocks import BLOCK_MERGES
from .old_ids import free_old_ids, tell_of_replacements
from .policy import SpillwayCachePolicy, SpillwayPolicy
from .probe import SpillwayProbeModel
from .quantise import SpillwayQuantiseModel
from .remote import SpillwayRemoteModelFile
from .rules import SpillwayPlacementRules
from .save import SpillwaySaveCheckpoint, SpillwaySaveDiffusionModel, SpillwaySaveLora
from .scan import SpillwayScanModels
from .self_test import SpillwaySelfTest
from .tiling import SpillwaySeamlessTiling
from .vae import SpillwayVAEDecode, SpillwayVAEEncode

log = logging.getLogger("spillway")


class SpillwayExtension(ComfyExtension):
    async def on_load(self) -> None:
        """Put the output cache and the routes in place, and remove files that a killed run left unfinished.

        ComfyUI calls this before it builds the executor, which gets the cache unless a flag or a setting says no.
        """
        with never_raises("letting any text be written to the log"):
            log_streams.install()
        with never_raises("output cache: putting it in place of ComfyUI's own"):
            output_cache.install()
        with never_raises("adding /spillway/memory and /spillway/free to the server"):
            routes.install()
        with never_raises("telling ComfyUI which nodes took the place of older ones"):
            await tell_of_replacements()
        with never_raises("listening to the end of prompts"):
            loads.install_prompt_end()
        with never_raises("listening to the beginning of prompts"):
            graph_policy.install(read)
        with never_raises("looking for files that are cut short while a node runs"):
            lost_files.install()
        with never_raises("recording what each node takes"):
            run_record.install()
        with never_raises("learning from what runs take"):
            learning.install()
        with never_raises("managing every loader"):
            compare.install()
            manage.install()
        # Last, as a prompt waits before anything else is done for it.
        with never_raises("holding off prompts while models are freed"):
            between_prompts.install()
        with never_raises("removing what an earlier run left unfinished"):
            for path in [*sweep_noted(journal()), *sweep(disk.folder())]:
                log.info("[Spillway] removed %s, which an earlier run left unfinished", path)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SpillwayLoadDiffusionModel,
            SpillwayLoadCheckpoint,
            SpillwayLoadCLIP,
            SpillwayLoadVAE,
            *LOADERS,
            SpillwayMakeDynamic,
            SpillwayQuantiseModel,
            SpillwayLoraLoader,
            SpillwayLoraLoaderModelOnly,
            SpillwayLoraStack,
            SpillwayLora,
            SpillwayGrowingLoraStack,
            SpillwayPolicy,
            SpillwayPlacementRules,
            SpillwayLazyTorchCompile,
            SpillwayMergeModels,
            *BLOCK_MERGES,
            SpillwaySeamlessTiling,
            SpillwaySaveDiffusionModel,
            SpillwaySaveCheckpoint,
            SpillwaySaveLora,
            SpillwayRemoteModelFile,
            SpillwayProbeModel,
            SpillwayScanModels,
            SpillwayConvertToSafetensors,
            SpillwayCachePolicy,
            SpillwayDeviceControl,
            SpillwayMemoryReport,
            SpillwayMemoryForecast,
            SpillwaySelfTest,
            SpillwayVAEDecode,
            SpillwayVAEEncode,
            *free_old_ids(),
        ]
