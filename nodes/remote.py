"""Brings model files from elsewhere, and lets loaders use them while they come."""

from __future__ import annotations

import logging
import os

import folder_paths
from comfy_api.latest import io, ui

from ..ops import settings
from ..ops.remote.fetch import fetch, token, wait_for
from ..ops.remote.store import file_name, without_secrets
from ..patcher.comfyui.progress import Progress
from .addresses import check_address
from .any_folder import USUAL_FOLDERS, place_of
from .checked_node import CheckedNode
from .inputs import CATEGORY

log = logging.getLogger("spillway")

FOLDERS = (
    *USUAL_FOLDERS,
    "model_patches",
    "upscale_models",
    "audio_encoders",
)
# One that makes no sense is named at the start, and not when somebody's download is refused.
settings.variable(settings.REMOTE)
# Formats whose parts lie where their header says.
SUFFIXES = (".safetensors", ".sft", ".gguf")


def _folders() -> list[str]:
    """List the folders that this ComfyUI has."""
    return [folder for folder in FOLDERS if folder in folder_paths.folder_names_and_paths]


def _name(address: str, name: str) -> str:
    """Return the name that the file gets. Raises ValueError for one that is none, or of no file that can be used."""
    name = (name or file_name(address)).replace("\\", "/").strip("/")
    if not name or any(part in ("", ".", "..") for part in name.split("/")) or ":" in name or "\0" in name:
        raise ValueError(
            f"Remote Model File: '{name}' is no name for a file in ComfyUI's models folder. Give one in 'name', such "
            "as model.safetensors."
        )
    if not name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"Remote Model File: '{name}' is no safetensors or GGUF file, and no other can be used while it comes. "
            "Download it with a browser, and convert a pickle with Convert to Safetensors (Spillway). Where the "
            "address does not end with the file's name, give that in 'name'."
        )
    return name


def _path(folder: str, name: str) -> str:
    """Return the path of the file that is there, or that will be."""
    return folder_paths.get_full_path(folder, name) or os.path.join(place_of(folder), name)


class SpillwayRemoteModelFile(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayRemoteModelFile",
            display_name="Remote Model File (Spillway)",
            category=CATEGORY,
            description="Brings a model file from a web server, a bucket or a network share into ComfyUI's models "
            "folder. Spillway's loaders use it at once: what a layer needs comes first, and the first step runs behind "
            "the download.",
            search_aliases=[
                "download model",
                "model from url",
                "hugging face",
                "huggingface",
                "s3",
                "http",
                "fsspec",
                "nas",
                "stream model",
                "remote",
            ],
            inputs=[
                io.String.Input(
                    "address",
                    tooltip="Where the file lies: https://server/model.safetensors, s3://bucket/file, smb://, sftp://, "
                    "gs://, file:// or whatever else fsspec knows. The server must send parts of files.",
                ),
                io.Combo.Input(
                    "folder",
                    options=_folders(),
                    default="diffusion_models",
                    tooltip="The folder below ComfyUI's models that the file belongs into: that of the loader.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    optional=True,
                    tooltip="The name that the file gets there. Empty for the one in the address. A file that is there "
                    "already is used as it is.",
                ),
                io.Boolean.Input(
                    "wait",
                    default=False,
                    optional=True,
                    tooltip="Wait until all of the file has come, with a progress bar, as to fetch models ahead of "
                    "their use.",
                ),
            ],
            outputs=[
                io.Combo.Output(
                    "file",
                    tooltip="The file's name. Connect it to the file input of a Spillway loader for that folder.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, address: str, folder: str, name: str = "", wait: bool = False) -> str:
        if address is None or folder is None or name is None:  # over a wire, and said by whoever sends it
            return ""
        return token(_path(folder, _name(address, name)))

    @classmethod
    def execute(cls, address: str, folder: str, name: str = "", wait: bool = False) -> io.NodeOutput:
        address = address.strip()
        name = _name(address, name)
        check_address(address)
        coming = fetch(address, _path(folder, name))
        if coming is not None and wait:
            wait_for(coming, Progress())
        if coming is None:
            words = f"{name} is in models/{folder} already"
        elif coming.is_whole:
            words = f"{name} has come into models/{folder}"
        else:
            words = f"{name} comes from {without_secrets(address)} into models/{folder}"
        log.info("[Spillway] %s", words)
        return io.NodeOutput(name, ui=ui.PreviewText(words))
