"""Turns ComfyUI's models into state dicts of deferred tensors, under the names that ComfyUI saves them by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ....ops.files.deferred import Assembling, Deferred
from ....ops.files.safetensors_writer import SaveError
from ....ops.files.save_pipeline import save
from ....ops.gguf.weight import stays_quantised
from ....ops.ram import shortage
from ..model_state import model_dtype, source_of
from ..patches.weight_patch import WeightPatch
from ..quantise.formats import SAVED_FORMATS
from ..quantise.layers import KitchenLayers
from ..quantise.weight import KitchenFormat
from ..running import drop_unloaded
from .recipes import Cast, FinalWeight, Quantised, Requantised, as_written

AS_LOADED = "as loaded"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAVE_DTYPES = [AS_LOADED, *DTYPES, *SAVED_FORMATS]


@dataclass(frozen=True)
class Saved:
    """Says what was written: path, bytes and seconds."""

    path: Path
    nbytes: int
    seconds: float

    @property
    def words(self) -> str:
        """The same for a person."""
        speed = self.nbytes / 1e6 / max(self.seconds, 1e-3)
        return f"{self.path.name}: {self.nbytes:,} bytes in {self.seconds:.1f} s ({speed:,.0f} MB/s)"


def save_model(
    path: str,
    model: Any,
    clip: Any = None,
    vae: Any = None,
    clip_vision: Any = None,
    *,
    dtype: str = AS_LOADED,
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, torch.Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Path | None = None,
) -> Saved:
    """Write a MODEL, and what else is given, as one checkpoint that ComfyUI's loaders read.

    Each weight is written as its model computes with it, patches applied, then rounded to `dtype`, a name in
    SAVE_DTYPES. A quantisation is for the repeated blocks of the MODEL, and the rest is then as loaded. extra: more
    tensors by key. Saving loads nothing onto a device and changes no model. Where another process has taken the number
    that the path ends with by the end, the next free one is used. Raises SaveError and FileExistsError.
    """
    if dtype not in SAVE_DTYPES:
        raise ValueError(f"dtype '{dtype}' is not one of {', '.join(SAVE_DTYPES)}.")
    begun = time.perf_counter()
    others = AS_LOADED if dtype in SAVED_FORMATS else dtype
    with Assembling() as assembling:
        unet = deferred_weights(model, model.model.diffusion_model, "diffusion_model.", dtype)
        parts = {}
        if clip is not None:
            parts["clip_state_dict"] = {
                **deferred_weights(clip.patcher, clip.patcher.model, "", others),
                **clip.tokenizer.state_dict(),
            }
        if vae is not None:
            parts["vae_state_dict"] = deferred_weights(vae.patcher, vae.first_stage_model, "", others)
        if clip_vision is not None:
            parts["clip_vision_state_dict"] = deferred_weights(clip_vision.patcher, clip_vision.model, "", others)
        named = model.model.state_dict_for_saving(unet, **parts)
        tensors = {key: assembling.resolve(tensor) for key, tensor in {**named, **(extra or {})}.items()}
    make_room(model.load_device, tensors)
    written = save(path, tensors, metadata, progress=progress, counted=True, journal=journal)
    return Saved(*written, time.perf_counter() - begun)


def make_room(device: torch.device, tensors: Mapping[str, torch.Tensor]) -> None:
    """Free memory for the largest weight, its patch, their product and the result in float32.

    On a device ComfyUI frees it, and the result comes to the RAM. There cached outputs and pins give way.
    """
    largest = 4 * max((tensor.numel() for tensor in tensors.values()), default=0)
    if device.type != "cpu":
        drop_unloaded()
        comfy.model_management.free_memory(4 * largest, device)
    shortage.make_room(4 * largest if device.type == "cpu" else largest)


def final_weights(patcher: Any, root: torch.nn.Module, prefix: str) -> dict[str, FinalWeight]:
    """Collect the floating-point parameters of `root` in their final form, by their key in the patcher's model."""
    weights = {}
    for name, module in root.named_modules():
        for attr, parameter in module._parameters.items():
            key = f"{prefix}{name}.{attr}" if name else f"{prefix}{attr}"
            scale = attr in ("input_scale", "pre_quant_scale", "weight_scale")
            if parameter is not None and parameter.dtype.is_floating_point and not scale:
                weights[key] = _final(patcher, module, attr, key, parameter)
    return weights


