"""Loads models through ComfyUI's loaders, with dynamic patchers. Nothing is read until it is used."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ....ops.files.disk_map import DiskMap, SourceError
from ....ops.gguf.gguf_map import GgufMap, add_vision, check_text_encoder
from ....ops.parts.folder import MODEL, PIPELINE, TEXT, VAE, files_for, is_pipeline
from ....ops.parts.open_map import open_map
from ....ops.parts.sharded_map import ShardedMap
from ...policy import Policy
from ..patcher import DynamicModelPatcher
from ..quantise.choose import AUTO, DEFAULT, quantise_model
from ..quantise.formats import FORMATS
from ..quantise.int8 import INT8, INT8_AUTO
from .checkpoint import load_checkpoint_guess_config
from .load_again import keep_dynamic
from .loader_overrides import building, check_complete, detected, opening_indexes, refuse_pickle
from .op_classes import operations

log = logging.getLogger("spillway")

# As in ComfyUI's own loader node.
WEIGHT_DTYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
    # Loaded as the file has them. Each weight is quantised when it is brought.
    **{name: {} for name in (INT8, INT8_AUTO, *FORMATS, AUTO)},
}
# Of the models in a checkpoint, and of text encoders, which ComfyUI computes in floating point.
CHECKPOINT_DTYPES = (DEFAULT, INT8, INT8_AUTO, *FORMATS, AUTO)
TEXT_DTYPES = (DEFAULT, *FORMATS, AUTO)
QUANTISED = (".comfy_quant", "scaled_fp8", ".scale_weight", ".weight_scale")


def is_quantised(source: DiskMap | ShardedMap) -> bool:
    """Whether a file has weights that ComfyUI's mixed-precision ops must read."""
    keys = source.keys()
    return "_quantization_metadata" in source.metadata or any(key.endswith(QUANTISED) for key in keys)


def _options(source: DiskMap | ShardedMap, weight_dtype: str) -> dict[str, Any]:
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

    path: of a file, an index, or a folder of diffusers. disable_dynamic: give ComfyUI's classic patcher instead, for
    nodes that ask for one.
    """
    (path,) = map(str, files_for(path, MODEL))
    if disable_dynamic:
        if weight_dtype in CHECKPOINT_DTYPES[1:]:
            log.warning(
                "[Spillway] %s: another node asked for ComfyUI's classic model, which is not in %s. INT8 Lazy Torch "
                "Compile compiles the model that is.",
                path,
                weight_dtype,
            )
        with opening_indexes():
            return comfy.sd.load_diffusion_model(
                path, model_options=dict(WEIGHT_DTYPES[weight_dtype]), disable_dynamic=True
            )
    refuse_pickle(path)
    source = open_map(path)
    options = _options(source, weight_dtype)
    with building(DynamicModelPatcher, policy, [source]):
        patcher = detected(lambda: comfy.sd.load_diffusion_model(path, model_options=options), path)
    check_complete(patcher.model)
    patcher.cached_patcher_init = (load_diffusion_model, (path, weight_dtype, policy))
    if weight_dtype in CHECKPOINT_DTYPES[1:]:
        quantise_model(patcher, weight_dtype)
    return patcher


def load_quantised(
    factory: Any,
    arguments: tuple,
    wanted: str,
    leave_out: tuple[str, ...],
    part: int | None,
    disable_dynamic: bool = False,
) -> Any:
    """Load a patcher once more and have it quantised. part: which of several that the factory gives."""
    if disable_dynamic:
        return factory(*arguments, disable_dynamic=True)
    loaded = factory(*arguments)
    quantise_model(loaded if part is None else loaded[part], wanted, leave_out)
    return loaded


def quantise_loaded(
    patcher: Any, wanted: str, known: Sequence[str] = CHECKPOINT_DTYPES, leave_out: Sequence[str] = ()
) -> str:
    """Have a patcher that was just loaded quantised, again whenever ComfyUI loads it again. Returns words, or ''.

    known: the names that may be asked for. Raises ValueError for another.
    """
    if wanted not in known:
        raise ValueError(f"weight_dtype '{wanted}' is not one of {', '.join(known)}.")
    if wanted == DEFAULT:
        return ""
    way = getattr(patcher, "cached_patcher_init", None)
    if way is not None:
        part = way[2] if len(way) > 2 else None
        patcher.cached_patcher_init = (load_quantised, (*way[:2], wanted, tuple(leave_out), part), *way[2:])
    return quantise_model(patcher, wanted, leave_out)


def load_checkpoint(
    path: str,
    policy: Policy | None = None,
    embedding_directory: Any = None,
    weight_dtype: str = DEFAULT,
    clip_dtype: str = DEFAULT,
) -> tuple[Any, Any, Any, Any]:
    """Load a checkpoint -> (MODEL, CLIP, VAE, CLIP_VISION), with None for what the file does not have.

    path: of a file, or of a folder of diffusers with several models. weight_dtype, clip_dtype: formats of the MODEL and
    of the CLIP, in CHECKPOINT_DTYPES and TEXT_DTYPES. Raises SourceError for a file that holds no model, or not all of
    one.
    """
    load = load_pipeline if is_pipeline(path) else _load_checkpoint_file
    model, clip, vae, clip_vision = load(path, policy, embedding_directory)
    if model is not None:
        quantise_loaded(model, weight_dtype, CHECKPOINT_DTYPES)
    if clip is not None:
        quantise_loaded(clip.patcher, clip_dtype, TEXT_DTYPES)
    return model, clip, vae, clip_vision


def _load_checkpoint_file(path: str, policy: Policy | None, embedding_directory: Any) -> tuple[Any, Any, Any, Any]:
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


# By the class that a pipeline's model_index.json names: the type of its text encoders.
PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "AuraFlowPipeline": "stable_diffusion",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "QwenImagePipeline": "qwen_image",
    "Lumina2Pipeline": "lumina2",
    "ZImagePipeline": "lumina2",
}


def load_pipeline(
    path: str, policy: Policy | None = None, embedding_directory: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Load the models of a diffusers pipeline's folder -> (MODEL, CLIP, VAE, None), with None for what it lacks.

    Raises SourceError where it has none of them.
    """
    folder = _folder_of(path)
    if not any(_has(folder, names) for names in (MODEL, TEXT, VAE)):
        wanted = ", ".join((*MODEL, TEXT[0], *VAE))
        raise SourceError(f"{folder}: this pipeline's folder has none of {wanted}. Download its models into it.")
    model = load_diffusion_model(str(folder), policy=policy) if _has(folder, MODEL) else None
    vae = load_vae(str(folder), policy) if _has(folder, VAE) else None
    kind, clip = pipeline_class(path), None
    if _has(folder, TEXT) and kind in PIPELINES:
        clip = load_clip([str(folder)], PIPELINES[kind], policy, embedding_directory)
    elif _has(folder, TEXT):
        log.warning(
            "[Spillway] %s: the type of the text encoders of a %s is not known here, so there is no CLIP. Load CLIP "
            "(Spillway) takes this folder and the type.",
            folder,
            kind or "pipeline without a class",
        )
    return model, clip, vae, None


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_dir() for name in names)


