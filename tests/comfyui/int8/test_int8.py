"""Checkpoints of any dtype in INT8: near the original, the same at any residency, with LoRAs, and explained."""

import inspect
import json
import shutil
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.fresh_process import LINUX, run_with_lora
from kit.comfyui.hooks import hook_lora, hooked
from kit.comfyui.loras import LINEAR, forms, with_lora
from kit.comfyui.pairs import EACH_FRACTION, SMALL, assert_same, pair, run
from kit.comfyui.sampling import sample
from spillway.nodes.load import SpillwayLoadDiffusionModel
from spillway.ops.files.disk_map import SourceError
from spillway.ops.int8 import measure as int8_measure
from spillway.ops.int8.weight import Int8Weight
from spillway.patcher.comfyui.loading.ggml import compute_dtype
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.patches import int8_lora
from spillway.patcher.comfyui.saving.save import save_model
from spillway.patcher.policy import Policy

QuantizedTensor = comfy.quant_ops.QuantizedTensor
needs_int8_files = pytest.mark.skipif(
    "int8_tensorwise" not in comfy.quant_ops.QUANT_ALGOS, reason="this ComfyUI has no int8_tensorwise"
)
ARCHITECTURES = {
    "flux": SMALL,
    "wan": {},
    "lumina2": {},
    "z_image": {},
    "sd15_unet": {},
}
STEPS = 4
COSINE = 0.995


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.fixture
def speed(monkeypatch):
    """`speed(gain)`: what every measurement will find."""

    def set_to(gain):
        monkeypatch.setattr(int8_measure, "_measured", {})
        monkeypatch.setattr(int8_measure, "_time", lambda *_: (gain, 1.0))

    return set_to


def int8_layers(model):
    return [p.key for bundle in model.dynamic.bundles for p in bundle.params if p.quantisation]


# -- near the original


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_latents_in_int8_are_near_the_originals(kind, checkpoint, record_property):
    path = checkpoint(kind, **ARCHITECTURES[kind])
    wanted = sample(load_diffusion_model(path), STEPS)
    model = load_diffusion_model(path, "int8")
    got = sample(model, STEPS)
    near = cosine(got, wanted)
    record_property("cosine", near)
    print(f"{kind}: {len(int8_layers(model))} layers in INT8, cosine {near:.6f}")
    assert COSINE < near < 1.0
    assert not torch.equal(got, wanted)
    assert int8_layers(model)


@pytest.mark.parametrize("fraction", EACH_FRACTION)
def test_the_same_bits_at_any_residency(fraction, flux):
    whole = load_diffusion_model(flux, "int8")
    wanted = run(whole, STEPS)
    # Of a budget, buffers take a part on a device.
    budget = int(fraction * whole.dynamic.total_bytes) if fraction < 1 else None
    model = load_diffusion_model(flux, "int8", Policy(vram_bytes=budget))
    for _ in range(2):
        assert_same(run(model, STEPS), wanted)
    # A device's pins come from a thread of their own: where one is late, its layer is quantised again.
    layers = len(int8_layers(model))
    most = layers if model.dynamic.backend.in_place else 2 * layers
    assert layers <= model.dynamic.ledger.counters.quantised <= most
    unit = model.dynamic.residency.vbar.unit if fraction == 1 else 1  # comfy-aimdo maps whole pages
    assert model.dynamic.peak_resident_bytes <= -(int(fraction * whole.dynamic.total_bytes) // -unit) * unit


def test_sensitive_layers_and_idle_parameters_stay_as_they_are(flux):
    model = load_diffusion_model(flux, "int8")
    run(model, 1)
    names = int8_layers(model)
    assert "diffusion_model.double_blocks.0.img_attn.qkv.weight" in names
    kept = {p.key for b in model.dynamic.bundles for p in b.params} - set(names)
    for part in ("img_in", "time_in", "final_layer", "img_mod", "norm", "bias", "modulation"):
        assert any(part in key for key in kept) and not any(part in key for key in names)
    root = model.model.diffusion_model
    # While nobody uses it, a parameter's numbers are the file's, and it reads as what the model computes with.
    qkv = root.double_blocks[0].img_attn.qkv
    assert qkv.state_dict()["weight"].dtype == torch.bfloat16 and qkv.weight.dtype == compute_dtype(model.model)
    assert not isinstance(root.double_blocks[0].img_attn.qkv.weight, Int8Weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn])
def test_checkpoints_of_other_dtypes_are_quantised_too(dtype, checkpoint):
    path = checkpoint("flux", **SMALL, dtype=dtype)
    wanted = sample(load_diffusion_model(path), STEPS)
    model = load_diffusion_model(path, "int8")
    assert COSINE < cosine(sample(model, STEPS), wanted) < 1.0
    assert len(int8_layers(model)) == 10