def deferred_weights(patcher: Any, root: torch.nn.Module, prefix: str, dtype: str) -> dict[str, torch.Tensor]:
    """Make the state dict of `root` with the patcher's patches. prefix: of its keys in the patcher's model."""
    modules = dict(root.named_modules())
    tensors: dict[str, torch.Tensor] = {}
    kept = root.state_dict()
    written: set[str] = set()
    # The layers that a loader of ours would quantise.
    layers = KitchenLayers(SAVED_FORMATS[dtype], type(root).__name__) if dtype in SAVED_FORMATS else None
    for key, value in kept.items():
        name, _, attr = key.rpartition(".")
        module = modules.get(name)
        parameter = module._parameters.get(attr) if module is not None else None
        if parameter is None or key in written:
            continue
        weight = _final(patcher, module, attr, prefix + key, parameter)
        beside = {f"{name}.{suffix}" for suffix in ("comfy_quant", "input_scale")}
        if stays_quantised(parameter):
            stored = weight.source.state_dict(key)  # type: ignore[operator]
            pieces = {piece: as_written(tensor) for piece, tensor in stored.items()}
            written |= set(pieces)
            if dtype in DTYPES and getattr(module, "pre_quant_scale", None) is None:
                tensors[key] = Deferred.of(Cast(weight, DTYPES[dtype]), weight.shape, DTYPES[dtype])
                written |= beside
            elif weight.patch is not None:
                recipe = Requantised(weight)
                for piece, tensor in pieces.items():
                    suffix = piece.removeprefix(key)
                    tensors[piece] = Deferred.of(recipe, tuple(tensor.shape), tensor.dtype, suffix)
            else:
                tensors.update(pieces)
        elif not value.dtype.is_floating_point:
            tensors[key] = source_of(patcher, prefix + key, value)
        elif layers is not None and (form := _format_of(layers, name, module, attr, weight)) is not None:
            tensors.update(_quantised(name, key, weight, form))
        else:
            wanted = DTYPES.get(dtype) or _as_loaded(weight)
            tensors[key] = Deferred.of(Cast(weight, wanted), weight.shape, wanted)
        written.add(key)
    # The others are no parameters: buffers, and what quantised layers keep beside their weights.
    tensors.update({key: value for key, value in kept.items() if key not in written})
    return tensors


def _final(patcher: Any, module: Any, attr: str, key: str, parameter: torch.Tensor) -> FinalWeight:
    source = source_of(patcher, key, parameter)
    if source.is_meta:
        raise SaveError(f"'{key}' has no data: the file that the model was loaded from lacks it. Get a complete file.")
    dtype = parameter.dtype if stays_quantised(source) else model_dtype(module, attr, parameter)
    patches = patcher.patches.get(key, [])
    patch = WeightPatch(patcher.model, key, source, dtype, patches, []) if patches else None
    return FinalWeight(key, source, dtype, patch, patcher.load_device)


def _as_loaded(weight: FinalWeight) -> torch.dtype:
    """Choose the smaller of the model's and the file's dtype. A wider one would say no more."""
    stored = weight.source.dtype
    return weight.dtype if weight.dtype.itemsize <= stored.itemsize else stored


def _format_of(layers: KitchenLayers, name: str, module: Any, attr: str, weight: FinalWeight) -> KitchenFormat | None:
    """Return the format of a weight; None for one that is no matrix of a layer that ComfyUI reads as quantised."""
    if attr != "weight" or type(module).__name__ != "Linear" or len(weight.shape) != 2:
        return None
    return layers(module, name, torch.empty(weight.shape, dtype=weight.dtype, device="meta"))


def _quantised(name: str, key: str, weight: FinalWeight, form: KitchenFormat) -> dict[str, torch.Tensor]:
    recipe = Quantised(weight, form)
    pieces = {
        f"{key}{suffix}": Deferred.of(recipe, piece.shape, as_written(piece.empty("meta")).dtype, suffix)
        for suffix, piece in form.pieces(weight.shape).items()
    }
    return {**pieces, f"{name}.comfy_quant": form.conf()}
