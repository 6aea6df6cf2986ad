"""Saved diffusion models: what ComfyUI's own node would write, from models in any state, and loaders read it."""

import os

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui.loras import LINEAR, QKV, forms, numbers, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, run
from kit.comfyui.saving import PREFIX, assert_same_tensors, cast, comfyui_save, everywhere, read, save
from spillway.ops.files.disk_map import DiskMap
from spillway.patcher.comfyui.loading.ggml import compute_dtype
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.quantise.formats import SAVED_FORMATS
from spillway.patcher.comfyui.saving.save import SAVE_DTYPES

pytestmark = pytest.mark.usefixtures("output")


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0])
def test_a_saved_model_is_comfyuis_file_at_any_budget(fraction, checkpoint, tmp_path, small_parts):
    """A LoRA on every layer: ComfyUI's file bit for bit, at any budget, before and after a run."""
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    lora = everywhere(path, tmp_path)
    classic = comfy.sd.load_diffusion_model(path)
    ours = load_diffusion_model(path, policy=budget(classic, fraction))
    classic, ours = with_lora(classic, lora, 0.7), with_lora(ours, lora, 0.7)
    first = save(ours)
    wanted_run = run(classic)
    assert_same(run(ours), wanted_run)
    second = save(ours)
    names = [os.path.basename(path) for path in (first, second)]
    assert names == ["ours_00001_.safetensors", "ours_00002_.safetensors"]
    assert open(first, "rb").read() == open(second, "rb").read()  # noqa: SIM115
    (got, metadata), (wanted, comfyui_metadata) = read(first), read(comfyui_save(classic))
    assert_same_tensors(got, wanted)
    assert metadata == comfyui_metadata
    for load in (comfy.sd.load_diffusion_model, load_diffusion_model):
        assert_same(run(load(first)), wanted_run)


@pytest.mark.parametrize("dtype", [name for name in SAVE_DTYPES if name not in SAVED_FORMATS])
def test_a_saved_dtype_rounds_the_patched_weights(dtype, checkpoint, tmp_path, small_parts):
    """The patched weights in the rounding of the dtype; as loaded is the file's, though a CPU computes in fp32."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    classic, ours = with_lora(comfy.sd.load_diffusion_model(path), lora), with_lora(load_diffusion_model(path), lora)
    wanted, _ = read(comfyui_save(classic))
    kept = {"as loaded": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    saved = save(ours, dtype)
    assert_same_tensors(read(saved)[0], cast(wanted, kept))
    # The latents are those of the patched original with its weights so rounded.
    loaded = comfy.sd.load_diffusion_model(saved)
    rounded = cast(cast(wanted, kept), compute_dtype(loaded.model))
    reference = comfy.sd.load_diffusion_model_state_dict({key.removeprefix(PREFIX): rounded[key] for key in rounded})
    assert_same(run(loaded), run(reference))


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "glora", "oft", "diff", "set"])
def test_every_kind_of_patch_is_saved_as_comfyui_saves_it(kind, checkpoint, small_parts):
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    models = [with_lora(load(path), forms(kind), 0.8) for load in (comfy.sd.load_diffusion_model, load_diffusion_model)]
    wanted, _ = read(comfyui_save(models[0]))
    got, _ = read(save(models[1]))
    assert_same_tensors(got, wanted)
    plain = DiskMap(path)
    assert not torch.equal(got[f"{PREFIX}{QKV[16:]}.weight"], plain.tensor(f"{QKV[16:]}.weight"))


def test_patches_of_some_rows_are_saved_as_comfyui_saves_them(checkpoint, small_parts):
    """As ComfyUI makes them of LoRAs with a matrix for each of query, key and value; and several on one weight."""
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    files = []
    for load, saver in ((comfy.sd.load_diffusion_model, comfyui_save), (load_diffusion_model, save)):
        model = with_lora(load(path), forms("lora"), 0.3)
        for start, length in ((0, 128), (100, 200), (383, 1)):
            patch = ("diff", (numbers(length, 128, seed=start),))
            model.add_patches({(f"{QKV}.weight", (0, start, length)): patch}, 0.5, 0.9)
            model.add_patches({(f"{LINEAR}.weight", (1, 5, 7)): ("diff", (numbers(896, 7, seed=start),))}, 0.5)
        model.add_patches({(f"{QKV}.weight", None, lambda diff: diff * 2): ("diff", (numbers(384, 128),))}, 0.5)
        files.append(read(saver(model))[0])
    assert_same_tensors(files[1], files[0])


def test_models_of_comfyui_are_saved_whatever_is_loaded(checkpoint, tmp_path, small_parts):
    """Models that are not ours, patched in memory by a run or not, with a clone's patches or their own."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    plain = comfy.sd.load_diffusion_model(path)
    one, other = with_lora(plain, lora, 0.7), with_lora(plain, forms("lora"), 1.0)
    wanted = [read(comfyui_save(model))[0] for model in (plain, one, other)]
    for loaded in (None, plain, one, other):
        comfy.model_management.unload_all_models()
        if loaded is not None:
            run(loaded, steps=1)
        for model, tensors in zip((plain, one, other), wanted, strict=True):
            assert_same_tensors(read(save(model))[0], tensors)


