"""LoRAs on files in ComfyUI's formats stay beside weights of 4 bits, exact, and beside others if a policy says so."""

import comfy.model_management
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.loras import with_lora
from kit.comfyui.pairs import FRACTIONS, assert_same, classic_model, run
from kit.comfyui.saving import assert_same_tensors, read, save
from spillway.ops.gather import gathered_bytes, inner_tensors, interpret_gathered_like
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.quantise.formats import FORMATS
from spillway.patcher.comfyui.quantise.int8 import INT8
from spillway.patcher.policy import Policy

pytestmark = pytest.mark.usefixtures("output")
STEPS, STRENGTH = 2, 0.6
# How many times as far from the model in 16 bit latents are where ComfyUI merges the LoRA, at least.
WORSE = 1.5


@pytest.fixture(params=["dequantised", "multiplied"])
def products(request, monkeypatch):
    """Whether ComfyUI believes that the device multiplies in every format."""
    for name in ("fp8", "mxfp8", "nvfp4"):
        if request.param == "multiplied" and hasattr(comfy.model_management, f"supports_{name}_compute"):
            monkeypatch.setattr(comfy.model_management, f"supports_{name}_compute", lambda device=None: True)


@pytest.fixture
def on_every_matrix(flux, tmp_path):
    return comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora.safetensors", flux))


def far(one, other):
    return 1 - float(torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def patched(model):
    return [param for bundle in model.dynamic.bundles for param in bundle.params if param.patch is not None]


@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_beside_a_file_is_as_exact_as_on_the_fly(name, products, flux, on_every_matrix):
    mode = "auto" if FORMATS[name].bits < 8 else "side branch"
    lora, path = on_every_matrix, save(load_diffusion_model(flux), name)
    model = load_diffusion_model(path, policy=Policy(int8_lora=mode))
    without, got = run(model, STEPS), run(with_lora(model, lora, STRENGTH), STEPS)
    assert sum(getattr(param.final, "rank", 0) for param in patched(model)) == 10 * 4
    assert any(words.startswith("LoRA on ") and "side branch" in words for words in model.dynamic.ledger.decisions)
    quantised = load_diffusion_model(flux, name, Policy(int8_lora="side branch"))
    assert_same(got, run(with_lora(quantised, lora, STRENGTH), STEPS))
    merged = run(with_lora(classic_model(path), lora, STRENGTH), STEPS)
    wanted = run(with_lora(load_diffusion_model(flux), lora, STRENGTH), STEPS)
    times = far(merged, wanted) / far(got, wanted)
    assert times > (WORSE if FORMATS[name].bits < 8 else 1), times
    for fraction in FRACTIONS:
        model.set_policy(Policy(int8_lora=mode, vram_bytes=int(fraction * model.dynamic.total_bytes)))
        for _ in range(2):
            assert_same(run(with_lora(model, lora, STRENGTH), STEPS), got)
    model.set_policy(Policy(int8_lora="merge"))
    assert_same(run(with_lora(model, lora, STRENGTH), STEPS), merged)
    assert_same(run(model, STEPS), without)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].algorithm in ("nvfp4", "float8_e4m3fn")])
def test_the_scale_of_an_input_that_a_file_has_holds_with_a_lora(name, products, flux, tmp_path, wide_forms):
    tensors = read(save(load_diffusion_model(flux), name))[0]
    layers = [key.removesuffix(".comfy_quant") for key in tensors if key.endswith(".comfy_quant")]
    tensors |= {f"{layer}.input_scale": torch.tensor(0.004) for layer in layers}
    path = checkpoints.write(tmp_path / "scales.safetensors", tensors)
    model = load_diffusion_model(path, policy=Policy(int8_lora="side branch", vram_bytes=0))
    without = run(model, STEPS)
    assert_same(without, run(classic_model(path), STEPS))
    assert_same(run(with_lora(model, wide_forms("lora"), 1e-30), STEPS), without)
    assert [param.final.rank for param in patched(model)] == [4, 4, 4]


def in_fp8(path, target):
    """A file with a model's matrices in fp8, and one with the same numbers in the model's own dtype."""
    tensors = comfy.utils.load_torch_file(path)
    narrow = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in tensors.items()}
    same = {key: value.to(tensors[key].dtype) for key, value in narrow.items()}
    names = {"fp8.safetensors": narrow, "same.safetensors": same}
    return [str(checkpoints.write(target / name, tensors)) for name, tensors in names.items()]


