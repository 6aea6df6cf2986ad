"""Write small model files of real architectures, with seeded random weights.

The names and shapes of a file are read off ComfyUI's own module, built on the meta device, so ComfyUI's own loaders
accept it.  Nothing of the model is ever held in memory: tensors are streamed one by one from a small pool of normal
numbers, at about the speed of the disk, so a 2 GB file is cheap.  The statistics (linear weights ~ N(0, 1/fan_in),
norm weights near 1, small biases) keep the activations finite and let the output depend on every tensor.

Every builder takes ``path``, ``dtype``, ``seed`` and ``drop`` (keys to leave out), and returns ``str(path)``.
"""

import functools

from kit.comfyui.on_device import weights_at_once

from .companions import (
    SIGLIP,
    SMALL_SIGLIP,
    compact,
    encoders_as,
    redux,
    sd15_controlnet,
    siglip,
    two_layers_of_audio,
    wav2vec,
)
from .diffusion_models import flux, flux_as_diffusers, lumina2, qwen_image, sd15_unet, wan, z_image
from .loras import lora
from .model_patches import (
    SMALL_USO,
    patch_anima_lllite,
    patch_qwen_diffsynth,
    patch_uso,
    patch_wan_uni3c,
    patch_z_image_control,
    small_patches,
)
from .small_lumina import accept_small_lumina
from .text_encoders import (
    CLIP_G_SMALL,
    SMALL_LLAMAS,
    T5XXL_SMALL,
    T5XXL_SMALL_OPTIONS,
    UMT5_SMALL,
    clip_g_small,
    clip_l,
    qwen3_06b,
    small_llama,
    small_llama_options,
    small_options,
    t5_base,
    t5xxl_small,
    umt5_small,
)
from .vaes import flux_vae, sd_vae, wan_vae
from .whole import sd15, small_clip_vision, unclip
from .writing import Noise, read_header, write
from .wrong_files import missing_key, not_a_model, truncated, wrong_header

__all__ = [
    "CLIP_G_SMALL",
    "SIGLIP",
    "SMALL_LLAMAS",
    "SMALL_SIGLIP",
    "SMALL_USO",
    "T5XXL_SMALL",
    "T5XXL_SMALL_OPTIONS",
    "UMT5_SMALL",
    "Noise",
    "accept_small_lumina",
    "clip_g_small",
    "clip_l",
    "compact",
    "encoders_as",
    "flux",
    "flux_as_diffusers",
    "flux_vae",
    "lora",
    "lumina2",
    "missing_key",
    "not_a_model",
    "patch_anima_lllite",
    "patch_qwen_diffsynth",
    "patch_uso",
    "patch_wan_uni3c",
    "patch_z_image_control",
    "qwen3_06b",
    "qwen_image",
    "read_header",
    "redux",
    "sd15",
    "sd15_controlnet",
    "sd15_unet",
    "sd_vae",
    "siglip",
    "small_clip_vision",
    "small_llama",
    "small_llama_options",
    "small_options",
    "small_patches",
    "t5_base",
    "t5xxl_small",
    "truncated",
    "two_layers_of_audio",
    "umt5_small",
    "unclip",
    "wan",
    "wan_vae",
    "wav2vec",
    "write",
    "wrong_header",
    "z_image",
]


HAS_ALL = (0, 33)


def _with_weights(build):
    @functools.wraps(build)
    def wrapped(*args, **kwargs):
        try:
            with weights_at_once():  # the module that names and shapes are read off
                return build(*args, **kwargs)
        except ModuleNotFoundError as error:
            if not _is_old() or not (error.name or "").startswith("comfy."):
                raise
            import pytest

            pytest.skip(f"this ComfyUI has no {error.name}")

    return wrapped


def _is_old():
    """Whether ComfyUI is older than the one that has all the architectures of this folder."""
    from comfyui_version import __version__

    return tuple(int(number) for number in __version__.split(".")[:2]) < HAS_ALL


for _name in __all__:
    if "path" in getattr(getattr(globals()[_name], "__code__", None), "co_varnames", ()):
        globals()[_name] = _with_weights(globals()[_name])
