"""Refuses quantised files with scales or formats that ComfyUI would fail on later, or compute wrong images with."""

from __future__ import annotations

import json
from typing import Any

from comfy.quant_ops import QUANT_ALGOS

from ....ops.files.disk_map import DiskMap, SourceError

CONF = ".comfy_quant"
# The scales that a format must have. That of int8_tensorwise is one number, or one for each row.
NEEDED = {
    "int8_tensorwise": ("weight_scale",),
    "convrot_w4a4": ("weight_scale",),
    "mxfp8": ("weight_scale",),
    "nvfp4": ("weight_scale", "weight_scale_2"),
}


def check_quantised(source: DiskMap) -> None:
    """Raises SourceError for a layer whose format ComfyUI does not know, or whose scales are missing or misshapen."""
    for key in list(source.keys()):
        if key.endswith(CONF):
            _check_layer(source, key.removesuffix(CONF), _conf(source, key))
    for layer, conf in _listed(source).items():
        if f"{layer}.weight" in source:
            _check_layer(source, layer, conf)


def _conf(source: DiskMap, key: str) -> Any:
    try:
        return json.loads(bytes(source.tensor(key).tolist()))
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
    if name == "int8_tensorwise" and f"{layer}.weight" in source:
        weight, scale = source.spec(f"{layer}.weight"), source.spec(f"{layer}.weight_scale")
        if str(weight.dtype) != "torch.int8":
            raise SourceError(f"{source.path}: '{layer}.weight' is {weight.dtype}; {name} expects torch.int8.")
        count = 1
        for size in scale.shape:
            count *= size
        if count not in (1, weight.shape[0] if weight.shape else 1):
            raise SourceError(
                f"{source.path}: '{layer}.weight_scale' has shape {scale.shape}; expected one number, or one for each "
                f"of the {weight.shape[0]} rows of '{layer}.weight'. Quantise the model again."
            )
