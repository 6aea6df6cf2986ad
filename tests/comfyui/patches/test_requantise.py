"""A weight that is quantised again piece by piece has the bits of ComfyUI's functions. Formats not known go there."""

import comfy.float
import comfy.quant_ops
import pytest
import torch

from spillway.ops.gather import inner_tensors
from spillway.patcher.comfyui.patches import requantise
from spillway.patcher.comfyui.patches.requantise import requantiser

LAYOUTS = ["TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout", "TensorWiseINT8Layout"]
# ComfyUI 0.22 quantises in another way, and is asked itself.
pytestmark = pytest.mark.skipif(
    not hasattr(comfy.float, "_ck_stochastic_rounding_fp8"), reason="a ComfyUI before comfy-kitchen's rounding"
)
SHAPES = [(1, 1), (7, 33), (300, 1000), (1024, 1025), (3, 300_001)]


def quantised(value, layout, **options):
    return comfy.quant_ops.QuantizedTensor.from_float(value, layout, scale="recalculate", **options)


def emptied(weight):
    """A copy of a weight whose memory holds other numbers."""
    copy = weight.clone()
    for part in inner_tensors(copy):
        part.view(torch.uint8).fill_(0x55) if part.ndim else part.fill_(9.0)
    return copy


def numbers(shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(autouse=True)
def compared_anew():
    requantise.is_comfyuis.cache_clear()
    yield
    requantise.is_comfyuis.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_this_comfyui_computes_as_is_known(layout):
    assert requantise.is_comfyuis(layout)


VALUES = {
    "usual": lambda shape: numbers(shape, 2),
    "small": lambda shape: numbers(shape, 2, 1e-6),
    "large": lambda shape: numbers(shape, 2, 3e4),
    "one outlier": lambda shape: numbers(shape, 2).flatten().index_fill(0, torch.tensor([0]), 900.0).view(shape),
    "negative": lambda shape: -numbers(shape, 2).abs(),
    "zeros": torch.zeros,
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_are_comfyuis(layout, shape, values):
    like, value = quantised(numbers(shape), layout), VALUES[values](shape)
    wanted = like.requantize_from_float(value.clone(), scale="recalculate", stochastic_rounding=1234, inplace_ops=True)
    got = emptied(like)
    found = requantiser(got, like)
    assert torch.equal(found.dequantise(), like.dequantize())
    found.write(value.clone(), 1234)
    for one, other in zip(inner_tensors(got), inner_tensors(wanted), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        # A weight of zeros has no scale, and becomes NaN: of either sign.
        there = [~part.float().isnan().reshape(-1) for part in (one, other)]
        bits = [part.reshape(-1, 1).view(torch.uint8)[here] for part, here in zip((one, other), there, strict=True)]
        assert torch.equal(*there) and torch.equal(*bits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_half_is_rounded_by_every_chance_as_comfyui_does(dtype):
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    table = requantise._roundings(dtype)
    for chance in range(256):
        made = comfy.float._ck_stochastic_rounding_fp8(
            halves.clone(), torch.full((1 << 16,), chance, dtype=torch.uint8), dtype
        )
        got = torch.where(chance < table >> 16, table, table >> 8).to(torch.uint8).view(dtype)
        same = (got.view(torch.uint8) == made.view(torch.uint8)) | (got.float().isnan() & made.float().isnan())
        assert same.all(), chance


def test_other_formats_are_left_to_comfyui():
    value = numbers((64, 256))
    rows = quantised(value, "TensorWiseINT8Layout", per_channel=True)
    rotated = quantised(value, "TensorWiseINT8Layout", per_channel=True, convrot=True)
    four = quantised(value, "TensorCoreNVFP4Layout")
    assert [requantiser(weight, weight) for weight in (rows, rotated, four, value)] == [None] * 4
    plain, other = quantised(value, LAYOUTS[0]), quantised(value, LAYOUTS[2])
    assert requantiser(other, plain) is None and requantiser(plain, value) is None


def test_a_comfyui_that_rounds_in_another_way_is_asked(monkeypatch):
    like, plain = quantised(numbers((8, 8)), LAYOUTS[0]), comfy.float.stochastic_rounding
    monkeypatch.setattr(
        comfy.float, "stochastic_rounding", lambda value, *args, **more: plain(value / 2, *args, **more)
    )
    assert requantiser(like, like) is None
