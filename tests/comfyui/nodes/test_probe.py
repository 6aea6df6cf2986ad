"""The probe on the files of real architectures: what they are, and what ComfyUI would load them as."""

import os

import pytest

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL
from spillway.nodes.probe import SpillwayProbeModel, _files
from spillway.nodes.save import SpillwaySaveDiffusionModel
from spillway.ops.files.disk_map import SourceError
from spillway.patcher.comfyui.loading.load import load_diffusion_model

NAMES = {
    "flux": (SMALL, "diffusion model, Flux", "Flux"),
    "wan": ({"layers": 1}, "diffusion model, Wan", "WAN21_T2V"),
    "z_image": ({"layers": 1}, "diffusion model, Z-Image", "Lumina2"),  # so small a one is Lumina 2 to ComfyUI
    "sd15_unet": ({"mult": (1,)}, "diffusion model, Stable Diffusion 1", "SD15"),
    "sd15": ({}, "checkpoint, Stable Diffusion 1", "SD15"),
    "clip_l": ({}, "text encoder, CLIP", None),
    "t5_base": ({}, "text encoder, T5", None),
    "flux_vae": ({}, "VAE", None),
    "wan_vae": ({}, "VAE", None),
}


@pytest.mark.parametrize("kind", NAMES)
def test_the_kind_of_a_file_is_named_as_comfyui_loads_it(kind, checkpoint):
    options, words, comfyui_name = NAMES[kind]
    path = checkpoint(kind, **options)
    lines = SpillwayProbeModel.execute(file=f"checkpoints/{os.path.basename(path)}").args[0].splitlines()
    assert lines[0] == f"{os.path.basename(path)}: {words}"
    assert (lines[-1] == f"ComfyUI loads it as: {comfyui_name}") == (comfyui_name is not None)
    assert f"checkpoints/{os.path.basename(path)}" in _files()


def test_a_lora_and_a_quantised_model_are_described(checkpoint, models_dir, monkeypatch):
    import folder_paths

    path = checkpoint("flux", **SMALL)
    checkpoints.lora(models_dir / "loras" / "x.safetensors", path, rank=6)
    report = SpillwayProbeModel.execute(file="loras/x.safetensors").args[0]
    assert report.startswith("x.safetensors: LoRA\n") and "ranks: 6 (23 layers)" in report
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(models_dir / "checkpoints"))
    saved = SpillwaySaveDiffusionModel.execute(
        model=load_diffusion_model(path), filename_prefix="q", dtype="fp8_e4m3fn scaled"
    ).args[0]
    report = SpillwayProbeModel.execute(file=f"checkpoints/{os.path.basename(saved)}").args[0]
    os.unlink(saved)
    assert "quantised: fp8_e4m3fn scaled (10 layers)" in report and "ComfyUI loads it as: Flux" in report


def test_a_bad_file_is_an_error_with_its_name(checkpoint, models_dir):
    checkpoints.truncated(models_dir / "checkpoints" / "bad.safetensors", build=checkpoints.flux, **SMALL)
    with pytest.raises(SourceError, match=r"bad\.safetensors: truncated"):
        SpillwayProbeModel.execute(file="checkpoints/bad.safetensors")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'no\.safetensors' in"):
        SpillwayProbeModel.execute(file="checkpoints/no.safetensors")
    with pytest.raises(ValueError, match="in none of the folders"):
        SpillwayProbeModel.execute(file="../x.safetensors")
    with pytest.raises(FileNotFoundError):
        SpillwayProbeModel.execute(file="checkpoints/../../etc/passwd")
