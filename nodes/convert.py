"""Converts pickles to safetensors."""

from __future__ import annotations

import logging
import os

import folder_paths
from comfy_api.latest import io, ui

from ..ops.files.safetensors_header import PICKLES
from ..ops.pickles.convert import convert
from ..patcher.comfyui.progress import Progress
from ..patcher.comfyui.saving.target import journal
from .any_folder import files_in, path_of, stamps_of
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice

log = logging.getLogger("spillway")

BESIDE = "beside the file"
FOLDERS = (
    "checkpoints",
    "diffusion_models",
    "text_encoders",
    "vae",
    "loras",
    "controlnet",
    "clip_vision",
    "style_models",
    "upscale_models",
    "embeddings",
)


def _files() -> list[str]:
    return files_in(FOLDERS, lambda name: name.lower().endswith(PICKLES))


def _place(folder: str) -> str:
    """Return the place of ComfyUI's folder of models that is named like it. ComfyUI has older names for some first."""
    places = folder_paths.get_folder_paths(folder)
    place = next((path for path in places if os.path.basename(os.path.normpath(path)) == folder), places[0])
    os.makedirs(place, exist_ok=True)
    return place


class SpillwayConvertToSafetensors(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayConvertToSafetensors",
            display_name="Convert to Safetensors (Spillway)",
            category=CATEGORY,
            description="Makes a safetensors file of a pickle (.ckpt, .pt, .pth, .bin), which the loaders then read in "
            "parts. The pickle is not run: only tensors are taken out of it. Takes hardly any memory.",
            search_aliases=["convert ckpt", "pickle", "pt to safetensors", "pth", "bin", "convert model", "safe"],
            inputs=[
                OpenChoice(
                    "file",
                    options=_files(),
                    tooltip="A .ckpt, .pt, .pth or .bin file in ComfyUI's models folder, and the folder that it is in.",
                ),
                io.Combo.Input(
                    "folder",
                    options=[BESIDE, *FOLDERS],
                    default=BESIDE,
                    tooltip="Where to write the safetensors file, which has the same name: beside the file, or one of "
                    "ComfyUI's folders of models.",
                ),
            ],
            outputs=[io.String.Output("path", tooltip="The path of the safetensors file.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, folder: str = BESIDE) -> list[str]:
        return stamps_of(file, FOLDERS)

    @classmethod
    def execute(cls, file: str, folder: str = BESIDE) -> io.NodeOutput:
        path = path_of("Convert to Safetensors", file, FOLDERS)
        target = None if folder == BESIDE else _place(folder)
        done = convert(path, target, progress=Progress(), journal=journal())
        log.info("[Spillway] %s", done.words)
        return io.NodeOutput(str(done.path), ui=ui.PreviewText(done.words))
