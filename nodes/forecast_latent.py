"""Finds how large a latent of a prompt is, without making it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import folder_paths
from comfy_execution.graph_utils import is_link
from PIL import Image

from ..patcher.comfyui.forecast.sampling import Latent

GUESS = Latent(1024, 1024)
MOST_STEPS = 200
LATENTS = ("samples", "latent_image", "latent", "pixels", "image", "positive")


def latent_of(prompt: dict[str, Any], link: list[Any], note: Callable[..., None]) -> tuple[Latent, str | None]:
    """Give the size of a latent, and the node that says how many pictures it has. note: is told of what is guessed.

    Walks back to the node that names a width and a height, or to an image's file.
    """
    batch_of, factor, repeats = None, 1.0, 1
    for _ in range(MOST_STEPS):
        name = str(link[0])
        node = prompt.get(name)
        if node is None:
            break
        inputs = node["inputs"]
        factor *= _number(inputs.get("scale_by"), 1.0)
        repeats *= int(_number(inputs.get("amount"), 1))
        sizes = [_number(inputs.get(side), 0) for side in ("width", "height")]
        batch = int(_number(inputs.get("batch_size"), 1))
        if batch_of is None and "batch_size" in inputs and not is_link(inputs["batch_size"]):
            batch_of = name
        if min(sizes) > 0:
            across, down = (max(8, int(side * factor)) for side in sizes)
            length = int(_number(inputs.get("length"), 1))
            return Latent(across, down, max(1, batch) * repeats, max(1, length)), batch_of
        if node["class_type"] in ("LoadImage", "LoadImageMask"):
            size = _of_file(inputs.get("image"))
            if size is not None:
                return Latent(int(size[0] * factor), int(size[1] * factor), repeats), None
        link = next((inputs[one] for one in LATENTS if is_link(inputs.get(one))), None)  # type: ignore[assignment]
        if link is None:
            break
    note("size")
    return GUESS, None


def _number(value: Any, default: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 < value < 1 << 20 else default


def _of_file(name: Any) -> tuple[int, int] | None:
    """Give the size of an image in one of ComfyUI's folders, which its header says."""
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    try:
        path = os.path.realpath(folder_paths.get_annotated_filepath(str(name)))
        if not any(path.startswith(os.path.realpath(folder) + os.sep) for folder in folders):
            return None
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError):
        return None
