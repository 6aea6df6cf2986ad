"""The language models inside of ComfyUI's text encoders, and their kin that see pictures or hear."""

import json
from pathlib import Path

import comfy.clip_model
import comfy.ops
import comfy.text_encoders
import torch
from comfy.text_encoders import bert, llama, t5
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .fake_card import CARD, store
from .table import COMPUTES_IN, STORED_IN, tensor

FOLDER = Path(llama.__file__).parent


def settings(name):
    return json.loads((FOLDER / name).read_text())


def ids(length=16):
    return torch.ones(1, length, dtype=torch.long, device=CARD)


def tokens(model):
    return model(ids(), attention_mask=tensor(1, 16) + 1)


def generate(model):
    """Encode, and choose a next token by the tied embedding where there is one."""
    hidden = model(ids(), attention_mask=tensor(1, 16) + 1)[0]
    if hasattr(model, "logits"):
        model.logits(hidden)


def picture(model):
    return model(tensor(1, 3, 224, 224, dtype=COMPUTES_IN))


LLAMAS = {
    name: (found, {"num_hidden_layers": 2}, generate)
    for name, found in vars(llama).items()
    if isinstance(found, type) and issubclass(found, llama.BaseLlama) and issubclass(found, torch.nn.Module)
}
VISION = {
    "hidden_act": "quick_gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "model_type": "clip_vision_model",
}
# name -> (class, settings, step)
MODELS = {
    **LLAMAS,
    "T5 base": (t5.T5, {**settings("t5_config_base.json"), "num_layers": 2}, tokens),
    "T5 XXL": (t5.T5, {**settings("t5_config_xxl.json"), "num_layers": 2}, tokens),
    "UMT5 XXL": (t5.T5, {**settings("umt5_config_xxl.json"), "num_layers": 2}, tokens),
    "BERT": (bert.BertModel, {**settings("hydit_clip.json"), "num_hidden_layers": 2}, tokens),
    "CLIP": (
        comfy.clip_model.CLIPTextModel,
        {**settings("../sd1_clip_config.json"), "num_hidden_layers": 2},
        lambda model: model(ids(77)),
    ),
    "CLIP vision": (comfy.clip_model.CLIPVisionModelProjection, VISION, picture),
}


def build(name):
    """Return the model of that name, with its weights in host memory, and a function that runs it."""
    found, config, step = MODELS[name]
    with unset_fake_temporarily():
        model = found(config, COMPUTES_IN, "meta", comfy.ops.manual_cast)
        comfy.model_management.archive_model_dtypes(model)
    store(model, STORED_IN)
    return model, step
