"""Loads models through ComfyUI's loaders, with dynamic patchers. Nothing is read until it is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ....ops.files.disk_map import DiskMap, SourceError
from ....ops.files.safetensors_header import shard_words
from ....ops.gguf.gguf_map import GgufMap, add_vision, check_text_encoder, open_map
from ...policy import Policy
from ..int8 import INT8, INT8_AUTO, choose_int8
from ..patcher import DynamicModelPatcher
from .checkpoint import load_checkpoint_guess_config
from .load_again import keep_dynamic
from .loader_overrides import building, check_complete, detected, refuse_pickle
from .op_classes import operations

log = logging.getLogger("spillway")

# As in ComfyUI's own loader node.
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    # Loaded as the file has them. Each weight is quantised when it is brought.
    INT8: {},
    INT8_AUTO: {},
}
QUANTISED = (".comfy_quant", "scaled_fp8", ".scale_weight", ".weight_scale")


def is_quantised(source: DiskMap) -> bool:
    """Whether a file has weights that ComfyUI's mixed-precision ops must read."""
    keys = source.keys()
    return "_quantization_metadata" in source.metadata or any(key.endswith(QUANTISED) for key in keys)


def _options(source: DiskMap, weight_dtype: str) -> dict[str, Any]:
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype '{weight_dtype}' is not one of {', '.join(WEIGHT_DTYPES)}.")
    options = dict(WEIGHT_DTYPES[weight_dtype])
    if "dtype" in options and isinstance(source, GgufMap):
        raise ValueError(
            f"{source.path}: the weights of a GGUF file stay in its blocks, so weight_dtype '{weight_dtype}' means "
            "nothing here. Choose 'default', or 'int8' to have them quantised anew."
        )
    # Weights live in their file, never on the device as a whole, whatever --highvram says.
    options["offload_device"] = torch.device("cpu")
    fp8_ops = options.get("fp8_optimizations") or comfy.ops.pick_operations(None, None) is comfy.ops.fp8_ops
    if not is_quantised(source) and not fp8_ops:
        options["custom_operations"] = operations()
    return options


def load_diffusion_model(
    path: str, weight_dtype: str = "default", policy: Policy | None = None, disable_dynamic: bool = False
) -> Any:
    """Load a diffusion model file -> DynamicModelPatcher. Raises SourceError for a file that is none, or is incomplete.

    disable_dynamic: give ComfyUI's classic patcher instead, for nodes that ask for one.
    """
    if disable_dynamic:
        if weight_dtype in (INT8, INT8_AUTO):
            log.warning(
                "[Spillway] %s: another node asked for ComfyUI's classic model, which is not in INT8. INT8 Lazy Torch "
                "Compile compiles the model that is.",
                path,
            )
        return comfy.sd.load_diffusion_model(
            path, model_options=dict(WEIGHT_DTYPES[weight_dtype]), disable_dynamic=True
        )
    refuse_pickle(path)
    source = open_map(path)
    options = _options(source, weight_dtype)
    with building(DynamicModelPatcher, policy, [source]):
        patcher = detected(lambda: comfy.sd.load_diffusion_model(path, model_options=options), path)
    check_complete(patcher.model)
    if weight_dtype in (INT8, INT8_AUTO):
        choose_int8(patcher, weight_dtype)
    patcher.cached_patcher_init = (load_diffusion_model, (path, weight_dtype, policy))
    return patcher


def load_checkpoint(
    path: str, policy: Policy | None = None, embedding_directory: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Load a checkpoint -> (MODEL, CLIP, VAE, CLIP_VISION), with None for what the file does not have.

    Raises SourceError for a file that holds no model, or not all of one.
    """

    def load() -> Any:
        return load_checkpoint_guess_config(
            path, output_clipvision=True, embedding_directory=embedding_directory, policy=policy
        )

    model, clip, vae, clip_vision = detected(load, path)
    if model is not None:
        check_complete(model.model)
    if getattr(vae, "first_stage_model", None) is None:
        vae = None
    return model, clip, vae, clip_vision


def load_clip(
    paths: Sequence[str],
    clip_type: str = "stable_diffusion",
    policy: Policy | None = None,
    embedding_directory: Any = None,
) -> Any:
    """Load one to four text encoder files -> CLIP with a dynamic patcher.

    Raises SourceError for files that are none, ValueError for an unknown type.
    """
    known_type = getattr(comfy.sd.CLIPType, clip_type.upper(), None)
    if known_type is None:
        known = ", ".join(entry.name.lower() for entry in comfy.sd.CLIPType)
        raise ValueError(f"text encoder type '{clip_type}' is unknown to this ComfyUI. Known: {known}.")
    files = []
    for path in paths:
        refuse_pickle(path)
        files.append(open_map(path))
        check_text_encoder(files[-1])
        vision = add_vision(files[-1])
        if vision:
            log.info("[Spillway] %s: its vision tower is %s", path, vision)

    def load() -> Any:
        return comfy.sd.load_clip(ckpt_paths=list(paths), embedding_directory=embedding_directory, clip_type=known_type)

    with building(DynamicModelPatcher, policy, files) as opened:
        clip = detected(load, ", ".join(paths))
    # ComfyUI takes a file that it does not know for a CLIP of which everything is missing.
    unused = opened.unused(clip.cond_stage_model) if clip.patcher.is_dynamic() else []
    if unused:
        raise SourceError(
            f"{unused[0]}: no text encoder that ComfyUI knows was found in this file, or none of type '{clip_type}'."
            + shard_words(unused[0])
        )
    keep_dynamic(clip.patcher, policy)
    return clip


def load_vae(path: str, policy: Policy | None = None) -> Any:
    """Load a VAE file -> VAE with a dynamic patcher. Raises SourceError for a file that is none."""
    refuse_pickle(path)

    def load() -> Any:
        tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        return comfy.sd.VAE(sd=tensors, metadata=metadata)

    with building(DynamicModelPatcher, policy):
        vae = detected(load, path)
    if getattr(vae, "first_stage_model", None) is None:
        raise SourceError(f"{path}: no VAE that ComfyUI knows was found in this file.{shard_words(path)}")
    factory = getattr(comfy.sd, "load_vae_patcher", None)
    if factory is not None:
        vae.patcher.cached_patcher_init = (factory, (path,))
        keep_dynamic(vae.patcher, policy)
    return vae


def is_ours(patcher: Any) -> bool:
    """Whether a patcher is managed by Spillway."""
    return isinstance(patcher, DynamicModelPatcher)
