"""Extracted LoRAs: ComfyUI's loader makes the tuned model of the base with them."""

import os

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch

from kit.comfyui.loras import LINEAR, MLP, QKV, forms, numbers, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, run
from spillway.nodes.save import SpillwaySaveDiffusionModel, SpillwaySaveLora
from spillway.ops.files import deferred
from spillway.patcher.comfyui.loading.ggml import compute_dtype
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.saving.target import journal


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(deferred, "PART_BYTES", 1 << 15)  # several parts also for small models
    yield tmp_path
    assert not list(tmp_path.rglob(".spillway-*")) and not (journal().is_dir() and os.listdir(journal()))


def extract(model, base, rank=4, dtype="fp32"):
    path = SpillwaySaveLora.execute(model=model, base=base, rank=rank, filename_prefix="loras/x", dtype=dtype).args[0]
    return path, safetensors.torch.load_file(path)


def near(got, wanted, plain, share=0.01):
    assert (got - wanted).abs().max() < share * (plain - wanted).abs().max()


def test_a_lora_that_was_put_in_comes_back(checkpoint, caplog):
    """Of the rank that was put in; on three matrices, and on no other."""
    path = checkpoint("flux", **SMALL)
    classic, ours = comfy.sd.load_diffusion_model(path), load_diffusion_model(path)
    exact = compute_dtype(ours.model) == torch.float32  # else patched weights are rounded to 16 bit
    tuned = with_lora(ours, forms("lora"), 1.0)
    file, tensors = extract(tuned, ours)
    assert set(tensors) == {f"{stem}.lora_{side}.weight" for stem in (QKV, LINEAR, MLP) for side in ("up", "down")}
    assert tensors[f"{QKV}.lora_up.weight"].shape == (384, 4)
    for stem in (QKV, LINEAR, MLP):
        difference = forms("lora")[f"{stem}.lora_up.weight"] @ forms("lora")[f"{stem}.lora_down.weight"] * 0.5
        found = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
        assert (found - difference).norm() < (1e-4 if exact else 0.02) * difference.norm()
    again = with_lora(classic, comfy.utils.load_torch_file(file))
    assert "NOT LOADED" not in caplog.text.upper()
    near(run(again), run(tuned), run(classic), 0.01 if exact else 0.5)
    assert open(extract(tuned, classic)[0], "rb").read() == open(file, "rb").read()  # noqa: SIM115


def test_biases_norms_and_differences_of_full_rank_are_extracted(checkpoint, caplog):
    """Biases and norms as they differ; of a difference of full rank, what the rank holds."""
    path = checkpoint("flux", **SMALL)
    plain = load_diffusion_model(path)
    tuned = with_lora(plain, forms("diff"), 1.0)
    norm = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
    norm_key = next(key for key in plain.model_state_dict() if key.startswith(norm))
    tuned.add_patches({norm_key: ("diff", (numbers(128, scale=0.1),))})
    for rank, share in ((128, 0.01), (64, 0.9)):
        file, tensors = extract(tuned, plain, rank, "fp32")
        assert tensors[f"{QKV}.diff_b"].shape == (384,) and tensors[f"{QKV}.lora_down.weight"].shape == (rank, 128)
        assert len(tensors) == 10
        near(run(with_lora(plain, comfy.utils.load_torch_file(file))), run(tuned), run(plain), share)
    assert "not loaded" not in caplog.text.lower()


def test_the_lora_of_a_convolution_comes_back(checkpoint):
    path = checkpoint("sd15_unet", mult=(1,))
    plain = load_diffusion_model(path)
    stem = "diffusion_model.input_blocks.1.0.in_layers.2"
    lora = {
        f"{stem}.lora_up.weight": numbers(320, 4, 1, 1, scale=0.1),
        f"{stem}.lora_down.weight": numbers(4, 320, 3, 3),
    }
    tuned = with_lora(plain, lora)
    file, tensors = extract(tuned, plain, dtype="fp32")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {key: tuple(t.shape) for key, t in lora.items()}
    again = with_lora(plain, comfy.utils.load_torch_file(file))
    near(run(again, steps=1), run(tuned, steps=1), run(plain, steps=1))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_file_has_the_dtype_asked_for(dtype, checkpoint):
    plain = load_diffusion_model(checkpoint("flux", **SMALL))
    _, tensors = extract(with_lora(plain, forms("lora"), 1.0), plain, dtype=dtype)
    assert {t.dtype for t in tensors.values()} == {
        {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    }


def test_what_quantisation_changes_is_a_difference(checkpoint):
    """What quantisation changes is a difference too."""
    plain = load_diffusion_model(checkpoint("flux", **SMALL))
    saved = SpillwaySaveDiffusionModel.execute(model=plain, filename_prefix="q", dtype="fp8_e4m3fn scaled").args[0]
    quantised = load_diffusion_model(saved, policy=budget(plain, 0.25))
    before = run(quantised)
    _, tensors = extract(plain, quantised, rank=128)
    assert len(tensors) == 20 and f"{QKV}.lora_up.weight" in tensors
    up, down = tensors[f"{QKV}.lora_up.weight"], tensors[f"{QKV}.lora_down.weight"]
    weight, of_8_bits = (dict(one.model.named_parameters())[f"{QKV}.weight"] for one in (plain, quantised))
    difference = weight.float() - of_8_bits.to(plain.load_device).dequantize().float().cpu()
    assert (up @ down - difference).norm() < 1e-4 * difference.norm()
    assert_same(run(quantised), before)


def test_models_that_do_not_fit_are_refused_with_the_reason(checkpoint):
    flux = load_diffusion_model(checkpoint("flux", **SMALL))
    with pytest.raises(ValueError, match="are the same"):
        extract(flux, flux)
    with pytest.raises(ValueError, match="are the same"):
        extract(flux, comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL)))
    with pytest.raises(ValueError, match=r"Flux and Flux have other weights, such as .*one architecture"):
        extract(flux, load_diffusion_model(checkpoint("flux", **{**SMALL, "depth": 2})))
    with pytest.raises(ValueError, match=r"is \(128, 64\) in one model and \(256, 64\) in the other"):
        extract(flux, load_diffusion_model(checkpoint("flux", **{**SMALL, "hidden": 256})))
    assert not os.listdir(os.path.join(folder_paths.get_output_directory(), "loras"))
