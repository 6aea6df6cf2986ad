"""Says what is in all model files of ComfyUI's folders."""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..ops.files.file_state import file_state
from ..ops.scan import as_text, is_model_file, scan
from ..patcher.comfyui.progress import Progress
from .any_folder import USUAL_FOLDERS
from .checked_node import CheckedNode
from .inputs import CATEGORY
from .load import all_files, files_below

log = logging.getLogger("spillway")

ALL = "all of them"
FOLDERS = (
    *USUAL_FOLDERS,
    "model_patches",
    "ipadapter",
    "diffusers",
    "upscale_models",
    "audio_encoders",
    "embeddings",
)


def _known() -> list[str]:
    return [name for name in FOLDERS if name in folder_paths.folder_names_and_paths]


def _files(folder: str, contains: str) -> list[tuple[str, Path]]:
    """List (name in the table, path) of model files. A file in two of ComfyUI's folders is there once."""
    found: dict[str, str] = {}
    for kind in _known() if folder == ALL else [folder]:
        for place in folder_paths.get_folder_paths(kind):
            for name in files_below(place):
                if is_model_file(name) and contains.lower() in name.lower():
                    found.setdefault(str(Path(place, name)), f"{kind}/{name}")
    return sorted((name, Path(path)) for path, name in found.items())


class SpillwayScanModels(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayScanModels",
            display_name="Scan Models (Spillway)",
            category=CATEGORY,
            description="Makes a table of the model files in ComfyUI's folders: what each is, in which number format, "
            "which are there twice and which do not load. Only headers and a few samples are read.",
            search_aliases=["list models", "find duplicates", "model manager", "what models", "broken files", "disk"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[ALL, *_known()],
                    default=ALL,
                    tooltip="Which of ComfyUI's folders of models to look into, with what lies below.",
                ),
                io.String.Input(
                    "name_contains",
                    default="",
                    tooltip="Only files with this in their name or folder. Empty for all.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The table, for Preview as Text.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str = ALL, name_contains: str = "") -> list[str]:
        if folder not in (ALL, *_known()):
            return []
        files = _files(folder, name_contains)
        return [f"{name} {file_state(file)}" for name, path in files for file in all_files(str(path))]

    @classmethod
    def execute(cls, folder: str = ALL, name_contains: str = "") -> io.NodeOutput:
        words = as_text(scan(_files(folder, name_contains), Progress()))
        log.info("[Spillway] %s", words)
        return io.NodeOutput(words, ui=ui.PreviewText(words))
