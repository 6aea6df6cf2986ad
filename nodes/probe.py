"""Says what is in a model file."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..ops.parts.index import is_index
from ..ops.remote.fetch import interruptible
from ..ops.remote.probe import probe_address
from ..patcher.comfyui.loading.probe import probe_file
from .addresses import check_address
from .any_folder import files_in, path_of, stamps_of
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice

log = logging.getLogger("spillway")

FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras", "controlnet", "clip_vision")


def _files() -> list[str]:
    return files_in(FOLDERS, lambda name: name.lower().endswith((".safetensors", ".sft", ".gguf")) or is_index(name))


class SpillwayProbeModel(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayProbeModel",
            display_name="Probe Model (Spillway)",
            category=CATEGORY,
            description="Says what is in a model file: architecture, parameters, number formats, quantisation, and "
            "whether it is a model or a LoRA. Only its header is read, so it takes no time and no memory.",
            search_aliases=["model info", "inspect model", "what model is this", "metadata", "dtype", "lora rank"],
            inputs=[
                OpenChoice(
                    "file",
                    options=_files(),
                    tooltip="A safetensors or GGUF file in ComfyUI's models folder, or the index of a model in several "
                    "files, and the folder that it lies in.",
                ),
                io.String.Input(
                    "address",
                    default="",
                    optional=True,
                    tooltip="In place of the file: an address such as https://server/model.safetensors or "
                    "s3://bucket/file. Only the header is brought.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="One fact a line, for Preview as Text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, address: str = "") -> Any:
        # What lies at an address may be another file each time.
        return float("nan") if address else stamps_of(file, FOLDERS)

    @classmethod
    def execute(cls, file: str, address: str = "") -> io.NodeOutput:
        if address:
            check_address(address)
            contents, comfyui_name = interruptible(lambda: probe_address(address)), ""
        else:
            contents, comfyui_name = probe_file(path_of("Probe Model", file, FOLDERS))
        words = contents.words + (f"\nComfyUI loads it as: {comfyui_name}" if comfyui_name else "")
        log.info("[Spillway] %s", words)
        return io.NodeOutput(words, ui=ui.PreviewText(words))
