"""The formats of ComfyUI's that weights are brought in: its own bits, at any residency, saved, and with LoRAs."""

import contextlib
import itertools
from types import SimpleNamespace

import comfy.utils
import comfy_kitchen
import pytest
import torch
from comfy.quant_ops import QUANT_ALGOS

from kit.comfyui import checkpoints
from kit.comfyui.loras import with_lora
from kit.comfyui.pairs import FRACTIONS, assert_same, classic_model, run
from kit.comfyui.quantised import reference
from kit.comfyui.saving import read, save
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.quantise.formats import FORMATS, SAVED_FORMATS
from spillway.patcher.comfyui.quantise.making import Making, backend_for, regrouped
from spillway.patcher.comfyui.quantise.weight import KitchenFormat, KitchenWeight
from spillway.patcher.policy import Policy

pytestmark = pytest.mark.usefixtures("output")
STEPS = 2
READ_WITH_DYNAMIC_VRAM = comfy.utils._TYPES.values()
# Of the latents of a small Flux with random weights, after two steps.
COSINES = {"int8_convrot": 0.9995, "mxfp8": 0.998, "fp8_e4m3fn scaled": 0.998, "w4a8": 0.985, "nvfp4": 0.97}


def cosine(a, b):
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def quantised(model):
    return [param for bundle in model.dynamic.bundles for param in bundle.params if param.quantisation is not None]


def random_weight(rows, columns, dtype=torch.float32):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.05).to(dtype)


def assert_same_bytes(got, wanted):
    assert set(got) == set(wanted)
    for key in wanted:
        one, other = got[key], wanted[key]
        assert one.shape == other.shape and one.dtype == other.dtype, key
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (416, 128), (160, 20480)])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_made_in_parts_are_comfyuis_own(name, shape, dtype):
    weight = random_weight(*shape, dtype)
    form = KitchenFormat.of(FORMATS[name], shape[1])
    made = {suffix: piece.empty("cpu") for suffix, piece in form.pieces(shape).items()}
    view = KitchenWeight(form.stored(made, shape, dtype), form)
    view.quantise_(weight)
    assert_same_bytes(made, reference(form, weight).state_dict(""))
    assert view.form.nbytes(shape) == sum(piece.nbytes for piece in made.values())
    # However the rows come: as many at a time as a file's parts have.
    making, edges = Making(form, shape), [0, 40, 41, *range(50, shape[0], 64), shape[0]]
    parts = [(start, weight[start:stop]) for start, stop in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([part for _, part in regrouped(parts, making.edges())]), weight)
    assert [start for start, _ in regrouped(parts, making.edges())] == making.edges()[:-1]


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_behaves_like_one_of_its_dtype(name):
    weight, x = random_weight(96, 128), random_weight(8, 128)
    form = KitchenFormat.of(FORMATS[name], 128)
    template = form.template(weight.shape, torch.float32, rank=4)
    assert template.is_meta and template.rank == 4 and template.shape == weight.shape
    made = {suffix: piece.empty("cpu") for suffix, piece in form.pieces(tuple(weight.shape)).items()}
    view = KitchenWeight(form.stored(made, weight.shape, torch.float32), form)
    view.quantise_(weight)
    numbers = reference(form, weight).dequantize()
    assert torch.equal(view.dequantize(), numbers) and torch.equal(view * 1, numbers)
    assert torch.equal(torch.nn.functional.linear(x, view), torch.nn.functional.linear(x, numbers))
    half = view.to(torch.bfloat16)
    assert isinstance(half, KitchenWeight) and half.dtype == torch.bfloat16
    assert half.stored._qdata.data_ptr() == view.stored._qdata.data_ptr()
    copied = view.clone()
    assert copied.stored._qdata.data_ptr() != view.stored._qdata.data_ptr() and torch.equal(copied * 1, numbers)
    with pytest.raises(RuntimeError, match="would write into a quantised weight"):
        view.add_(1)
    assert name in repr(view)
    down, up = random_weight(4, 128), random_weight(96, 4)
    branched = KitchenWeight(view.stored, form, down, up)
    got, wanted = torch.nn.functional.linear(x, branched), torch.nn.functional.linear(x, numbers + up @ down)
    assert torch.allclose(got, wanted, atol=1e-5) and torch.allclose(branched.dequantize(), numbers + up @ down)