def test_models_of_ours_are_saved_whatever_is_attached(checkpoint, tmp_path):
    path = checkpoint("flux", **SMALL)
    plain = load_diffusion_model(path)
    one, other = with_lora(plain, everywhere(path, tmp_path), 0.7), with_lora(plain, forms("lora"), 1.0)
    wanted = [open(save(model), "rb").read() for model in (plain, one, other)]  # noqa: SIM115
    assert_same_tensors(cast(read(save(plain))[0], torch.float32), cast(read(comfyui_save(plain))[0], torch.float32))
    for loaded in (plain, one, other):
        before = run(loaded)
        for model, data in zip((plain, one, other), wanted, strict=True):
            assert open(save(model), "rb").read() == data  # noqa: SIM115
        assert_same(run(loaded), before)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_without_scales_is_kept(weight_dtype, checkpoint, tmp_path):
    """The loader's choice of a smaller dtype is kept, and rounded as for the run."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    options = {"dtype": getattr(torch, f"float8_{weight_dtype[4:]}")}
    classic = with_lora(comfy.sd.load_diffusion_model(path, model_options=options), lora)
    ours = with_lora(load_diffusion_model(path, weight_dtype), lora)
    assert_same_tensors(read(save(ours))[0], read(comfyui_save(classic))[0])


@pytest.mark.parametrize(
    ("kind", "options"), [("wan", {"layers": 1}), ("z_image", {"layers": 1}), ("sd15_unet", {"mult": (1,)})]
)
def test_other_architectures_are_saved_as_comfyui_saves_them(kind, options, checkpoint, tmp_path, small_parts):
    path = checkpoint(kind, **options, dtype=torch.float32)
    lora = everywhere(path, tmp_path)
    classic, ours = with_lora(comfy.sd.load_diffusion_model(path), lora), with_lora(load_diffusion_model(path), lora)
    assert_same_tensors(read(save(ours))[0], read(comfyui_save(classic))[0])


def test_resized_weights_are_saved_as_comfyui_saves_them(checkpoint):
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    files = []
    for load, saver in ((comfy.sd.load_diffusion_model, comfyui_save), (load_diffusion_model, save)):
        model = load(path).clone()
        patch = ("diff", (numbers(128, 128, scale=0.1), {"pad_weight": True}))
        model.add_patches({"diffusion_model.img_in.weight": patch}, 0.5)
        comfy.model_management.load_models_gpu([model])
        files.append(read(saver(model))[0])
    assert files[1][f"{PREFIX}img_in.weight"].shape == (128, 128)
    assert_same_tensors(files[1], files[0])
