"""Quantised files that ComfyUI would fail on, or make noise of, are errors that name file and key."""

import json
import struct

import comfy.ops
import comfy.quant_ops
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL, assert_same, pair, run
from kit.comfyui.quantised import MATCH, quantised, scaled_fp8
from spillway.ops.files.disk_map import SourceError, locate
from spillway.ops.gather import is_wrapper
from spillway.patcher.comfyui.loading.check_quantised import NEEDED
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_clip, load_diffusion_model, load_vae

LAYER = "double_blocks.0.img_attn.qkv"


def has(kind):
    return pytest.mark.skipif(kind not in comfy.quant_ops.QUANT_ALGOS, reason=f"this ComfyUI has no {kind}")


def changed(path, change):
    """The file with something changed in its tensors."""
    tensors = {key: tensor.clone() for key, tensor in comfy.utils.load_torch_file(str(path)).items()}
    change(tensors, next(key for key in tensors if key.endswith(f"{LAYER}.weight")).removesuffix(".weight"))
    return checkpoints.write(f"{path}.changed.safetensors", tensors)


def without(*suffixes):
    def change(tensors, layer):
        for key in list(tensors):
            if key.startswith(layer) and key.endswith(suffixes):
                del tensors[key]

    return change


def refused(load, path, *words):
    with pytest.raises(SourceError) as caught:
        load(path)
    for word in [path, *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", pytest.param("mxfp8", marks=has("mxfp8")), "nvfp4"])
def test_a_layer_without_its_scale_is_an_error(kind, flux, tmp_path):
    path = changed(quantised(tmp_path / "m.safetensors", flux, kind), without("weight_scale"))
    refused(load_diffusion_model, path, f"{LAYER}.weight_scale' is missing", kind)


@has("asym_w4a8_int8")
@pytest.mark.parametrize("scale", ["weight_s_rel", "weight_s_channel"])
def test_a_layer_in_w4a8_without_one_of_its_scales_is_an_error(scale, checkpoint, tmp_path):
    base = checkpoint("flux", **{**SMALL, "hidden": 256})  # its groups are of 256
    path = quantised(tmp_path / "m.safetensors", base, "asym_w4a8_int8")
    run(load_diffusion_model(path), 1)
    refused(load_diffusion_model, changed(path, without(scale)), f"{LAYER}.{scale}' is missing", "asym_w4a8_int8")


def test_the_table_of_scales_has_every_format_of_this_comfyui():
    assert set(comfy.quant_ops.QUANT_ALGOS) <= set(NEEDED)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", pytest.param("mxfp8", marks=has("mxfp8")), "nvfp4"])
def test_a_scale_without_a_format_is_an_error_and_no_noise(kind, flux, tmp_path):
    path = changed(quantised(tmp_path / "m.safetensors", flux, kind), without("comfy_quant"))
    refused(load_diffusion_model, path, f"{LAYER}.weight_scale' is the scale of", "comfy_quant", "noise")


def test_an_old_scale_without_the_mark_is_an_error_and_no_noise(flux, tmp_path):
    path = scaled_fp8(tmp_path / "m.safetensors", flux)
    run(load_diffusion_model(path), 1)
    unmarked = changed(path, lambda tensors, _: tensors.pop("scaled_fp8"))
    refused(load_diffusion_model, unmarked, "scale_weight' is the scale of")


def test_the_old_form_in_e5m2_is_an_error_and_not_empty(flux, tmp_path):
    def as_e5m2(tensors, _):
        for key, tensor in tensors.items():
            if tensor.dtype == torch.float8_e4m3fn and tensor.numel() > 2:
                tensors[key] = (tensor.float() * 128).to(torch.float8_e5m2)

    path = changed(scaled_fp8(tmp_path / "m.safetensors", flux), as_e5m2)
    refused(load_diffusion_model, path, ".weight' is torch.float8_e5m2", "scaled_fp8", "448")


@pytest.mark.parametrize(
    ("kind", "dtype"), [("float8_e4m3fn", torch.float8_e5m2), ("float8_e5m2", torch.bfloat16), ("nvfp4", torch.float16)]
)
def test_a_weight_in_another_dtype_than_its_format_is_an_error(kind, dtype, flux, tmp_path):
    def cast(tensors, layer):
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float().to(dtype)

    path = changed(quantised(tmp_path / "m.safetensors", flux, kind), cast)
    refused(load_diffusion_model, path, f"{LAYER}.weight' is {dtype}; {kind} expects")


def unscaled(path, base):
    """One matrix in FP8 with a scale that nothing explains."""
    tensors = {key: tensor.clone() for key, tensor in comfy.utils.load_torch_file(base).items()}
    key = next(key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.dim() > 1)
    scale = tensors[key].float().abs().amax() / 448
    tensors[key] = (tensors[key].float() / scale).to(torch.float8_e4m3fn)
    tensors[f"{key}_scale"] = scale
    return checkpoints.write(path, tensors), f"{key}_scale"


@pytest.mark.parametrize(
    ("load", "kind"),
    [(load_checkpoint, "sd15"), (lambda path: load_clip([path]), "clip_l"), (load_vae, "sd_vae")],
    ids=["checkpoint", "CLIP", "VAE"],
)
def test_every_loader_refuses_scales_without_a_format(load, kind, checkpoint, tmp_path):
    path, key = unscaled(tmp_path / "m.safetensors", checkpoint(kind))
    refused(load, str(path), key)


def with_f4(path, base, key, replace=False):
    """Write `base` with one more tensor, of 4 bits a number."""
    with open(base, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header, body = json.loads(file.read(length)), file.read()
    assert (key in header) == replace
    header[key] = {"dtype": "F4", "shape": [4, 16], "data_offsets": [len(body), len(body) + 32]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body + bytes(32))
    return str(path)


def test_a_tensor_of_four_bits_that_nobody_needs_does_no_harm(flux, tmp_path, caplog):
    path = with_f4(tmp_path / "f4.safetensors", flux, "extra.thing")
    classic, _ = pair(flux)
    assert_same(run(load_diffusion_model(path)), run(classic))
    assert "f4.safetensors" in caplog.text and "extra.thing" in caplog.text


def test_a_needed_tensor_of_four_bits_is_an_error_that_names_it(flux, tmp_path):
    key = next(key for key in comfy.utils.load_torch_file(flux) if key.endswith(f"{LAYER}.weight"))
    path = with_f4(tmp_path / "f4.safetensors", flux, key, replace=True)
    refused(load_diffusion_model, path, f"{LAYER}.weight", "4 or 6 bits")


def test_a_shard_alone_is_an_error_that_says_which_part_it_is(flux, checkpoint, tmp_path):
    tensors = comfy.utils.load_torch_file(flux)
    name = "flux-00002-of-00003.safetensors"
    words = [name, "part 2 of 3 of 'flux'", "the model's index, 'flux.safetensors.index.json', beside it"]
    for part in (slice(None, len(tensors) // 2), slice(len(tensors) // 2, None)):
        path = checkpoints.write(tmp_path / name, dict(list(tensors.items())[part]))
        refused(load_diffusion_model, str(path), *words)
    for load in (load_checkpoint, lambda path: load_clip([path]), load_vae):
        refused(load, str(path), *words)
    whole = checkpoints.write(tmp_path / "flux-00001-of-00001.safetensors", {"alpha": torch.zeros(2)})
    with pytest.raises(SourceError) as caught:
        load_diffusion_model(str(whole))
    assert "part" not in str(caught.value)


def test_the_layers_of_these_tests_are_quantised():
    assert any(part in LAYER for part in MATCH)


@pytest.mark.skipif(not hasattr(comfy.ops, "_load_quantized_module"), reason="this ComfyUI casts by a class of its own")
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_what_is_not_quantised_stays_in_the_file_in_its_dtype_until_it_is_used(kind, checkpoint, tmp_path):
    base = checkpoint("flux", dtype=torch.bfloat16, **SMALL)
    path = quantised(tmp_path / "m.safetensors", base, kind)
    host, ours = pair(path)
    weights = [
        (name, layer, param)
        for name, layer in ours.model.named_modules()
        if isinstance(layer, comfy.ops.CastWeightBiasOp)
        for bundle in [ours.dynamic.by_key.get(f"{name}.weight")]
        if bundle is not None
        for param in bundle.params
        if param.key == f"{name}.weight" and not is_wrapper(param.source)
    ]
    assert len(weights) > 10
    for name, layer, param in weights:
        assert param.source.dtype == torch.bfloat16 and locate(param.source) is not None, name
        made_in = getattr(layer, "factory_kwargs", {}).get("dtype")
        assert made_in is None or param.final.dtype == made_in == host.model.get_submodule(name).weight.dtype, name
    for _ in range(2):  # the first use, and what stays
        assert_same(run(ours), run(host))
