"""The diffusion models that ComfyUI supports: the settings that its files give them, and the tensors of one step.

Widths are the published ones. Depths are short where all blocks of a kind are alike.
"""

import math

import comfy.supported_models
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .fake_card import CARD, store

COMPUTES_IN = torch.bfloat16
STORED_IN = torch.float32
DEPTHS = ("transformer_depth",)


def build(name):
    """Return the model of that name, with its weights in host memory, and a function that runs one step of it."""
    found = next(model for model in comfy.supported_models.models if model.__name__ == name)
    entry = models()[name]
    settings = {**entry.settings, **found.unet_config}
    settings.update({key: entry.settings[key] for key in DEPTHS if key in entry.settings})
    config = found(settings)
    config.set_inference_dtype(COMPUTES_IN, None)
    with unset_fake_temporarily():  # some compute tables while they are built
        model = config.get_model(embedders(name), "", device=entry.built_on)
    for part, kept in entry.short.items():
        del model.get_submodule(part)[kept:]
    store(model, STORED_IN)
    return model, entry.step


def embedders(name):
    """Give the parts of a file that Stable Audio's models are not built without."""
    parts = {"weight": (768, 257 if name == "StableAudio" else 256), "bias": (768,)}
    state = {}
    for which in ("start", "total"):
        prefix = f"conditioner.conditioners.seconds_{which}.embedder.embedding"
        state.update({f"{prefix}.1.{part}": torch.zeros(shape) for part, shape in parts.items()})
        if name == "StableAudio":
            state[f"{prefix}.0.weights"] = torch.zeros(128)
    return state if name.startswith("StableAudio") else {}


def models():
    """Return the table: name -> Entry."""
    from . import images, others, unets, videos

    return {**unets.MODELS, **images.MODELS, **videos.MODELS, **others.MODELS}


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=CARD)


class Entry:
    """settings: beside those that `supported_models` names; DEPTHS may be shorter than there.

    x, context: shapes. others: name -> shape or value. built_on: "cpu" where building reads numbers, which takes
    memory. call: runs a step, for models that are no denoisers. short: name of a list of like blocks ->
    how many of them are kept.
    """

    def __init__(self, settings, x, context=None, call=None, built_on="meta", short=None, **others):
        self.built_on, self.short = built_on, short or {}
        self.settings, self.x, self.context, self.others, self.call = settings, x, context, others, call

    def step(self, model):
        others = {
            name: tensor(*value) if isinstance(value, tuple) else value() if callable(value) else value
            for name, value in self.others.items()
        }
        x = tensor(*self.x)
        if self.call is not None:
            return self.call(model, x)
        context = tensor(*self.context) if self.context is not None else None
        return model.apply_model(x, tensor(self.x[0]) + 0.5, c_crossattn=context, transformer_options={}, **others)


def ids(*shape):
    return lambda: tensor(*shape, dtype=torch.long)


def packed(shapes):
    """Several latents in one, as ComfyUI's sampler has them."""
    return (1, 1, sum(math.prod(shape) for shape in shapes))
