"""The table of ComfyUI's folders: real architectures, adapters and model patches by their own names."""

import os

import comfy_extras.nodes_model_patch
import pytest
import torch
from safetensors.torch import save_file

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL
from spillway.nodes.scan import ALL, SpillwayScanModels

PATCHES = {
    "qwen": ("patch_qwen_diffsynth", "Qwen-Image control"),
    "uso": ("patch_uso", "USO style reference"),
    "z_image": ("patch_z_image_control", "Z-Image control"),
    "uni3c": ("patch_wan_uni3c", "Uni3C for Wan"),
    "lllite": ("patch_anima_lllite", "LLLite"),
}
ADAPTERS = {
    "t2i_light": ("T2I-Adapter", ["body.0.in_conv.weight"]),
    "t2i": ("T2I-Adapter", ["conv_in.weight", "body.0.block1.weight", "body.0.block2.weight"]),
    "t2i_diffusers": ("T2I-Adapter", ["adapter.body.0.resnets.0.block1.weight"]),
    "ip": ("IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
    "ip_plus": ("IP-Adapter", ["image_proj.latents", "ip_adapter.1.to_k_ip.weight"]),
    "redux": ("style model, Flux Redux", ["redux_down.weight", "redux_up.weight"]),
}


def lines(**inputs):
    """{file: line} of the table."""
    report = SpillwayScanModels.execute(**inputs).args[0].splitlines()
    return {line.split("|")[0].strip(): line for line in report[3:]}


@pytest.mark.parametrize("name", PATCHES)
def test_model_patches(name, models_dir):
    build, words = PATCHES[name]
    path = models_dir / "model_patches" / f"scan_{name}.safetensors"
    with checkpoints.small_patches():
        getattr(checkpoints, build)(path)
    try:
        assert f"| model patch, {words}" in lines(folder="model_patches")[f"model_patches/{path.name}"]
    finally:
        os.unlink(path)
    assert comfy_extras.nodes_model_patch.ModelPatchLoader


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, models_dir):
    kind, keys = ADAPTERS[name]
    path = models_dir / "controlnet" / f"scan_{name}.safetensors"
    save_file({key: torch.zeros(4, 4) for key in keys}, path)
    try:
        assert f"| {kind} " in lines(folder="controlnet", name_contains="SCAN_")[f"controlnet/{path.name}"]
    finally:
        os.unlink(path)


def test_all_folders_and_a_change(checkpoint, models_dir):
    name = f"checkpoints/{os.path.basename(checkpoint('flux', **SMALL))}"
    before = SpillwayScanModels.fingerprint_inputs(folder=ALL)
    assert "| diffusion model, Flux" in lines(folder=ALL)[name] and "BF16" in lines(folder=ALL)[name]
    assert name not in lines(folder="vae") and name not in lines(folder=ALL, name_contains="nothing")
    path = models_dir / "vae" / "scan.safetensors"
    path.write_bytes(b"")
    try:
        assert "does not load" in lines(folder=ALL)["vae/scan.safetensors"]
        assert SpillwayScanModels.fingerprint_inputs(folder=ALL) != before
    finally:
        os.unlink(path)
    with pytest.raises(ValueError, match="expected one of all of them"):
        SpillwayScanModels.execute(folder="../..")
    assert SpillwayScanModels.fingerprint_inputs(folder="../..") == []