@pytest.mark.parametrize("name", [INT8, *FORMATS])
def test_a_lora_of_small_numbers_acts_beside_a_model_in_fp8(name, flux, wide_forms, tmp_path, monkeypatch):
    """ComfyUI keeps a file in fp8 so on devices that multiply in it, and wherever 16 bit would be too large."""
    monkeypatch.setattr(comfy.model_management, "maximum_vram_for_weights", lambda device=None: 0)
    path, same = in_fp8(flux, tmp_path)
    lora = wide_forms("lora")
    # fp8 has no numbers below 0.002. The product is as large as that of other LoRAs.
    small = {key: value * 1000 if key.endswith("lora_down.weight") else value for key, value in lora.items()}
    small = {key: value / 1000 if key.endswith("lora_up.weight") else value for key, value in small.items()}
    model = load_diffusion_model(path, name, Policy(int8_lora="side branch"))
    assert model.model.get_dtype() == torch.float8_e4m3fn
    without = run(model, STEPS)
    acted = run(with_lora(model, small, 5.0), STEPS) - without
    assert [param.final.rank for param in patched(model)] == [4, 4, 4]
    plain = load_diffusion_model(same)
    wanted = run(with_lora(plain, small, 5.0), STEPS) - run(plain, STEPS)
    assert bool(acted.any()), "nothing is left of the LoRA"
    assert far(acted, wanted) < 0.25


@pytest.mark.parametrize("name", [INT8, *(name for name in FORMATS if FORMATS[name].bits >= 8)])
def test_a_lora_is_merged_into_a_model_in_fp8_before_its_weights_are_rounded(
    name, flux, on_every_matrix, tmp_path, monkeypatch
):
    """Once. Rounded to the model's fp8 first, they would be several times as far from what they stand for."""
    monkeypatch.setattr(comfy.model_management, "maximum_vram_for_weights", lambda device=None: 0)
    path, _ = in_fp8(flux, tmp_path)
    model = with_lora(load_diffusion_model(path, name, Policy(int8_lora="merge")), on_every_matrix, STRENGTH)
    assert model.model.get_dtype() == torch.float8_e4m3fn
    run(model, 1)
    merged = [
        (view, param)
        for bundle in model.dynamic.bundles
        for view, param in zip(bundle.views or (), bundle.params, strict=False)
        if param.patch is not None and param.quantisation is not None
    ]
    assert len(merged) == 10
    for view, param in merged:
        template = param.quantisation.template(param.original.shape, torch.float32)
        memory = torch.empty(gathered_bytes([template]), dtype=torch.uint8, device=view.device)
        (wanted,) = interpret_gathered_like([template], memory)
        wanted.quantise_(param.patch(param.original.to(view.device).float()))
        for got, part in zip(inner_tensors(view), inner_tensors(wanted), strict=True):
            assert torch.equal(got.reshape(-1).view(torch.uint8), part.reshape(-1).view(torch.uint8)), param.key
    if name in FORMATS:  # there is no file in INT8 of our own
        plain = with_lora(load_diffusion_model(path), on_every_matrix, STRENGTH)
        assert plain.model.get_dtype() == torch.float8_e4m3fn
        saved = save(plain, name)
        assert_same(run(load_diffusion_model(saved), STEPS), run(model, STEPS))


def test_a_model_with_a_lora_beside_it_is_saved_merged(flux, wide_forms):
    path, lora = save(load_diffusion_model(flux), "nvfp4"), wide_forms("lora")
    model = with_lora(load_diffusion_model(path), lora, STRENGTH)
    run(model, steps=1)
    merged = with_lora(load_diffusion_model(path, policy=Policy(int8_lora="merge")), lora, STRENGTH)
    assert_same_tensors(read(save(model))[0], read(save(merged))[0])


def test_what_is_more_than_a_low_rank_product_is_merged(flux, wide_forms):
    path = save(load_diffusion_model(flux), "nvfp4")
    for kind in ("dora", "loha"):
        model = with_lora(load_diffusion_model(path), wide_forms(kind), STRENGTH)
        assert_same(run(model, 1), run(with_lora(classic_model(path), wide_forms(kind), STRENGTH), 1))
