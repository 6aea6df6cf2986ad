"""What the check of a device found counts in ComfyUI's models: their quantised layers too."""

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import folder_paths
import pytest
import torch

from kit.comfyui.pairs import SMALL, assert_same, pair, run
from spillway.ops.device.backend import backend_for
from spillway.ops.int8 import linear
from spillway.patcher.comfyui import first_use
from spillway.patcher.comfyui.kitchen import register_kitchen
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.first_use import check
from spillway.patcher.first_use.verdict import COPIES, FP8, INSTEAD, INT8, Verdict

QuantizedTensor = comfy.quant_ops.QuantizedTensor
FORMATS = {"float8_e4m3fn": FP8, "int8_tensorwise": INT8}


def kind_of_backend():
    return type(backend_for(comfy.model_management.get_torch_device()))


@pytest.fixture
def wrong(monkeypatch):
    """``wrong(INT8)``: ComfyUI's device is one on which only that has failed the check; without a name, none has."""

    def on_this_device(failed=None):
        register_kitchen()  # INT8 is checked with its kernel
        labels = {name: name for name in INSTEAD}
        labels[INT8] = f"{INT8} by {linear.kernel_name(comfy.model_management.get_torch_device().type)}"
        found = {label: "its products are wrong" if name == failed else None for name, label in labels.items()}
        monkeypatch.setattr(kind_of_backend(), "identity", lambda self: "a device")
        monkeypatch.setattr(check, "_known", {"a device": found})

    monkeypatch.setattr(linear, "_distrusted", set())
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    return on_this_device


@pytest.fixture
def quantised_products(monkeypatch):
    """How many products were computed without dequantising a weight, as the first of a list."""
    count = [0]
    plain, int8 = torch.nn.functional.linear, comfy.quant_ops.ck.int8_linear

    def linear(x, weight, bias=None):
        count[0] += isinstance(weight, QuantizedTensor)
        return plain(x, weight, bias)

    def int8_linear(*args, **named):
        count[0] += 1
        return int8(*args, **named)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(comfy.quant_ops.ck, "int8_linear", int8_linear)
    return count


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_quantised_layers_are_dequantised_where_their_products_are_wrong(
    quantised_file, wrong, quantised_products, kind, fraction
):
    wrong()
    classic, ours = pair(quantised_file(kind), fraction)
    classic.model.diffusion_model.apply(dequantise)
    wanted = run(classic)
    assert quantised_products[0] == 0
    run(ours)
    assert quantised_products[0], "such a file multiplies without quantised products here: this tests nothing"
    quantised_products[0] = 0
    wrong(FORMATS[kind])
    ours = pair(quantised_file(kind), fraction)[1]
    assert_same(run(ours), wanted)
    assert quantised_products[0] == 0
    assert any(INSTEAD[FORMATS[kind]] in text for text in ours.ledger.decisions)
    wrong(INT8 if kind != "int8_tensorwise" else FP8)  # the other alone changes nothing
    run(pair(quantised_file(kind), fraction)[1])
    assert quantised_products[0]


def dequantise(module):
    weight = getattr(module, "weight", None)
    if isinstance(weight, QuantizedTensor):
        there = weight.to(comfy.model_management.get_torch_device())
        module.weight = torch.nn.Parameter(there.dequantize().to(weight.device), requires_grad=False)
        module.layout_type = None


def test_a_weight_in_int8_is_dequantised_where_products_are_wrong(flux, wrong, monkeypatch):
    calls = []
    right = linear.int8_linear_by_kernel
    monkeypatch.setattr(linear, "int8_linear_by_kernel", lambda *a: calls.append(1) or right(*a))
    wrong()
    run(load_diffusion_model(flux, "int8"))
    assert calls
    calls.clear()
    wrong(INT8)
    run(load_diffusion_model(flux, "int8"))
    assert not calls


def test_the_layers_are_as_they_were_when_the_model_is_closed(quantised_file, wrong):
    wrong(FP8)
    model = load_diffusion_model(quantised_file("float8_e4m3fn"))

    def functions():
        return [list(getattr(module, "weight_function", ())) for module in model.model.modules()]

    before = functions()
    run(model)
    assert functions() != before
    model.state.close()
    assert functions() == before


@pytest.mark.parametrize(("failed", "expected"), [({INT8: "x"}, False), ({FP8: "x"}, True), ({COPIES: "x"}, True)])
def test_fp8_ops_of_comfyui_multiply_wrongly_where_fp8_does(failed, expected):
    assert first_use.multiplies_wrongly(comfy.ops.fp8_ops.Linear(16, 16), Verdict(failed=failed)) == expected
    assert not first_use.multiplies_wrongly(comfy.ops.manual_cast.Linear(16, 16), Verdict(failed=failed))


def test_the_result_is_kept_in_the_user_folder(checkpoint, monkeypatch):
    assert first_use.record_file().is_relative_to(folder_paths.get_user_directory())
    asked = []
    monkeypatch.setattr(kind_of_backend(), "identity", lambda self: "the CPU, taken for a device")
    monkeypatch.setattr(check, "_known", {})
    monkeypatch.setattr(check, "_checks", lambda *_: {"copies": lambda: asked.append(1)})
    theirs, ours = pair(checkpoint("flux", **SMALL))
    assert_same(run(ours), run(theirs))
    assert asked == [1] and "the CPU, taken for a device" in first_use.record_file().read_text()
    first_use.record_file().unlink()
