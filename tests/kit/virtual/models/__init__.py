"""Architectures by their real shapes, read from ComfyUI's source. Each function makes one, in ComfyUI's order of
modules.

Left out: biases of norms that have none, convolutions' strides, and whatever holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..layers import Model
from .image import flux, qwen_image, z_image
from .text import gemma_12b, umt5_xxl
from .video import ltx_2, wan_14b

MODELS: dict[str, Callable[[], Model]] = {
    "Flux 1024": partial(flux, 4096),
    "Flux 512": partial(flux, 1024),
    "Qwen-Image 1328": qwen_image,
    "Z-Image 1024": z_image,
    "Wan 14B 480p, 81 frames": partial(wan_14b, 21),
    "Wan 14B 480p, 17 frames": partial(wan_14b, 5),
    "LTX-2 512p, 121 frames": ltx_2,
    "UMT5-XXL": umt5_xxl,
    "Gemma 12B": gemma_12b,
}
