"""Checkpoints that hold more than one model."""

import contextlib
import json
import os
import tempfile

import torch

from .diffusion_models import sd15_unet_entries
from .text_encoders import clip_l_entries
from .vaes import sd_vae_entries
from .writing import OPS, entries_of, prefixed, write


def sd15(
    path,
    dtype=torch.float16,
    mult=(1, 2),
    blocks=1,
    vae_decoder_channels=32,
    clip_layers=12,
    seed=0,
    drop=(),
    metadata=None,
):
    """A whole SD 1.5 checkpoint: UNet, CLIP-L and VAE.

    ComfyUI asks for 320 model channels, a context of 768 and convolutions around the attention; how many levels and
    blocks there are it reads from the file.  ``mult=(1, 2, 4, 4), blocks=2, vae_decoder_channels=128`` is the real
    thing (2.1 GB), the default 0.5 GB, half of it CLIP-L's."""
    entries = prefixed(sd15_unet_entries(dtype, mult, blocks), "model.diffusion_model.")
    clip = clip_l_entries(dtype, clip_layers)
    clip.pop("text_projection.weight")  # real SD 1.5 files have none
    entries.update(prefixed(clip, "cond_stage_model.transformer."))
    entries.update(prefixed(sd_vae_entries(dtype, 4, vae_decoder_channels, True), "first_stage_model."))
    return write(path, entries, seed, metadata, drop)


SMALL_CLIP_VISION = {
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 128,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}


def unclip(path, dtype=torch.float16, mult=(1,), blocks=1, seed=0, drop=(), metadata=None):
    """An SD 2.1 unCLIP: a UNet and a CLIP vision model, no text encoder and no VAE.  The vision model is narrower than
    ComfyUI knows it; the file loads inside small_clip_vision()."""
    from comfy.clip_model import CLIPVisionModelProjection

    others = {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
    adm = {"num_classes": "sequential", "adm_in_channels": 1536}
    entries = prefixed(sd15_unet_entries(dtype, mult, blocks, **others, **adm), "model.diffusion_model.")
    with torch.device("meta"):
        vision = CLIPVisionModelProjection(SMALL_CLIP_VISION, torch.float32, "meta", OPS)
    entries.update(entries_of(vision, dtype, "embedder.model.visual."))
    return write(path, entries, seed, metadata, drop)


@contextlib.contextmanager
def small_clip_vision():
    """While this lasts, ComfyUI builds CLIP vision models as narrow as SMALL_CLIP_VISION."""
    import comfy.clip_vision

    plain = comfy.clip_vision.ClipVisionModel

    class SmallClipVision(plain):
        def __init__(self, json_config):
            with tempfile.TemporaryDirectory() as folder:
                small = os.path.join(folder, "small.json")
                with open(small, "w", encoding="utf-8") as file:
                    json.dump(SMALL_CLIP_VISION, file)
                super().__init__(small)

    comfy.clip_vision.ClipVisionModel = SmallClipVision
    try:
        yield
    finally:
        comfy.clip_vision.ClipVisionModel = plain
