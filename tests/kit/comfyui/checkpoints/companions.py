"""Files of what stands beside a model: image encoders, ControlNets, audio encoders, style and upscale models."""

import contextlib
import json
import os
import tempfile

import torch

from .diffusion_models import sd15_config
from .writing import OPS, entries_of, write

# Layers 20 and 11 from the end are read. ComfyUI tells a SigLIP by 23 layers, the width and 729 places.
SIGLIP = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 64,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 23,
    "patch_size": 14,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SMALL_SIGLIP = {**SIGLIP, "hidden_size": 64, "num_attention_heads": 4, "image_size": 56}


def siglip(path, dtype=torch.float16, small=True, seed=0):
    """A SigLIP vision tower with a narrow MLP (250 MB), as USO reads it; or a small one. It loads inside
    encoders_as(SIGLIP) or encoders_as(SMALL_SIGLIP)."""
    from comfy.clip_model import CLIPVisionModelProjection

    module = CLIPVisionModelProjection(SMALL_SIGLIP if small else SIGLIP, torch.float32, "meta", OPS)
    return write(path, entries_of(module, dtype), seed)


@contextlib.contextmanager
def encoders_as(config):
    """While this lasts, ComfyUI builds image encoders of this configuration, whatever it finds in a file."""
    import comfy.clip_vision

    plain = comfy.clip_vision.ClipVisionModel
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.json")  # older versions take no dict
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file)
        comfy.clip_vision.ClipVisionModel = lambda _: plain(path)
        try:
            yield
        finally:
            comfy.clip_vision.ClipVisionModel = plain


def sd15_controlnet(path, dtype=torch.float16, mult=(1,), blocks=1, seed=0):
    """A ControlNet for sd15_unet of the same `mult` and `blocks`."""
    from comfy.cldm.cldm import ControlNet

    options = sd15_config(mult, blocks)
    for name in ("out_channels", "transformer_depth_output"):
        options.pop(name)
    module = ControlNet(**options, hint_channels=3)
    return write(path, entries_of(module, dtype), seed)


def wav2vec(path, dtype=torch.float16, seed=0):
    """The base size of a wav2vec 2 with two layers (60 MB). It loads inside two_layers_of_audio()."""
    from comfy.audio_encoders.wav2vec2 import Wav2Vec2Model

    options = {"conv_norm": False, "conv_bias": False, "do_normalize": False, "do_stable_layer_norm": False}
    module = Wav2Vec2Model(
        embed_dim=768, num_heads=12, num_layers=2, **options, device="meta", dtype=torch.float32, operations=OPS
    )
    return write(path, entries_of(module, dtype), seed)


@contextlib.contextmanager
def two_layers_of_audio():
    """While this lasts, ComfyUI builds audio encoders with two layers."""
    from comfy.audio_encoders import audio_encoders

    plain = audio_encoders.Wav2Vec2Model
    audio_encoders.Wav2Vec2Model = lambda **options: plain(**{**options, "num_layers": 2})
    try:
        yield
    finally:
        audio_encoders.Wav2Vec2Model = plain


def redux(path, dtype=torch.bfloat16, width=4096, seed=0):
    """Flux Redux's projector, real size (129 MB). ComfyUI builds no other `width` of the text by itself."""
    from comfy.ldm.flux.redux import ReduxImageEncoder

    with torch.device("meta"):
        module = ReduxImageEncoder(txt_in_features=width)
    return write(path, entries_of(module, dtype), seed)


def compact(path, dtype=torch.float16, width=16, convolutions=2, seed=0):
    """A Real-ESRGAN Compact that doubles the size."""
    from spandrel.architectures.Compact import Compact

    with torch.device("meta"):
        module = Compact(num_in_ch=3, num_out_ch=3, num_feat=width, num_conv=convolutions, upscale=2)
    return write(path, entries_of(module, dtype), seed)
