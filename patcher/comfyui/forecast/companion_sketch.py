"""Makes sketches of what stands beside a diffusion model: text encoders and VAEs, from the headers of their files."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ....ops.parts.folder import is_pipeline
from ..loading.checkpoint import load_checkpoint_guess_config
from ..loading.load import PIPELINES, load_clip, load_vae, pipeline_class
from ..patcher import DynamicModelPatcher
from ..patches.lora import NoFit, apply_lora
from ..quantise.choose import DEFAULT
from .sketch import Loaded, give_engine, loading_nothing, quantise, shapes_of_lora


def sketch_text_encoder(wanted: Loaded) -> tuple[Any, list[str]]:
    """Make a sketch of a text encoder -> (CLIP, what it could not know). Reads headers, and what tokenizers need.

    Raises what the loaders raise, and ValueError for a checkpoint without one.
    """
    unknown: list[str] = []
    with loading_nothing():
        clip = _text_encoder(wanted)
        if wanted.weight_dtype != DEFAULT:
            quantise(clip.patcher, wanted.weight_dtype, wanted.leave_out, unknown)
        for path, strength in wanted.loras:
            with suppress(NoFit):  # it is for the diffusion model alone
                clip = apply_lora(None, clip, path, 0.0, strength, read=shapes_of_lora)[1]
        give_engine(clip.patcher, unknown)
    return clip, unknown


def sketch_vae(wanted: Loaded) -> Any:
    """Make a sketch of a VAE. Raises what the loaders raise, and ValueError for a checkpoint without one."""
    with loading_nothing():
        if wanted.kind == "checkpoints" and not is_pipeline(wanted.path):
            vae = load_checkpoint_guess_config(wanted.path, True, False, output_model=False, policy=wanted.policy)[2]
        else:
            vae = load_vae(wanted.path, wanted.policy)
        if getattr(vae, "first_stage_model", None) is None:
            raise ValueError(f"{wanted.path}: there is no VAE in this file. Choose another.")
        if not isinstance(vae.patcher, DynamicModelPatcher):
            raise ValueError(f"{wanted.path}: ComfyUI keeps this kind of VAE as a whole. Nothing is foreseen for it.")
        give_engine(vae.patcher, [])
    return vae


def _text_encoder(wanted: Loaded) -> Any:
    if wanted.kind != "checkpoints":
        return load_clip([wanted.path, *wanted.more], wanted.family, wanted.policy)
    if is_pipeline(wanted.path):
        return load_clip([wanted.path], PIPELINES.get(pipeline_class(wanted.path), wanted.family), wanted.policy)
    clip = load_checkpoint_guess_config(wanted.path, False, True, output_model=False, policy=wanted.policy)[1]
    if clip is None:
        raise ValueError(f"{wanted.path}: there is no text encoder in this file. Choose another.")
    return clip
