"""INT8 Lazy Torch Compile on models in ComfyUI's formats of 8 and 4 bits, quantised as they are brought, or files."""

import comfy.utils
import pytest
import torch._dynamo
import torch._dynamo.utils

from kit.comfyui.compiling import compiled, said, with_budget, with_strength
from kit.comfyui.pairs import SMALL, assert_same, run
from kit.comfyui.saving import save
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
    check(checkpoint("flux", **SMALL), name, lora_path, FORMATS[name].bits < 8)


@pytest.mark.parametrize("name", each("w4a8"))
def test_a_file_in_a_format_is_compiled_once_and_once_more_for_a_branch(name, checkpoint, lora_path):
    path = save(load_diffusion_model(checkpoint("flux", **SMALL)), name)
    check(path, "default", lora_path, FORMATS[name].bits < 8)


def check(path, weight_dtype, lora_path, branches):
    """The latents are those of the model that is not compiled, at any budget, size and strength."""
    lora = comfy.utils.load_torch_file(lora_path)
    plain, model = load_diffusion_model(path, weight_dtype), compiled(load_diffusion_model(path, weight_dtype))
    for size in ({}, {"batch": 2}):
        run(model, **size)
    counts = [engine.compile_count()]
    for fraction, strength, size in RUNS:
        got = run(with_strength(with_budget(model, fraction), lora, strength), **size)
        assert_same(got, run(with_strength(plain, lora, strength), **size))
        counts.append(engine.compile_count())
    print(counts)
    assert not torch._dynamo.utils.counters["graph_break"], dict(torch._dynamo.utils.counters["graph_break"])
    assert not said(model, "uncompiled"), said(model, "uncompiled")
    assert 0 < counts[0] <= 4 and (branches or set(counts) == {counts[0]})
    assert counts[-1] <= counts[0] * (2 if branches else 1)