def _folder_of(path: str) -> Path:
    return Path(path).parent if Path(path).name == PIPELINE else Path(path)


def pipeline_class(path: str) -> str:
    """Give the class that a pipeline's folder names, or ''. Raises SourceError where that is not JSON."""
    folder = _folder_of(path)
    try:
        found = json.loads((folder / PIPELINE).read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{folder / PIPELINE}: not JSON ({error}). Download it again.") from None
    return str(found.get("_class_name", "")) if isinstance(found, dict) else ""


def load_clip(
    paths: Sequence[str],
    clip_type: str = "stable_diffusion",
    policy: Policy | None = None,
    embedding_directory: Any = None,
    weight_dtype: str = DEFAULT,
) -> Any:
    """Load one to four text encoder files, indexes or folders -> CLIP with a dynamic patcher.

    weight_dtype: one of TEXT_DTYPES.

    Raises SourceError for files that are none, ValueError for an unknown type.
    """
    known_type = getattr(comfy.sd.CLIPType, clip_type.upper(), None)
    if known_type is None:
        known = ", ".join(entry.name.lower() for entry in comfy.sd.CLIPType)
        raise ValueError(f"text encoder type '{clip_type}' is unknown to this ComfyUI. Known: {known}.")
    paths = [str(file) for path in paths for file in files_for(path, TEXT)]
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
        )
    keep_dynamic(clip.patcher, policy)
    quantise_loaded(clip.patcher, weight_dtype, TEXT_DTYPES)
    return clip


def load_vae(path: str, policy: Policy | None = None) -> Any:
    """Load a VAE file, index or folder -> VAE with a dynamic patcher. Raises SourceError for a file that is none."""
    (path,) = map(str, files_for(path, VAE))
    refuse_pickle(path)

    def load() -> Any:
        tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
        return comfy.sd.VAE(sd=tensors, metadata=metadata)

    with building(DynamicModelPatcher, policy):
        vae = detected(load, path)
    if getattr(vae, "first_stage_model", None) is None:
        raise SourceError(f"{path}: no VAE that ComfyUI knows was found in this file.")
    factory = getattr(comfy.sd, "load_vae_patcher", None)
    if factory is not None:
        vae.patcher.cached_patcher_init = (factory, (path,))
        keep_dynamic(vae.patcher, policy)
    return vae


def is_ours(patcher: Any) -> bool:
    """Whether a patcher is managed by Spillway."""
    return isinstance(patcher, DynamicModelPatcher)