def test_comfyui_makes_room_for_the_quantised_size(flux):
    plain, model = load_diffusion_model(flux), load_diffusion_model(flux, "int8")
    run(model, 1)
    weights = [p for b in model.dynamic.bundles for p in b.params if p.quantisation]
    bf16 = sum(2 * p.source.numel() for p in weights)
    int8 = sum(p.final.qdata.nbytes + p.final.scale.nbytes for p in weights)
    assert model.model_size() == model.clone().model_size() == plain.model_size() - bf16 + int8


# -- files that are quantised


def requantised(path, target, kind, **conf):
    """A copy of a Flux file with its large matrices in a format of ComfyUI's."""
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    out = {}
    for name, tensor in comfy.utils.load_torch_file(path).items():
        if not name.endswith(".weight") or not any(part in name for part in ("attn.qkv", "mlp.", "linear1", "linear2")):
            out[name] = tensor
            continue
        settings = {"scale": "recalculate"} if not conf else {}
        if conf:
            settings = {"per_channel": True, **{k: v for k, v in conf.items() if k.startswith("convrot")}}
        out.update(QuantizedTensor.from_float(tensor.float(), layout, **settings).state_dict(name))
        text = json.dumps({"format": kind, **conf}).encode()
        out[f"{name.removesuffix('weight')}comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return checkpoints.write(target, out)


def test_a_scaled_fp8_file_is_quantised_with_its_loras(flux, tmp_path):
    path = requantised(flux, tmp_path / "fp8.safetensors", "float8_e4m3fn")
    wanted = sample(load_diffusion_model(path), STEPS)
    model = load_diffusion_model(path, "int8", Policy(vram_bytes=0))
    assert COSINE < cosine(sample(model, STEPS), wanted) < 1.0
    assert len(int8_layers(model)) == 10
    lora = forms("lora")
    wanted = sample(with_lora(load_diffusion_model(path), lora, 0.6), STEPS)
    assert COSINE < cosine(sample(with_lora(model, lora, 0.6), STEPS), wanted)


@needs_int8_files
@pytest.mark.parametrize(
    "conf",
    [{}, {"per_channel": True}, {"convrot": True, "convrot_groupsize": 64}],
    ids=["tensorwise", "per channel", "convrot"],
)
def test_an_int8_file_keeps_its_numbers(conf, flux, tmp_path):
    path = requantised(flux, tmp_path / "int8.safetensors", "int8_tensorwise", **conf)
    classic, ours = pair(path, 0.25)
    wanted = run(classic, STEPS)
    assert_same(run(ours, STEPS), wanted)  # as it is
    # Asked for INT8, a CPU multiplies faster than by ComfyUI's way; the numbers of the weights are the file's.
    model = load_diffusion_model(path, "int8")
    assert COSINE < cosine(run(model, STEPS), wanted)
    if not conf.get("convrot"):
        key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
        bundle = model.dynamic.by_key[key]
        ((view, param),) = [
            (view, param) for view, param in zip(bundle.views, bundle.params, strict=True) if param.key == key
        ]
        kept = view.qdata if isinstance(view, Int8Weight) else view._qdata  # a GPU multiplies by ComfyUI's way
        assert torch.equal(kept.cpu(), param.source._qdata)
    lora = forms("lora")
    wanted = run(with_lora(classic, lora, 0.6), STEPS)
    assert COSINE < cosine(run(with_lora(model, lora, 0.6), STEPS), wanted)


# -- LoRAs


@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("mode", ["merge", "side branch", "auto"])
def test_a_lora_is_near_the_originals_and_leaves_no_trace(mode, fraction, flux, tmp_path):
    lora = comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora.safetensors", flux))
    plain = load_diffusion_model(flux)
    wanted = run(with_lora(plain, lora, 0.7), STEPS)
    policy = Policy(vram_bytes=int(fraction * (1 << 30)), int8_lora=mode)
    model = load_diffusion_model(flux, "int8", policy)
    without = run(model, STEPS)
    assert cosine(run(plain, STEPS), wanted) < COSINE  # the LoRA is seen
    patched = with_lora(model, lora, 0.7)
    got = run(patched, STEPS)
    assert cosine(got, wanted) > 0.9999
    made = model.dynamic.ledger.counters.quantised
    assert_same(run(patched, STEPS), got)
    assert model.dynamic.ledger.counters.quantised == made
    said = [words for words in model.dynamic.ledger.decisions if words.startswith("LoRA on INT8")]
    assert len(said) == (mode != "merge")
    ranks = {bundle.final[0].rank for bundle in model.dynamic.bundles if bundle.params[0].quantisation}
    assert ranks == ({4} if mode == "side branch" else {0})
    assert_same(run(model, STEPS), without)


def test_auto_keeps_a_lora_beside_weights_that_it_would_spoil(flux):
    """One huge number in a row leaves the others few steps."""
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    model = load_diffusion_model(flux, "int8")
    rows, columns = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight.shape
    up, down = torch.zeros(rows, 1), torch.zeros(1, columns)
    up[:, 0], down[0, 3] = 3.0, 3.0
    name = "lora_unet_double_blocks_0_img_mlp_0"
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    wanted = run(with_lora(load_diffusion_model(flux), lora, 1.0), STEPS)
    patched = with_lora(model, lora, 1.0)
    errors = {"auto": run(patched, STEPS) - wanted}
    assert any("side branch beside 1 weights" in words for words in model.dynamic.ledger.decisions)
    assert model.dynamic.by_key[key].final[0].rank == 1
    patched.set_policy(Policy(int8_lora="merge"))
    errors["merge"] = run(patched, STEPS) - wanted
    assert errors["auto"].norm() < errors["merge"].norm()


@pytest.mark.parametrize("kind", ["dora", "lokr", "diff"])
def test_patches_that_are_no_low_rank_sum_are_merged(kind, flux):
    plain = load_diffusion_model(flux)
    model = load_diffusion_model(flux, "int8", Policy(int8_lora="side branch"))
    wanted = run(with_lora(plain, forms(kind), 0.5), STEPS)
    assert cosine(run(with_lora(model, forms(kind), 0.5), STEPS), wanted) > COSINE


@pytest.mark.parametrize("mode", ["merge", "side branch", "auto"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "glora", "oft", "diff"])
def test_a_layer_of_another_width_is_logged_and_the_others_are_patched(kind, mode, flux, caplog):
    """As ComfyUI does. The picture is that of the LoRA without that layer."""
    model = load_diffusion_model(flux, "int8", Policy(int8_lora=mode))
    lora = forms(kind, wrong=[LINEAR])
    wanted = run(with_lora(model, {key: t for key, t in lora.items() if not key.startswith(LINEAR)}), STEPS)
    assert not torch.equal(wanted, run(model, STEPS))
    caplog.clear()
    assert_same(run(with_lora(model, lora), STEPS), wanted)
    assert any(f"{LINEAR}.weight" in words for words in caplog.messages)


def test_a_branch_has_the_shape_of_the_weight_or_of_the_part_it_is_for():
    """Where numbers of elements agree by chance too, ComfyUI's arithmetic decides."""
    up, down = torch.zeros(32, 4), torch.zeros(4, 64)
    for shape, offset, fits in [
        ((32, 64), None, True),
        ((64, 32), None, False),
        ((96, 64), (0, 64, 32), True),
        ((96, 64), (0, 65, 32), False),
        ((32, 128), (1, 64, 64), True),
        ((96, 64), (0, 32, 64), False),
    ]:
        assert int8_lora._product_fits(up, down, shape, offset) is fits
    assert not int8_lora._product_fits(up, torch.zeros(5, 64), (32, 64), None)
    assert int8_lora._product_fits(up[:, :, None, None], down[:, :, None, None], (32, 64), None)
    assert not int8_lora._product_fits(torch.zeros(32), down, (32, 64), None)


def test_hooks_are_near_the_originals_and_leave_no_trace(flux):
    plain, model = load_diffusion_model(flux), load_diffusion_model(flux, "int8")
    without = run(model, STEPS)
    assert cosine(hooked(model, hook_lora()), hooked(plain, hook_lora())) > COSINE
    assert_same(run(model, STEPS), without)


# -- what is said, and what is decided


def test_auto_follows_the_measurement(flux, speed):
    speed(0.5)
    slow = load_diffusion_model(flux, "int8_auto")
    assert not int8_layers(slow)
    assert_same(run(slow, 1), run(load_diffusion_model(flux), 1))
    assert any("keep their dtype" in words and "0.50x" in words for words in slow.dynamic.ledger.decisions)
    speed(2.0)
    fast = load_diffusion_model(flux, "int8_auto")
    assert len(int8_layers(fast)) == 10
    assert any("2.00x" in words for words in fast.dynamic.ledger.decisions)


def test_the_node_says_what_was_found(flux, speed, caplog, models_dir):
    speed(0.5)
    name = "int8_node.safetensors"
    shutil.copy(flux, models_dir / "diffusion_models" / name)
    result = SpillwayLoadDiffusionModel.execute(name, "int8")
    assert "NOT faster" in str(result.ui.as_dict()) and "0.50x" in str(result.ui.as_dict())
    run(result.args[0], 1)
    assert "NOT faster" in caplog.text
    assert SpillwayLoadDiffusionModel.execute(name, "default").ui is None


def test_a_classic_clone_says_that_it_is_not_in_int8(flux, caplog):
    """Nodes such as TorchCompileModel ask for one; ComfyUI makes it by loading the file again."""
    model = load_diffusion_model(flux, "int8")
    if "disable_dynamic" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters:
        pytest.skip("this ComfyUI has no such clones")
    classic = model.clone(disable_dynamic=True)
    assert not classic.is_dynamic()
    assert "not in int8." in caplog.text and flux in caplog.text
    assert_same(run(classic, 1), run(load_diffusion_model(flux), 1))


def test_quantising_shows_progress_and_can_be_interrupted(flux, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.values = total, []
            bars.append(self)

        def update_absolute(self, value, total=None, preview=None):
            self.values.append(value)
            if interrupt and value == 3:
                comfy.model_management.interrupt_current_processing()

    interrupt = False
    wanted = run(load_diffusion_model(flux, "int8"), 1)
    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    model = load_diffusion_model(flux, "int8")
    run(model, 1)
    assert bars[0].total == 10 and bars[0].values == list(range(11))
    interrupt = True
    model = load_diffusion_model(flux, "int8")
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, 1)
    interrupt = False
    assert_same(run(model, 1), wanted)


def test_saving_writes_what_the_file_has(flux, tmp_path):
    model = load_diffusion_model(flux, "int8")
    run(model, 1)
    save_model(str(tmp_path / "saved.safetensors"), model)
    saved, source = (comfy.utils.load_torch_file(str(path)) for path in (tmp_path / "saved.safetensors", flux))
    key = "double_blocks.0.img_attn.qkv.weight"
    (found,) = [tensor for name, tensor in saved.items() if name.endswith(key)]
    assert torch.equal(found, source[next(name for name in source if name.endswith(key))])


@LINUX
@pytest.mark.parametrize("depth", [6, pytest.param(14, marks=pytest.mark.slow)])
def test_quantising_needs_no_memory_for_the_model(depth, checkpoint, tmp_path):
    path = checkpoint("flux", hidden=512, depth=depth, depth_single=depth)
    lora = checkpoints.lora(tmp_path / "lora.safetensors", path, rank=16)
    grown = run_with_lora(path, lora, dtype="int8", steps=1, budget=0, pinned=0)["grown"]
    int8_bytes = Path(path).stat().st_size / 2
    assert grown < int8_bytes / 2


# -- files that are wrong


def broken(path, target, change):
    """A copy of an INT8 file with something changed in its tensors."""
    path = requantised(path, target, "int8_tensorwise", per_channel=True)
    tensors = {key: tensor.clone() for key, tensor in comfy.utils.load_torch_file(path).items()}
    change(tensors, next(key for key in tensors if key.endswith("double_blocks.0.img_attn.qkv.weight")))
    return checkpoints.write(str(target) + ".broken.safetensors", tensors)


def conf(**settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


@needs_int8_files
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, k: t.pop(f"{k}_scale"), ["weight_scale' is missing", "int8_tensorwise"]),
        (lambda t, k: t.update({f"{k}_scale": torch.ones(7)}), ["weight_scale", "(7,)", "one for each"]),
        (lambda t, k: t.update({k: t[k].float()}), ["torch.float32", "torch.int8"]),
        (lambda t, k: t.update({f"{k[:-6]}comfy_quant": conf(format="int3")}), ["'int3'", "Known: ", "Update ComfyUI"]),
        (lambda t, k: t.update({f"{k[:-6]}comfy_quant": conf()}), ["None", "Known: "]),
        (lambda t, k: t.update({f"{k[:-6]}comfy_quant": torch.zeros(4, dtype=torch.uint8)}), ["not JSON"]),
    ],
    ids=["no scale", "misshapen scale", "float weight", "unknown format", "no format", "no JSON"],
)
@pytest.mark.parametrize("weight_dtype", ["default", "int8"])
def test_a_malformed_file_is_an_error_that_names_the_layer(change, words, weight_dtype, flux, tmp_path):
    path = broken(flux, tmp_path / "m.safetensors", change)
    with pytest.raises(SourceError) as caught:
        load_diffusion_model(path, weight_dtype)
    for word in [path, "double_blocks.0.img_attn.qkv", *words]:
        assert word in str(caught.value)
