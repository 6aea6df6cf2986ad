"""Quantised copies of a model file, in the forms that ComfyUI reads."""

import json

import comfy.quant_ops
import comfy.utils
import torch

from kit.comfyui import checkpoints

MATCH = ("attn.qkv", "mlp.0", "mlp.2", "linear1", "linear2")


def quantised(path, base, kind, match=MATCH, **options):
    """Write the file `base` with its large matrices quantised as `comfy_quant` files have them.

    match: parts of their names. options: of the layout.
    """
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    out = {}
    for name, tensor in comfy.utils.load_torch_file(base).items():
        if not name.endswith(".weight") or not any(part in name for part in match):
            out[name] = tensor
            continue
        weight = comfy.quant_ops.QuantizedTensor.from_float(tensor.float(), layout, scale="recalculate", **options)
        out.update(weight.state_dict(name))
        stem = name.removesuffix("weight")
        out[f"{stem}comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    return checkpoints.write(path, out)


def scaled_fp8(path, base):
    """Write the older form: FP8 weights, each with a scale, and one tensor that says so."""
    out = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in comfy.utils.load_torch_file(base).items():
        out[name] = tensor
        if name.endswith(".weight") and any(part in name for part in MATCH):
            scale = tensor.float().abs().amax() / 448
            out[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            out[f"{name.removesuffix('weight')}scale_weight"] = scale
    return checkpoints.write(path, out)


def reference(form, weight):
    """ComfyUI's own quantised tensor of a whole weight."""
    options = {"scale": "recalculate"}
    if form.rotation:
        weight, options = weight.float(), {"convrot_groupsize": form.rotation}
        options |= {"per_channel": True, "convrot": True} if form.format.algorithm == "int8_tensorwise" else {}
    return comfy.quant_ops.QuantizedTensor.from_float(weight, form.format.layout_name, **options)
