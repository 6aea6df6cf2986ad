"""Refuses quantised files with scales or formats that ComfyUI would fail on later, or compute wrong images with."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy.quant_ops import QUANT_ALGOS

from ....ops.files.disk_map import DiskMap, SourceError
from ....ops.files.watched_file import FileChanged

CONF, SCALE, OLD_SCALE, OLD_MARK = ".comfy_quant", ".weight_scale", ".scale_weight", "scaled_fp8"
# The scales that a format must have. That of int8_tensorwise is one number, or one for each row.
NEEDED = {
    "float8_e4m3fn": ("weight_scale",),
    "float8_e5m2": ("weight_scale",),
    "int8_tensorwise": ("weight_scale",),
    "convrot_w4a4": ("weight_scale",),
    "asym_w4a8_int8": ("weight_s_rel", "weight_s_channel"),
    "mxfp8": ("weight_scale",),
    "nvfp4": ("weight_scale", "weight_scale_2"),
}
BYTES = (torch.int8, torch.uint8)  # the same bits; ComfyUI takes either for the other


def check_quantised(source: DiskMap) -> None:
    """Raises SourceError for a layer whose format ComfyUI does not know, or whose scales are missing or misshapen.

    Also for scales that nothing says the format of, which ComfyUI would leave out, and for those that it would read as
    of another format. Both give noise.
    """
    known = set()
    for key in list(source.keys()):
        if key.endswith(CONF):
            known.add(key.removesuffix(CONF))
            _check_layer(source, key.removesuffix(CONF), _conf(source, key))
    for layer, conf in _listed(source).items():
        known.add(layer)
        if f"{layer}.weight" in source:
            _check_layer(source, layer, conf)
    _check_scales(source, known)


def _check_scales(source: DiskMap, known: set[str]) -> None:
    """known: the layers of which a format is given."""
    # In the old form one tensor says that all layers of a model with a scale_weight are FP8. Metadata overrule it.
    old = "_quantization_metadata" not in source.metadata
    keys = list(source.keys())
    marked = [key.removesuffix(OLD_MARK) for key in keys if old and key.endswith(OLD_MARK)]
    for key in keys:
        for suffix in (SCALE, OLD_SCALE):
            layer = key.removesuffix(suffix)
            if not key.endswith(suffix) or layer in known or f"{layer}.weight" not in source:
                continue
            dtype = source.spec(f"{layer}.weight").dtype
            if dtype.itemsize > 1:
                continue
            if suffix == SCALE or not any(layer.startswith(prefix) for prefix in marked):
                raise SourceError(
                    f"{source.path}: '{key}' is the scale of '{layer}.weight' ({dtype}), and nothing in the file says "
                    f"in which format: there is no '{layer}{CONF}' and no _quantization_metadata. ComfyUI would leave "
                    "it out and make noise. Get the file in ComfyUI's form."
                )
            if dtype != torch.float8_e4m3fn:
                raise SourceError(
                    f"{source.path}: '{layer}.weight' is {dtype}. ComfyUI reads all files with '{OLD_MARK}' as "
                    f"torch.float8_e4m3fn, which holds no number above 448, and would make an empty picture. Get the "
                    "file in float8_e4m3fn, or in the newer form with comfy_quant."
                )


def _conf(source: DiskMap, key: str) -> Any:
    try:
        return json.loads(bytes(source.tensor(key).tolist()))
    except FileChanged:
        raise
    except (ValueError, TypeError, OverflowError):
        raise SourceError(
            f"{source.path}: '{key}' is not JSON text in bytes. The file is damaged, or was made by another "
            "program: get it again."
        ) from None


def _listed(source: DiskMap) -> dict[str, Any]:
    try:
        listed = json.loads(source.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return dict(listed)
    except (ValueError, AttributeError, TypeError):
        raise SourceError(
            f"{source.path}: its _quantization_metadata are not JSON with 'layers'. Get the file again from its maker."
        ) from None


def _check_layer(source: DiskMap, layer: str, conf: Any) -> None:
    name = conf.get("format") if isinstance(conf, dict) else None
    if name not in QUANT_ALGOS:
        raise SourceError(
            f"{source.path}: layer '{layer}' has the quantisation format {name!r}, which this ComfyUI does not know. "
            f"Known: {', '.join(sorted(QUANT_ALGOS))}. Update ComfyUI, or get the file in one of these."
        )
    for suffix in NEEDED.get(name, ()):
        if f"{layer}.{suffix}" not in source:
            raise SourceError(
                f"{source.path}: '{layer}.{suffix}' is missing, which {name} needs. The file is incomplete: "
                "get it again."
            )
    if f"{layer}.weight" not in source:
        return
    weight, stored = source.spec(f"{layer}.weight"), QUANT_ALGOS[name]["storage_t"]
    # ComfyUI would cast it as numbers, after which the scale belongs to none of them.
    if weight.dtype != stored and not (weight.dtype in BYTES and stored in BYTES and name != "int8_tensorwise"):
        raise SourceError(
            f"{source.path}: '{layer}.weight' is {weight.dtype}; {name} expects {stored}. Get the file again from its "
            "maker."
        )
    if name == "int8_tensorwise":
        scale = source.spec(f"{layer}.weight_scale")
        count = 1
        for size in scale.shape:
            count *= size
        if count not in (1, weight.shape[0] if weight.shape else 1):
            raise SourceError(
                f"{source.path}: '{layer}.weight_scale' has shape {scale.shape}; expected one number, or one for each "
                f"of the {weight.shape[0]} rows of '{layer}.weight'. Quantise the model again."
            )
