"""Graphs of small models whose sampling is foreseen: what each needs, and the prompt in API format."""

from __future__ import annotations

import shutil

import comfy.utils
import nodes as comfyui_nodes

from kit.comfyui import sampling
from kit.gguf_files import quantised_copy, write_gguf
from spillway.nodes.load import SpillwayLoadCheckpoint, SpillwayLoadDiffusionModel
from spillway.nodes.lora import SpillwayLoraLoaderModelOnly
from spillway.nodes.policy import SpillwayPolicy

GIB = 1 << 30
FLUX = {"hidden": 256, "depth": 2, "depth_single": 4}
FILES = {
    "flux": ("flux", FLUX),
    "wan": ("wan", {}),
    "lumina2": ("lumina2", {}),
    "z_image": ("z_image", {}),
}
STEPS = 6


class Conds:
    """Gives conditions of an architecture, without a text encoder."""

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"arch": ("STRING", {})}}

    def run(self, arch):
        return sampling.conds(arch)


class Take:
    """Takes latents, so that a sampler runs."""

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}, "optional": {"more": ("LATENT",)}}

    def run(self, samples, more=None):
        return {"ui": {}, "result": ()}


CLASSES = {"TestConds": Conds, "TestTake": Take} | {
    node.define_schema().node_id: node
    for node in (SpillwayLoadDiffusionModel, SpillwayLoadCheckpoint, SpillwayLoraLoaderModelOnly, SpillwayPolicy)
}


def register(monkeypatch):
    for name, node in CLASSES.items():
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, name, node)


def put_files(models, checkpoint):
    """Put the files into the folders of models, under names of their own."""
    for folder in ("diffusion_models", "loras", "checkpoints"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    for name, (kind, options) in FILES.items():
        shutil.copy(checkpoint(kind, **options), models / "diffusion_models" / f"forecast-{name}.safetensors")
    flux = models / "diffusion_models" / "forecast-flux.safetensors"
    shutil.copy(checkpoint("lora", base=str(flux)), models / "loras" / "forecast-lora.safetensors")
    shutil.copy(checkpoint("sd15", mult=(1, 2)), models / "checkpoints" / "forecast-sd15.safetensors")
    written, _ = quantised_copy(comfy.utils.load_torch_file(str(flux)), "Q8_0")
    write_gguf(models / "diffusion_models" / "forecast-flux-Q8_0.gguf", written)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(name, arch="flux", gigabytes=None, dtype="default", lora=False, batch=1, second=False, seed=1):
    """A prompt. name: of the file. gigabytes: of a policy."""
    if arch == "sd15":
        loader = node("SpillwayLoadCheckpoint", ckpt_name=name, weight_dtype=dtype)
    else:
        loader = node("SpillwayLoadDiffusionModel", unet_name=name, weight_dtype=dtype)
    found, model = {"loader": loader}, "loader"
    if lora:
        found["lora"] = node(
            "SpillwayLoraLoaderModelOnly", model=[model, 0], lora_name="forecast-lora.safetensors", strength_model=0.8
        )
        model = "lora"
    if gigabytes is not None:
        amounts = {"headroom_gb": 0.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}
        found["policy"] = node("SpillwayPolicy", model=[model, 0], vram_gb=gigabytes, **amounts)
        model = "policy"
    found["conds"] = node("TestConds", arch=arch)
    empty = {"wan": "EmptyHunyuanLatentVideo", "sd15": "EmptyLatentImage"}.get(arch, "EmptySD3LatentImage")
    length = {"length": 5} if arch == "wan" else {}

    def sampler(side, number):
        found[f"latent{number}"] = node(empty, width=side, height=side, batch_size=batch, **length)
        found[f"sampler{number}"] = node(
            "KSampler",
            model=[model, 0],
            positive=["conds", 0],
            negative=["conds", 1],
            latent_image=[f"latent{number}", 0],
            seed=seed,
            steps=STEPS,
            cfg=sampling.CFG[arch],
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        return [f"sampler{number}", 0]

    found["save"] = node("TestTake", samples=sampler(64, 1), **({"more": sampler(128, 2)} if second else {}))
    return found
