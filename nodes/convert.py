"""Converts pickles to safetensors."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..ops.files.safetensors_header import is_pickle
from ..ops.parts.index import index_of
from ..ops.pickles.convert import convert
from ..patcher.comfyui.progress import Progress
from ..patcher.comfyui.saving.target import journal
from .any_folder import USUAL_FOLDERS, path_of, place_of, stamps_of
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice
from .load import files_below

log = logging.getLogger("spillway")

BESIDE = "beside the file"
FOLDERS = (
    *USUAL_FOLDERS,
    "upscale_models",
    "embeddings",
)


# Folders of diffusers models hold pickles too. What is made of them stays there.
SOURCES = (*FOLDERS, "diffusers")


def _files() -> list[str]:
    """List pickles. Those in several files are listed by their index, where it is beside them."""
    found = []
    for folder in SOURCES:
        for place in folder_paths.get_folder_paths(folder):
            names = (name for name in files_below(place) if is_pickle(name) and index_of(Path(place, name)) is None)
            found += [f"{folder}/{name}" for name in names]
    return sorted(set(found))


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
                    tooltip="A .ckpt, .pt, .pth or .bin file in ComfyUI's models folder, or the index of a model in "
                    "several, and the folder that it is in.",
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
        return stamps_of(file, SOURCES)

    @classmethod
    def execute(cls, file: str, folder: str = BESIDE) -> io.NodeOutput:
        path = path_of("Convert to Safetensors", file, SOURCES)
        target = None if folder == BESIDE else place_of(folder)
        done = convert(path, target, progress=Progress(), journal=journal())
        log.info("[Spillway] %s", done.words)
        return io.NodeOutput(str(done.path), ui=ui.PreviewText(done.words))
