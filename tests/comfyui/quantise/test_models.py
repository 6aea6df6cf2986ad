"""Which models are quantised, and how it is decided: native products, `auto`, text encoders, checkpoints, the node."""

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch
from comfy.quant_ops import QuantizedTensor

from kit.comfyui import checkpoints
from kit.comfyui.loras import with_lora
from kit.comfyui.pairs import assert_same, run
from kit.comfyui.sampling import text_encode
from kit.comfyui.saving import save
from spillway.nodes.load import SpillwayLoadCheckpoint
from spillway.nodes.quantise import SpillwayQuantiseModel, parts_of
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_clip, load_diffusion_model
from spillway.patcher.comfyui.quantise import choose
from spillway.patcher.comfyui.quantise.formats import FORMATS
from spillway.patcher.comfyui.quantise.layers import chosen
from spillway.patcher.policy import Policy

pytestmark = pytest.mark.usefixtures("output")
TEXT = "a cat in a hat"
EMULATED = [name for name, known in FORMATS.items() if known.algorithm in ("float8_e4m3fn", "mxfp8", "nvfp4")]


def quantised(patcher):
    return [p for bundle in patcher.dynamic.bundles for p in bundle.params if p.quantisation is not None]


def said(patcher):
    return " | ".join(words for words, _ in patcher.state.notes)


# -- on a device that multiplies in the format


@pytest.fixture
def multiplies(monkeypatch):
    """ComfyUI believes that the device multiplies in every format. comfy-kitchen then computes on the CPU."""
    for name in ("fp8", "mxfp8", "nvfp4"):
        if hasattr(comfy.model_management, f"supports_{name}_compute"):
            monkeypatch.setattr(comfy.model_management, f"supports_{name}_compute", lambda device=None: True)


@pytest.fixture
def multiplies_in_int8_alone(monkeypatch):
    """ComfyUI believes that the device multiplies in INT8 alone, as a CPU does."""
    for name in ("fp8", "mxfp8", "nvfp4"):
        if hasattr(comfy.model_management, f"supports_{name}_compute"):
            monkeypatch.setattr(comfy.model_management, f"supports_{name}_compute", lambda device=None: False)


@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("name", EMULATED)
def test_a_device_multiplies_as_with_a_file_in_the_format(name, fraction, flux, multiplies, monkeypatch):
    quantise, inputs = QuantizedTensor.from_float, []

    def from_float(*arguments, **options):
        inputs.append(None)
        return quantise(*arguments, **options)

    monkeypatch.setattr(QuantizedTensor, "from_float", from_float)
    whole = load_diffusion_model(flux, name)
    budget = int(fraction * whole.dynamic.total_bytes)
    assert "dequantised where it is used" not in said(whole)
    saved = save(whole, name)
    inputs.clear()
    wanted = run(comfy.sd.load_diffusion_model(saved))
    assert len(inputs) == 20  # 10 layers, 2 steps
    inputs.clear()
    assert_same(run(load_diffusion_model(flux, name, Policy(vram_bytes=budget))), wanted)
    assert len(inputs) == 20


def test_where_the_device_does_not_multiply_the_log_says_so(flux, w4a8, multiplies_in_int8_alone):
    for name in EMULATED:
        assert "dequantised where it is used" in said(load_diffusion_model(flux, name))
    assert "dequantised where it is used" not in said(load_diffusion_model(flux, w4a8))


# -- auto


def test_auto_takes_the_most_exact_that_fits(flux, w4a8, multiplies_in_int8_alone):
    """Of INT8 on a CPU that is our own, whose products are faster there."""
    plain = load_diffusion_model(flux)
    whole, eight = plain.model_size(), "int8" if plain.load_device.type == "cpu" else "int8_convrot"
    sizes = {}
    for name in (eight, w4a8):
        model = load_diffusion_model(flux, name)
        sizes[name] = model.model_size()
    assert sizes[w4a8] < sizes[eight] < whole
    for room, name in [(whole, "default"), (whole - 1, eight), (sizes[eight] - 1, w4a8), (0, w4a8)]:
        model = load_diffusion_model(flux, "auto", Policy(vram_bytes=room))
        forms = {p.quantisation.name for p in quantised(model)}
        assert {form.lower() for form in forms} == ({name} if name != "default" else set()), room
        assert "that the policy allows" in said(model) and "auto" in said(model)
        words = {"default": "stay as they are", eight: "most exact", w4a8: "most exact" if room else "smallest"}
        assert words[name] in said(model), said(model)
        assert any("auto" in words for words in model.dynamic.ledger.decisions)


# -- text encoders and checkpoints


@pytest.fixture
def t5(checkpoint, monkeypatch):
    original = comfy.sd.load_clip
    monkeypatch.setattr(
        comfy.sd,
        "load_clip",
        lambda ckpt_paths, embedding_directory=None, clip_type=None, *_, **__: original(
            ckpt_paths, embedding_directory, clip_type, checkpoints.T5XXL_SMALL_OPTIONS
        ),
    )
    return checkpoint("t5xxl_small")


