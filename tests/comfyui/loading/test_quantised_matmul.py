"""Quantised matrix products stay quantised wherever ComfyUI would take that path, and leave it only where it does.

Which path an op takes is seen at the matrix product itself: both sides are quantised tensors, or none is. ComfyUI is
told that the device multiplies FP8; without that it dequantises every FP8 weight on a CPU.
"""

import json

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.loras import QKV, forms, with_lora
from kit.comfyui.pairs import SMALL, assert_same, pair, run
from spillway.patcher.comfyui.loading import load as comfy_load

QuantizedTensor = comfy.quant_ops.QuantizedTensor
MATCH = ("attn.qkv", "mlp.0", "mlp.2", "linear1", "linear2")
# (input, weight) of the quantised product: that of INT8 quantises its input itself.
FP8 = (True, True)
FORMATS = {"float8_e4m3fn": FP8, "int8_tensorwise": (False, True)}
STEPS = 2


@pytest.fixture(autouse=True)
def fp8_matmul(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)


@pytest.fixture
def routes(monkeypatch):
    """`routes(model)`: of every matrix product of a run whether its input and weight were quantised, and the result."""
    plain, found, inside = torch.nn.functional.linear, [], []

    def linear(x, weight, bias=None):
        if not inside:  # the quantised product may use a plain one
            found.append((isinstance(x, QuantizedTensor), isinstance(weight, QuantizedTensor)))
        inside.append(None)
        try:
            return plain(x, weight, bias)
        finally:
            inside.pop()

    monkeypatch.setattr(torch.nn.functional, "linear", linear)

    def count(model):
        found.clear()
        result = run(model, steps=STEPS)
        return list(found), result

    return count


