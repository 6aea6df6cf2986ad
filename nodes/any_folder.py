"""Inputs that name a file and the folder of models that it lies in, as `loras/style.safetensors`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import folder_paths

from .load import file_stamps, model_names, model_path

# The folders of models that everybody has.
USUAL_FOLDERS = (
    "checkpoints",
    "diffusion_models",
    "text_encoders",
    "vae",
    "loras",
    "controlnet",
    "clip_vision",
    "style_models",
)


def files_in(folders: Sequence[str], accepts: Callable[[str], bool]) -> list[str]:
    """List the files of ComfyUI's folders whose name is accepted."""
    return [f"{folder}/{name}" for folder in folders for name in model_names(folder) if accepts(name)]


def stamps_of(file: str, folders: Sequence[str]) -> list[str]:
    """Say which file it is, as `file_stamps` does. Nothing for one that is in none of the folders."""
    folder, _, name = file.partition("/")
    return file_stamps(folder, name) if folder in folders else []


def path_of(node: str, file: str, folders: Sequence[str]) -> str:
    """Return the file's path. Raises ValueError, which names the node, for one that is in none of the folders."""
    folder, _, name = file.partition("/")
    if folder not in folders:
        raise ValueError(f"{node}: '{file}' is in none of the folders {', '.join(folders)}.")
    return model_path(folder, name)


def place_of(folder: str) -> str:
    """Return the place of ComfyUI's folder of models that is named like it, to write a file there.

    ComfyUI has older names for some first.
    """
    places = folder_paths.get_folder_paths(folder)
    place = next((path for path in places if os.path.basename(os.path.normpath(path)) == folder), places[0])
    os.makedirs(place, exist_ok=True)
    return place
