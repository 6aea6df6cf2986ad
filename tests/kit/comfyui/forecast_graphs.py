"""Graphs of small models whose sampling is foreseen: what each needs, and the prompt in API format."""

from __future__ import annotations

import ctypes
import json
import mmap
import shutil
import struct

import comfy.utils
import nodes as comfyui_nodes
import torch

from kit.comfyui import sampling
from kit.gguf_files import quantised_copy, write_gguf
from spillway.nodes.load import SpillwayLoadCheckpoint, SpillwayLoadCLIP, SpillwayLoadDiffusionModel, SpillwayLoadVAE
from spillway.nodes.lora import SpillwayLoraLoaderModelOnly
from spillway.nodes.policy import SpillwayPolicy
from spillway.nodes.vae import SpillwayVAEDecode

GIB = 1 << 30
FLUX = {"hidden": 256, "depth": 2, "depth_single": 4}
FILES = {
    "flux": ("flux", FLUX),
    "wan": ("wan", {}),
    "lumina2": ("lumina2", {}),
    "z_image": ("z_image", {}),
}
STEPS = 6
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}


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
    for node in (
        SpillwayLoadDiffusionModel,
        SpillwayLoadCheckpoint,
        SpillwayLoadCLIP,
        SpillwayLoadVAE,
        SpillwayLoraLoaderModelOnly,
        SpillwayPolicy,
        SpillwayVAEDecode,
    )
}


def write_hole(path, entries):
    """Write a file of entries {key: (shape, dtype, ...)}: behind the header is a hole, which takes no room on the disk.

    Returns the bytes of the hole.
    """
    header, end = {}, 0
    for name, (shape, dtype, *_) in entries.items():
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def pages_in_ram(path):
    """Count the bytes of a file that the page cache has."""
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as seen,
    ):
        count = -(-len(seen) // mmap.PAGESIZE)
        there = (ctypes.c_ubyte * count)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(seen))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(seen)), there) == 0
        return sum(byte & 1 for byte in there) * mmap.PAGESIZE


def register(monkeypatch):
    for name, node in CLASSES.items():
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, name, node)


def put_companions(models, checkpoint):
    """Put a text encoder and VAEs into the folders of models."""
    for folder in ("text_encoders", "vae", "checkpoints"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    linked = {models / "text_encoders" / "forecast-clip.safetensors": checkpoint("clip_l")}
    linked |= {models / "vae" / f"forecast-{name}.safetensors": checkpoint(name) for name in ("flux_vae", "wan_vae")}
    linked[models / "checkpoints" / "forecast-sd15.safetensors"] = checkpoint("sd15", mult=(1, 2))
    for name, path in linked.items():
        if not name.exists():
            name.symlink_to(path)


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
