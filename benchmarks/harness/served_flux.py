"""A small Flux behind a server of ComfyUI: its files, the prompt that samples it, and the seconds that a run took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_models(base: Path, hidden: int) -> None:
    """Write the model and its text encoder where a server with that base looks for them. hidden: the model's width."""
    from kit.comfyui.checkpoints.diffusion_models import flux
    from kit.comfyui.checkpoints.text_encoders import clip_l

    for folder in ("diffusion_models", "text_encoders"):
        (base / "models" / folder).mkdir(parents=True)
    sizes = {"hidden": hidden, "context": 768, "pooled": 768, "depth": 2, "depth_single": 4}
    flux(base / "models" / "diffusion_models" / "flux.safetensors", **sizes)
    clip_l(base / "models" / "text_encoders" / "clip.safetensors")


def prompt(steps: int, seed: int) -> dict[str, Any]:
    """Make a prompt that samples 256 x 256 pixels."""
    from kit.comfyui.running_server import node

    sampler = {"steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wires = {"model": ["load", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        "load": node("SpillwayLoadDiffusionModel", unet_name="flux.safetensors", weight_dtype="default"),
        "clip": node("SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="a house"),
        "empty": node("EmptySD3LatentImage", width=256, height=256, batch_size=1),
        "sampled": node("KSampler", **wires, seed=seed, **sampler),
        "latent": node("SaveLatent", samples=["sampled", 0], filename_prefix="latent"),
    }


def must_succeed(run: dict[str, Any]) -> None:
    """End the program where a prompt failed."""
    if run["status"]["status_str"] != "success":
        raise SystemExit(json.dumps(run["status"])[-1500:])


def duration(run: dict[str, Any]) -> float:
    """Return the seconds between a prompt's start and end, as the server saw them."""
    times = {name: data["timestamp"] for name, data in run["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1e3