@pytest.fixture
def quantised(checkpoint, models_dir):
    """`quantised("int8_tensorwise", **conf)`: a Flux whose large matrices are in that format. conf: by part of a
    layer's name, more settings for its comfy_quant. scale: what its input is divided by before it is quantised.
    """

    def make(kind, conf=None, scale=None):
        if kind not in comfy.quant_ops.QUANT_ALGOS:
            pytest.skip(f"this ComfyUI has no {kind}")
        path = models_dir / "diffusion_models" / f"{kind}-{abs(hash((str(conf), scale)))}.safetensors"
        if path.exists():
            return str(path)
        layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
        out = {}
        for name, tensor in comfy.utils.load_torch_file(checkpoint("flux", **SMALL)).items():
            if not name.endswith(".weight") or not any(part in name for part in MATCH):
                out[name] = tensor
                continue
            out.update(QuantizedTensor.from_float(tensor.float(), layout, scale="recalculate").state_dict(name))
            stem = name.removesuffix("weight")
            settings = {"format": kind}
            for part, more in (conf or {}).items():
                settings.update(more if part in name else {})
            out[f"{stem}comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
            if scale is not None:
                out[f"{stem}input_scale"] = torch.tensor(scale)
        return checkpoints.write(path, out)

    return make


def quantised_layers(model):
    return [m for m in model.model.diffusion_model.modules() if isinstance(getattr(m, "weight", None), QuantizedTensor)]


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_products_are_taken_at_any_residency(kind, fraction, quantised, routes):
    classic, ours = pair(quantised(kind), fraction)
    layers = len(quantised_layers(classic))
    wanted = routes(classic)
    assert layers == 8 and wanted[0].count(FORMATS[kind]) == layers * STEPS < len(wanted[0])
    for _ in range(2):
        got = routes(ours)
        assert got[0] == wanted[0]
        assert_same(got[1], wanted[1])
    assert len(quantised_layers(ours)) == layers


@pytest.mark.parametrize("pinned", [0, 1 << 30])
@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_patched_weight_is_quantised_again(kind, fraction, pinned, quantised, routes):
    """The idle weight has a weight function, for whoever reads it without a loan. It must not count while lent."""
    classic, ours = pair(quantised(kind), fraction)
    ours.set_policy(ours.policy.with_changes(pinned_bytes=pinned))
    plain, lora = routes(ours), forms("lora")
    wanted = routes(with_lora(classic, lora, 0.6))
    patched = with_lora(ours, lora, 0.6)
    layer = ours.model.diffusion_model.double_blocks[0].img_attn.qkv
    for _ in range(2):
        got = routes(patched)
        assert got[0] == wanted[0] == plain[0]
        assert_same(got[1], wanted[1])
        assert len(layer.weight_function) == 1
    assert not torch.equal(got[1], plain[1])
    assert_same(routes(ours)[1], plain[1])
    assert len(layer.weight_function) == 0


# What excludes a quantised product. Each is done to ComfyUI's model and to ours.
def force_cast(model):
    model.force_cast_weights = True
    return model


def weight_function(model):
    model.add_weight_wrapper(f"{QKV}.weight", lambda weight: weight * 0.5)
    return model


def bias_function(model):
    model.add_weight_wrapper(f"{QKV}.bias", lambda bias: bias * 0.5)
    return model


def no_matmul_in_a_layer(model):
    model.model.diffusion_model.double_blocks[0].img_attn.qkv._full_precision_mm = True
    return model


def no_matmul_at_all(model):
    for module in quantised_layers(model):
        module._full_precision_mm = True
    return model


EXCLUDED = [
    (force_cast, 8),
    (weight_function, 1),
    (bias_function, 1),
    (no_matmul_in_a_layer, 1),
    (no_matmul_at_all, 8),
]


@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize(("how", "layers"), EXCLUDED, ids=lambda value: getattr(value, "__name__", None))
def test_what_excludes_a_quantised_product_in_comfyui_excludes_it_here(how, layers, fraction, quantised, routes):
    classic, ours = pair(quantised("float8_e4m3fn"), fraction)
    plain = routes(ours)
    wanted = routes(how(classic.clone()))
    got = routes(how(ours.clone()))
    assert got[0] == wanted[0]
    assert got[0].count(FP8) == plain[0].count(FP8) - layers * STEPS and len(got[0]) == len(plain[0])
    assert_same(got[1], wanted[1])


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_a_layer_that_its_file_excludes_takes_no_quantised_product(fraction, quantised, routes):
    classic, ours = pair(quantised("float8_e4m3fn", {"linear1": {"full_precision_matrix_mult": True}}), fraction)
    wanted, got = routes(classic), routes(ours)
    assert got[0] == wanted[0] and got[0].count(FP8) == 7 * STEPS
    assert_same(got[1], wanted[1])


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_a_quantised_input_is_used_as_it_is(fraction, quantised):
    """It is used as it is, by the quantised product."""
    classic, ours = pair(quantised("float8_e4m3fn"), fraction)
    results = []
    for model in (classic, ours):
        run(model, steps=1)
        layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).to(model.load_device)
        quantised_x = QuantizedTensor.from_float(x, layer.layout_type, scale="recalculate")
        results.append(layer(quantised_x))
        assert not torch.equal(results[-1], torch.nn.functional.linear(x, layer.weight.dequantize().to(x)))
    assert_same(*results)


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_scales_layouts_and_original_dtypes_are_those_of_comfyuis_weight(fraction, quantised, routes):
    """Scales of weights and of inputs, layouts and original dtypes are those of ComfyUI's weight, while lent."""
    classic, ours = pair(quantised("float8_e4m3fn", scale=0.02), fraction)
    wanted, got = routes(classic), routes(ours)
    assert got[0] == wanted[0] and FP8 in got[0]
    assert_same(got[1], wanted[1])
    assert not torch.equal(wanted[1], routes(pair(quantised("float8_e4m3fn"))[0])[1])
    for theirs, mine in zip(quantised_layers(classic), quantised_layers(ours), strict=True):
        with ours.dynamic.caster.borrow(mine.spillway_bundle):
            assert type(mine.weight._params) is type(theirs.weight._params)
            assert vars(mine.weight._params).keys() == vars(theirs.weight._params).keys()
            for name, value in vars(theirs.weight._params).items():
                other = getattr(mine.weight._params, name)
                assert torch.equal(other, value) if torch.is_tensor(value) else other == value
            assert mine.weight._layout_cls == theirs.weight._layout_cls
            assert torch.equal(mine.input_scale, theirs.input_scale)


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_plain_fp8_weights_take_the_fast_product_with_and_without_a_lora(fraction, checkpoint, routes):
    """The loader's `fp8_e4m3fn_fast`: no scales, and the same path with and without a LoRA."""
    path = checkpoint("flux", **SMALL)
    options = dict(comfy_load.WEIGHT_DTYPES["fp8_e4m3fn_fast"])
    classic, ours = pair(path, fraction, "fp8_e4m3fn_fast")
    assert options["fp8_optimizations"]
    for model, other in ((classic, ours), (with_lora(classic, forms("lora")), with_lora(ours, forms("lora")))):
        wanted, got = routes(model), routes(other)
        assert got[0] == wanted[0] and got[0].count(FP8) > 8 * STEPS
        assert_same(got[1], wanted[1])
