"""INT8 Lazy Torch Compile on models in ComfyUI's formats of 8 and 4 bits, quantised as they are brought, or files."""

import sys

import comfy.utils
import pytest
import torch._dynamo
import torch._dynamo.utils

from kit.comfyui.compiling import compiled, said, with_budget, with_strength
from kit.comfyui.pairs import SMALL, assert_same, run
from kit.comfyui.saving import save
from kit.device import is_fake
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.quantise.formats import FORMATS

pytestmark = pytest.mark.usefixtures("output")
# Share of the weights that is resident, strength of the LoRA, size.
RUNS = ((0.25, 0.7, {"width": 48}), (0.5, 0.4, {"batch": 3}), (0.0, 0.0, {}), (1.0, 0.6, {}))


def each(quick):
    """The formats, of which all but one are slow."""
    return [pytest.param(name, marks=[] if name == quick else pytest.mark.slow) for name in FORMATS]


@pytest.mark.parametrize("name", each("nvfp4"))
def test_a_model_in_a_format_is_compiled_once_and_once_more_for_a_branch(name, checkpoint, lora_path):
    check(checkpoint("flux", **SMALL), name, name, lora_path)


@pytest.mark.parametrize("name", each("w4a8"))
def test_a_file_in_a_format_is_compiled_once_and_once_more_for_a_branch(name, checkpoint):
    if is_fake() and FORMATS[name].algorithm == "float8_e4m3fn":
        pytest.skip("the fake device has no FP8 product. comfy-kitchen logs that and computes otherwise, in no trace")
    path = checkpoint("flux", **{**SMALL, "hidden": 256})  # or no layer has columns that can be rotated
    check(save(load_diffusion_model(path), name), "default", name, checkpoint("lora", base=path))


def check(path, weight_dtype, name, lora_path):
    """The latents are those of the model that is not compiled, at any budget, size and strength.

    What comfy-kitchen keeps is made anew by the first product: a trace must not leave something there that is no
    numbers.
    """
    getattr(sys.modules.get("comfy_kitchen.tensor.int8_utils"), "_HADAMARD_CACHE", {}).clear()
    lora = comfy.utils.load_torch_file(lora_path)
    plain, model = load_diffusion_model(path, weight_dtype), compiled(load_diffusion_model(path, weight_dtype))
    for size in ({}, {"batch": 2}):
        run(model, **size)
    counts = [engine.compile_count()]
    for fraction, strength, size in RUNS:
        got = run(with_strength(with_budget(model, fraction), lora, strength), **size)
        assert_same(got, run(with_strength(plain, lora, strength), **size))
        counts.append(engine.compile_count())
    assert not torch._dynamo.utils.counters["graph_break"] and not said(model, "uncompiled")
    first, last = counts[0], counts[-1]
    assert 0 < first <= 4 and (set(counts) == {first} if FORMATS[name].bits == 8 else first < last <= 8)
