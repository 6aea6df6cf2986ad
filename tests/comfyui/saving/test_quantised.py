"""Saved quantised models: ComfyUI's own quantisation of its own patched weights."""

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from kit.comfyui.loras import QKV, forms, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, run
from kit.comfyui.quantised import reference
from kit.comfyui.saving import PREFIX, assert_same_tensors, cast, comfyui_save, everywhere, like, read, save
from spillway.ops.files.disk_map import DiskMap
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.quantise.formats import SAVED_FORMATS
from spillway.patcher.comfyui.quantise.weight import KitchenFormat
from spillway.patcher.comfyui.saving.recipes import as_written

pytestmark = pytest.mark.usefixtures("output")


@pytest.mark.parametrize("dtype", [name for name in ("fp8_e4m3fn scaled", "int8_tensorwise") if name in SAVED_FORMATS])
def test_a_saved_quantisation_is_comfyuis_own_and_loads_everywhere(dtype, checkpoint, tmp_path, small_parts):
    """ComfyUI's own quantisation of its own patched weights, in the blocks; it loads here and there, and runs."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    classic, ours = with_lora(comfy.sd.load_diffusion_model(path), lora), with_lora(load_diffusion_model(path), lora)
    wanted, _ = read(comfyui_save(classic))
    saved = save(ours, dtype)
    got, _ = read(saved)
    algorithm = SAVED_FORMATS[dtype].algorithm
    layers = [key.removesuffix(".comfy_quant") for key in got if key.endswith(".comfy_quant")]
    assert len(layers) == 10 and all("_blocks.0." in layer for layer in layers)
    for layer in layers:
        reference = QuantizedTensor.from_float(
            wanted.pop(f"{layer}.weight").to(ours.load_device),
            QUANT_ALGOS[algorithm]["comfy_tensor_layout"],
            scale="recalculate",
        )
        conf = got.pop(f"{layer}.comfy_quant").numpy().tobytes()
        assert conf == b'{"format": "%s"}' % algorithm.encode()
        pieces = {f"{layer}.{name}": got.pop(f"{layer}.{name}") for name in ("weight", "weight_scale")}
        made = {name: tensor.cpu() for name, tensor in reference.state_dict(f"{layer}.weight").items()}
        assert_same_tensors(pieces, made)
    assert_same_tensors(got, cast(wanted, torch.bfloat16))
    before = run(classic)
    again = comfy.sd.load_diffusion_model(saved), load_diffusion_model(saved, policy=budget(classic, 0.1))
    results = [run(model) for model in again]
    assert_same(*results)
    assert 0 < (results[0] - before).abs().mean() < 0.2 * before.abs().mean()
    # LoRAs on it, saved in its own quantisation and in another.
    patched = [with_lora(model, forms("lora"), 0.5) for model in again]
    wanted, _ = read(comfyui_save(patched[0]))
    # Of what is not quantised ComfyUI makes fp32 copies on a CPU.
    assert_same_tensors(like(read(save(again[1]))[0], got := read(saved)[0]), got)
    assert_same_tensors(like(read(save(patched[1]))[0], wanted), wanted)
    assert_same_tensors(read(save(patched[0]))[0], wanted)
    plain, _ = read(save(patched[1], "bf16"))
    assert set(plain) == {key for key in wanted if not key.endswith((".comfy_quant", ".weight_scale"))}
    comfy.model_management.unload_all_models()
    for layer in layers:
        key = f"diffusion_model.{layer.removeprefix(PREFIX)}.weight"
        weight = patched[0].patch_weight_to_device(key, patched[0].load_device, return_weight=True)
        assert torch.equal(plain[f"{layer}.weight"], weight.dequantize().bfloat16().cpu())


@pytest.mark.parametrize("algorithm", [name for name in ("float8_e5m2", "mxfp8", "nvfp4") if name in QUANT_ALGOS])
def test_other_quantisations_are_kept(algorithm, checkpoint, tmp_path):
    """Files that others have quantised: unpatched as they are, patched as ComfyUI quantises them again."""
    tensors, layer = dict(DiskMap(checkpoint("flux", **SMALL)).state_dict()), QKV[16:]
    quantised = QuantizedTensor.from_float(
        tensors.pop(f"{layer}.weight").float(), QUANT_ALGOS[algorithm]["comfy_tensor_layout"], scale="recalculate"
    )
    tensors |= quantised.state_dict(f"{layer}.weight")
    conf = b'{"format": "%s"}' % algorithm.encode()
    tensors[f"{layer}.comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
    path = str(tmp_path / "quantised.safetensors")
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    classic, ours = comfy.sd.load_diffusion_model(path), load_diffusion_model(path)
    got = read(save(ours))[0]
    wanted = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    pieces = [key for key in got if key.startswith(f"{PREFIX}{layer}.")]
    assert len(pieces) == len(quantised.state_dict("x")) + 2  # the bias, and the name of the format
    for key in pieces:
        stored = wanted[key]
        if stored.dtype.itemsize != got[key].dtype.itemsize:  # the bias has been made fp32 by ComfyUI
            stored = stored.to(got[key].dtype)
        assert torch.equal(got[key].reshape(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8)), key
    files = [
        read(saver(with_lora(model, forms("lora"))))[0] for model, saver in ((classic, comfyui_save), (ours, save))
    ]
    # Of what is not quantised ComfyUI has made fp32 copies on a CPU. Here it stays in the dtype of the file.
    rounded = {
        key: tensor.to(files[1][key].dtype).to(tensor.dtype) if files[1][key].dtype.itemsize == 2 else tensor
        for key, tensor in files[0].items()
    }
    assert_same_tensors(like(files[1], files[0]), rounded)


@pytest.mark.parametrize("stored", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("dtype", SAVED_FORMATS)
def test_weights_in_fp8_are_quantised_as_the_numbers_that_they_are(dtype, stored, checkpoint, tmp_path, small_parts):
    """By ComfyUI's own functions: in fp32 where the model has them in fp8, in which nothing is computed, else in the
    model's dtype. A scale that was computed in 16 bit is another one."""
    tensors = comfy.utils.load_torch_file(checkpoint("flux", **SMALL))
    narrow = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    path = str(tmp_path / "fp8.safetensors")
    safetensors.torch.save_file(narrow, path)
    model = load_diffusion_model(path, stored)
    got, computed = read(save(model, dtype))[0], model.model.get_dtype()
    assert stored == "default" or computed == torch.float8_e4m3fn
    layers = [name.removesuffix(".comfy_quant") for name in got if name.endswith(".comfy_quant")]
    assert layers
    for layer in layers:
        numbers = narrow[f"{layer.removeprefix(PREFIX)}.weight"].to(model.load_device)
        numbers = numbers.to(torch.float32 if computed.itemsize == 1 else computed)
        form = KitchenFormat.of(SAVED_FORMATS[dtype], numbers.shape[1])
        made = reference(form, numbers).state_dict(f"{layer}.weight")
        wanted = {name: as_written(tensor).cpu() for name, tensor in made.items()}
        assert_same_tensors({name: got[name] for name in wanted}, wanted)


def test_a_matrix_of_zeros_is_quantised(checkpoint):
    path = checkpoint("flux", **SMALL)
    model = load_diffusion_model(path).clone()
    model.add_patches({f"{QKV}.weight": ("set", (torch.zeros(384, 128),))})
    got, _ = read(save(model, "fp8_e4m3fn scaled"))
    key = f"{PREFIX}{QKV[16:]}.weight"
    assert bool((got[key].float() == 0).all()) and torch.isfinite(got[f"{key}_scale"])


def test_quantised_models_of_comfyui_are_saved_whatever_is_loaded(checkpoint, tmp_path):
    """While another clone's patches are in ComfyUI's memory."""
    plain = comfy.sd.load_diffusion_model(save(load_diffusion_model(checkpoint("flux", **SMALL)), "fp8_e4m3fn scaled"))
    one, other = with_lora(plain, forms("lora"), 0.7), with_lora(plain, forms("loha"), 1.0)
    wanted = [read(comfyui_save(model))[0] for model in (plain, one, other)]
    for loaded in (plain, one, other):
        run(loaded, steps=1)
        for model, tensors in zip((plain, one, other), wanted, strict=True):
            assert_same_tensors(read(save(model))[0], tensors)