def saved_clip(path, patcher, prefix, target):
    """Write a text encoder's file with the layers that a patcher's model would have quantised."""
    tensors = {key: tensor.clone() for key, tensor in comfy.utils.load_torch_file(path).items()}
    for name, weight, form in list(chosen(patcher.model, patcher.state.quantise)):
        key = f"{name.removeprefix(prefix)}.weight"
        made = {s: piece.empty(patcher.load_device) for s, piece in form.pieces(tuple(weight.shape)).items()}
        form.view(made, weight.shape, weight.dtype).quantise_(tensors.pop(key).to(patcher.load_device))
        tensors |= {f"{key}{suffix}": tensor.cpu() for suffix, tensor in made.items()}
        tensors[f"{name.removeprefix(prefix)}.comfy_quant"] = form.conf()
    safetensors.torch.save_file(tensors, target)
    return str(target)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if known.name.startswith("fp8") else pytest.mark.slow)
        for name, known in FORMATS.items()
    ],
)
def test_a_text_encoder_is_what_comfyui_reads_from_a_file_in_the_format(name, t5, tmp_path):
    """From a loader, and quantised by the node."""
    plain = comfy.sd.load_clip(ckpt_paths=[t5], clip_type=comfy.sd.CLIPType.LTXV)
    before = text_encode(plain, TEXT)[0]
    clip = load_clip([t5], "ltxv", Policy(vram_bytes=0), weight_dtype=name)
    path = saved_clip(t5, clip.patcher, "t5xxl.transformer.", tmp_path / "t5.safetensors")
    wanted = text_encode(comfy.sd.load_clip(ckpt_paths=[path], clip_type=comfy.sd.CLIPType.LTXV), TEXT)[0]
    got = text_encode(clip, TEXT)[0]
    assert_same(got, wanted)
    assert not torch.equal(got, before) and "text encoders in floating point" in said(clip.patcher)
    names = [param.key for param in quantised(clip.patcher)]
    assert len(names) == 24 * (1 if name == "w4a8" else 7) and not any(
        "shared" in key or "bias" in key for key in names
    )
    made = SpillwayQuantiseModel.execute("auto", name, "", clip=plain).args[1]
    assert made.cond_stage_model is made.patcher.model
    assert_same(text_encode(made, TEXT)[0], wanted)
    assert_same(text_encode(plain, TEXT)[0], before)


def test_a_checkpoint_is_quantised_part_by_part(checkpoint, tmp_path, models_dir):
    path = checkpoint("sd15")
    model, clip, vae, _ = load_checkpoint(path, weight_dtype="nvfp4", clip_dtype="fp8_e4m3fn scaled")
    plain = load_checkpoint(path)
    assert len(quantised(model)) > 10 and len(quantised(clip.patcher)) == 12 * 6
    assert vae.patcher.model_size() == plain[2].patcher.model_size()
    assert model.model_size() < plain[0].model_size() and clip.patcher.model_size() < plain[1].patcher.model_size()
    # ComfyUI loads it again for another device, in the same format.
    for patcher in (model, clip.patcher):
        factory, arguments, *part = patcher.cached_patcher_init
        again = factory(*arguments)
        again = again[part[0]] if part else again
        assert len(quantised(again)) == len(quantised(patcher)) and again.model is not patcher.model
    with pytest.raises(ValueError, match="'int8' is not one of default"):
        load_checkpoint(path, clip_dtype="int8")
    name = path.rpartition("/")[2]
    result = SpillwayLoadCheckpoint.execute(name, "nvfp4", "nvfp4")
    assert str(result.ui.as_dict()).count("quantised to nvfp4") == 2


# -- the node


@pytest.fixture(params=["ComfyUI's, from its file", "ComfyUI's, from memory", "ours", "ours, made dynamic"])
def source(request, flux, wide_forms):
    """A model of some loader's, with a LoRA, that runs already."""
    ours = request.param.startswith("ours")
    model = load_diffusion_model(flux) if ours else comfy.sd.load_diffusion_model(flux)
    if request.param in ("ours, made dynamic", "ComfyUI's, from memory"):
        model.cached_patcher_init = None
    patched = with_lora(model, wide_forms("lora"), 0.6)
    run(patched, steps=1)
    return patched


@pytest.mark.parametrize("name", ["nvfp4", "int8"])
def test_the_node_quantises_a_copy_with_its_loras(name, source, flux, wide_forms):
    before = run(source)
    wanted = run(with_lora(load_diffusion_model(flux, name), wide_forms("lora"), 0.6))
    result = SpillwayQuantiseModel.execute(weight_dtype=name, clip_dtype="auto", leave_out="", model=source)
    made, clip = result.args
    assert clip is None and "10 layers" in str(result.ui.as_dict())
    assert_same(run(made), wanted)
    assert_same(run(source), before)
    assert_same(run(made), wanted)


def test_the_node_leaves_layers_out(flux):
    assert parts_of("txt_mlp, 0\n*attn ,") == ("txt_mlp", "0", "*attn")
    model = comfy.sd.load_diffusion_model(flux)
    for name in ("nvfp4", "int8"):
        made = SpillwayQuantiseModel.execute(name, "auto", "txt_*\nlinear1", model=model).args[0]
        run(made, steps=1)
        names = [param.key for param in quantised(made)]
        assert len(names) == 5 and not any("txt_" in key or "linear1" in key for key in names)
    nothing = SpillwayQuantiseModel.execute("nvfp4", "auto", "*", model=model)
    assert "no layers for it" in str(nothing.ui.as_dict())
    with pytest.raises(ValueError, match="neither model nor clip"):
        SpillwayQuantiseModel.execute("nvfp4", "auto", "")


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_file_is_quantised_further(name, flux, tmp_path):
    """FP8 to four bits and to INT8. What has as few bits already stays."""
    path = save(load_diffusion_model(flux), "fp8_e4m3fn scaled")
    model = load_diffusion_model(path, name)
    if FORMATS[name].bits == 8 and name != "int8_convrot":
        assert not quantised(model) and "no layers for it" in said(model)
        return
    got, wanted = run(model), run(load_diffusion_model(flux))
    assert len(quantised(model)) == 10
    assert float(torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)) > 0.97


def test_the_room_of_a_device_is_what_a_computation_leaves(flux):
    model = load_diffusion_model(flux)
    room, whose = choose.room_for_weights(model)
    assert room > 0 and ("RAM" in whose or "beside what a computation needs" in whose)
