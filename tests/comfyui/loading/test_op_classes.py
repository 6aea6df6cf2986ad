"""The dynamic op classes: every layer kind of ComfyUI, and its quantised layers, equal to ComfyUI's bit for bit."""

import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import EACH_FRACTION, SMALL, assert_same, pair, run
from spillway.ops.lending.layer import DynamicLayer
from spillway.patcher.comfyui.loading.op_classes import operations
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

pytestmark = pytest.mark.usefixtures("weights_in_layers")

LAYERS = {
    "Linear": ((24, 40), (3, 24)),
    "Conv1d": ((6, 10, 3), (2, 6, 16)),
    "Conv2d": ((6, 10, 3), (2, 6, 8, 8)),
    "Conv3d": ((6, 10, 3), (1, 6, 5, 6, 6)),
    "ConvTranspose1d": ((6, 10, 3), (2, 6, 16)),
    "ConvTranspose2d": ((6, 10, 3), (2, 6, 8, 8)),
    "GroupNorm": ((2, 8), (2, 8, 5)),
    "LayerNorm": ((16,), (3, 16)),
    "RMSNorm": ((16,), (3, 16)),
    "BatchNorm2d": ((8,), (2, 8, 4, 4)),
    "Embedding": ((50, 12), (7,)),
}


def filled(module, dtype):
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + (0.5 if "var" in name else 0))
    return module.requires_grad_(False).eval()


def test_every_layer_kind_is_dynamic():
    """A layer kind that a later ComfyUI adds is dynamic too."""
    ours = operations()
    kinds = {name for name, kind in vars(comfy.ops.manual_cast).items() if isinstance(kind, type)}
    assert kinds >= {"Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm", "RMSNorm", "Embedding"}
    for name in kinds:
        assert issubclass(getattr(ours, name), DynamicLayer) and getattr(ours, name).__name__ == name
        assert issubclass(getattr(ours, name), getattr(comfy.ops.manual_cast, name))
    assert isinstance(ours.conv_nd(2, 3, 4, 3), DynamicLayer)
    assert operations() is ours


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_the_bits_of_comfyuis_layer(kind, weight_dtype, input_dtype):
    """Also where the input has another dtype than the weights, and in a module whose weights are another's."""
    if not hasattr(comfy.ops.manual_cast, kind):
        pytest.skip(f"this ComfyUI has no {kind}")
    arguments, shape = LAYERS[kind]
    extra = {} if kind != "BatchNorm2d" else {"affine": True}
    plain = filled(getattr(comfy.ops.manual_cast, kind)(*arguments, **extra), weight_dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(input_dtype)
    call = {}
    if kind == "Embedding":
        x = torch.arange(shape[0]) * 5
        call = {"out_dtype": input_dtype}
    wanted = plain(x, **call)
    assert wanted.dtype == input_dtype
    for budget in (1 << 30, 0):
        module = filled(getattr(operations(), kind)(*arguments, **extra), weight_dtype)
        assert torch.equal(module(x, **call), wanted)  # a plain layer until an engine takes it
        dynamic = DynamicModel(module, policy=Policy(vram_bytes=budget))
        for _ in range(2):
            assert_same(dynamic(x, **call), wanted)
        assert (dynamic.resident_bytes > 0) == bool(budget)
        dynamic.close()
        assert torch.equal(module(x, **call), wanted)


def test_a_layer_without_weights_gives_the_bits_of_comfyuis_layer():
    for kind, arguments in (("LayerNorm", {"elementwise_affine": False}), ("Linear", {"bias": False})):
        plain = getattr(comfy.ops.manual_cast, kind)(
            8, **arguments, **({"out_features": 4} if kind == "Linear" else {})
        )
        ours = getattr(operations(), kind)(8, **arguments, **({"out_features": 4} if kind == "Linear" else {}))
        for module in (plain, ours):
            filled(module, torch.float16)
        x = torch.ones(2, 8)
        assert_same(DynamicModel(ours, policy=Policy(vram_bytes=0))(x), plain(x))


# --- quantised files --------------------------------------------------------------------------------------------------

QUANTISED = ("float8_e4m3fn", "int8_tensorwise", "scaled_fp8")


@pytest.mark.parametrize("fraction", EACH_FRACTION)
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_file_gives_comfyuis_latents_at_any_residency(kind, fraction, quantised_file, checkpoint):
    classic, ours = pair(quantised_file(kind), fraction)
    wanted = run(classic)
    assert wanted.isfinite().all() and not torch.equal(
        wanted, run(comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL)))
    )
    for _ in range(2):
        assert_same(run(ours), wanted)
    weight = ours.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    assert isinstance(weight, comfy.quant_ops.QuantizedTensor)
    assert ours.dynamic.peak_resident_bytes <= fraction * classic.model_size()


@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_lora_on_a_quantised_file_gives_comfyuis_latents(kind, fraction, quantised_file):
    """Dequantised, patched, quantised again to the same bits; and the original afterwards."""
    classic, ours = pair(quantised_file(kind), fraction)
    plain = run(classic)
    lora = forms("lora")
    wanted = run(with_lora(classic, lora, 0.6))
    assert not torch.equal(plain, wanted)
    assert_same(run(with_lora(ours, lora, 0.6)), wanted)
    assert_same(run(ours), plain)


def test_comfyui_says_which_quantisation_it_does_not_know(quantised_file, models_dir):
    """ComfyUI says which format it does not know."""
    from spillway.patcher.comfyui.loading.load import load_diffusion_model

    tensors = comfy.utils.load_torch_file(quantised_file("float8_e4m3fn"))
    for name in [name for name in tensors if name.endswith("comfy_quant")]:
        tensors[name] = torch.tensor(list(b'{"format": "int3_someday"}'), dtype=torch.uint8)
    path = checkpoints.write(models_dir / "diffusion_models" / "someday.safetensors", tensors)
    with pytest.raises(Exception, match="int3_someday"):
        load_diffusion_model(path)