@pytest.mark.parametrize("name", FORMATS)
def test_a_saved_format_is_what_is_multiplied_on_the_fly(name, flux):
    """At any residency. ComfyUI's own loader gives the same latents of the saved file, and so do we."""
    plain = run(load_diffusion_model(flux), STEPS)
    model = load_diffusion_model(flux, name)
    wanted = run(model, STEPS)
    near = cosine(wanted, plain)
    print(f"{name}: {len(quantised(model))} layers, cosine {near:.6f}")
    assert COSINES[name] < near < 1.0 and len(quantised(model)) == 10
    assert any(f"quantised to {name}" in words for words in model.dynamic.ledger.decisions)
    for fraction in FRACTIONS:
        again = load_diffusion_model(flux, name, Policy(vram_bytes=int(fraction * model.dynamic.total_bytes)))
        for _ in range(2):
            assert_same(run(again, STEPS), wanted)
        if again.dynamic.backend.in_place:  # on a device a layer is made again until its pin has come
            assert again.dynamic.ledger.counters.quantised == 10
    saved = save(load_diffusion_model(flux), name)
    tensors = read(saved)[0]
    assert len([key for key in tensors if key.endswith(".comfy_quant")]) == 10
    assert all(tensor.dtype in READ_WITH_DYNAMIC_VRAM for tensor in tensors.values())
    assert_same(run(classic_model(saved), STEPS), wanted)
    assert_same(run(load_diffusion_model(saved, policy=Policy(vram_bytes=0)), STEPS), wanted)


@pytest.mark.parametrize("name", [name for name, known in FORMATS.items() if known.bits < 8])
def test_a_lora_stays_beside_four_bits(name, flux, tmp_path):
    """Unless the policy says otherwise."""
    lora = comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora.safetensors", flux))
    model = load_diffusion_model(flux, name, Policy(vram_bytes=0))
    without = run(model, STEPS)
    patched = with_lora(model, lora, 0.7)
    got = run(patched, STEPS)
    assert {param.final.rank for param in quantised(model)} == {4}
    assert any("of 4 bits" in words and words.startswith(f"LoRA on {name}") for words in model.dynamic.ledger.decisions)
    wanted = run(with_lora(load_diffusion_model(flux), lora, 0.7), STEPS)
    assert cosine(got, wanted) > COSINES[name] > cosine(without, wanted)
    assert_same(run(model, STEPS), without)
    patched.set_policy(Policy(int8_lora="merge"))
    assert cosine(run(patched, STEPS), wanted) > COSINES[name]
    assert {param.final.rank for param in quantised(model)} == {0}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", [name for name, known in FORMATS.items() if known.bits == 8])
def test_a_lora_on_eight_bits_is_merged_where_it_rounds_no_worse(name, kind, flux, wide_forms):
    lora = wide_forms(kind)
    model = load_diffusion_model(flux, name)
    got = run(with_lora(model, lora, 0.6), STEPS)
    assert cosine(got, run(with_lora(load_diffusion_model(flux), lora, 0.6), STEPS)) > COSINES[name]
    saved = save(with_lora(load_diffusion_model(flux), lora, 0.6), name)
    if {param.final.rank for param in quantised(model)} == {0}:
        assert cosine(run(classic_model(saved), STEPS), got) > COSINES[name]


def test_what_this_comfyui_has_not_is_not_offered(flux):
    for known in SAVED_FORMATS.values():
        assert known.algorithm in QUANT_ALGOS
    with pytest.raises(ValueError, match="'int3' is not one of default, "):
        load_diffusion_model(flux, "int3")


def test_four_bits_are_rotated_in_groups_that_kernels_have(checkpoint, w4a8):
    """A card's kernels rotate 256 columns. Narrower layers stay as they are, or the first forward there would fail."""
    model = load_diffusion_model(checkpoint("flux", hidden=128, depth=1, depth_single=1), w4a8)
    forms_ = {param.quantisation.rotation for param in quantised(model)}
    columns = {param.final.shape[1] for param in quantised(model)}
    assert forms_ == {256} and columns == {512}, "of widths of 128, 512 and 640"


def test_mxfp8_is_made_of_fp32_by_torch_on_a_card(monkeypatch):
    """The kernels take 16 bit alone, and a LoRA is added in fp32 before its error is measured."""
    chosen = []
    monkeypatch.setattr(comfy_kitchen, "use_backend", lambda name: chosen.append(name) or contextlib.nullcontext())
    on_a_card = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda:0"))
    for rows, algorithm, wanted in (
        (on_a_card, "mxfp8", ["eager"]),
        (on_a_card, "nvfp4", []),
        (SimpleNamespace(dtype=torch.bfloat16, device=on_a_card.device), "mxfp8", []),
        (random_weight(32, 32), "mxfp8", []),
    ):
        chosen.clear()
        with backend_for(algorithm, rows):
            assert chosen == wanted
