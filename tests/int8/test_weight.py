"""INT8 weights and their products: the error, and what no kernel takes."""

import pytest
import torch

from kit.int8 import normal, relative, weight_of
from spillway.ops.gather import gathered_bytes, interpret_gathered_like
from spillway.ops.gguf.weight import Form, GgufWeight
from spillway.ops.int8 import linear as kernels
from spillway.ops.int8.linear import dequantise_rows, group_count, int8_linear, quantise_rows
from spillway.ops.int8.weight import Int8Weight

ERROR = 0.012  # of a product of normal numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [256, 1024, 3072, 12288])
def test_error_on_normal_numbers(columns, dtype):
    x, weight, bias = normal(256, columns, dtype=dtype), normal(256, columns, seed=1, dtype=dtype), normal(256, seed=2)
    made = weight_of(weight, group_count(columns, "cpu"))
    wanted = x.double() @ weight.double().t()
    error = relative(torch.nn.functional.linear(x, made).float(), wanted)
    assert 0.005 < error < ERROR  # it is INT8, and no worse
    with_bias = torch.nn.functional.linear(x, made, bias.to(dtype)).double()
    assert relative(with_bias, wanted + bias.to(dtype).double()) < ERROR


def test_a_row_has_one_scale_where_other_kernels_multiply():
    assert group_count(12288, "cuda") == 1
    assert group_count(12288, "cpu") == 6
    assert group_count(4099, "cpu") == 1  # a prime number cannot be divided


def test_a_cast_weight_stays_in_int8_in_inference_mode():
    """There torch hands `to` over as it is."""
    with torch.inference_mode():
        cast = weight_of(normal(64, 256)).to(torch.bfloat16)
        assert isinstance(cast, Int8Weight) and cast.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 64), (3, 17), (2, 5, 64), (0, 64), (1, 1, 1, 40), (64,)])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_any_shape(shape, rows):
    x, weight = normal(*shape), normal(rows, shape[-1], seed=1)
    made = weight_of(weight)
    result = torch.nn.functional.linear(x, made)
    wanted = torch.nn.functional.linear(x.double(), made.dequantize().double())
    assert result.shape == wanted.shape and result.dtype == x.dtype
    bound = 0.02 * x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    assert ((result - wanted).abs() <= bound).all()


def test_much_is_multiplied_in_parts(monkeypatch):
    x, made = normal(300, 64), weight_of(normal(40, 64, seed=1))
    whole = torch.nn.functional.linear(x, made)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 32)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    assert torch.equal(torch.nn.functional.linear(x, made), whole)


def test_without_a_kernel_the_weight_is_dequantised(monkeypatch):
    x, bias = normal(8, 64), normal(40, seed=3)
    made = weight_of(normal(40, 64, seed=1))
    monkeypatch.setattr(kernels, "has_int_mm", lambda *_: False)
    wanted = torch.nn.functional.linear(x, made.dequantize(), bias)
    assert torch.equal(torch.nn.functional.linear(x, made, bias), wanted)


def test_a_kernel_of_a_library_is_used_for_one_scale_a_row(monkeypatch):
    calls = []

    def kernel(x, qdata, scale, bias):
        calls.append(qdata.shape)
        return torch.nn.functional.linear(x, dequantise_rows(qdata, scale, x.dtype), bias)

    monkeypatch.setitem(kernels._kernels, "cpu", kernel)
    x = normal(2, 3, 64)
    assert torch.nn.functional.linear(x, weight_of(normal(40, 64))).shape == (2, 3, 40)
    assert calls == [(40, 64)]
    torch.nn.functional.linear(x, weight_of(normal(40, 64), groups=2))
    assert len(calls) == 1


def test_zeros_and_what_is_no_number():
    weight = normal(16, 64)
    weight[3] = 0
    made = weight_of(weight)
    x = normal(4, 64)
    x[1] = 0
    x[2, 5] = float("nan")
    x[3, 5] = float("inf")
    result = torch.nn.functional.linear(x, made)
    assert not result[0, 3] and not result[1].any()
    assert torch.isfinite(result[:2]).all()
    assert not torch.isfinite(result[2]).any()
    assert not torch.isfinite(result[3][torch.arange(16) != 3]).any()


def test_other_operations_get_the_dequantised_weight():
    tensor = normal(16, 64)
    made = weight_of(tensor)
    assert torch.equal(made + 1, made.dequantize() + 1)
    assert torch.equal(made.t() @ made, made.dequantize().t() @ made.dequantize())
    assert torch.equal(made[2:5], made.dequantize()[2:5])
    with pytest.raises(RuntimeError, match="INT8 weight"):
        made.add_(1)
    assert "Int8Weight" in repr(made)


def test_another_dtype_keeps_the_bits():
    made = weight_of(normal(16, 64))
    half = made.to(torch.bfloat16)
    assert isinstance(half, Int8Weight) and half.dtype == torch.bfloat16
    assert torch.equal(half.qdata, made.qdata)
    assert torch.nn.functional.linear(normal(2, 64, dtype=torch.bfloat16), half).dtype == torch.bfloat16


def test_a_branch_is_added_exactly():
    weight, down, up = normal(48, 64), normal(4, 64, seed=5), normal(48, 4, seed=6)
    template = Int8Weight.template(weight.shape, torch.float32, 1, rank=4)
    (view,) = interpret_gathered_like([template], torch.zeros(gathered_bytes([template]), dtype=torch.uint8))
    view.quantise_(weight)
    view.down.copy_(down)
    view.up.copy_(up)
    assert view.rank == 4
    plainly = weight_of(weight)
    torch.testing.assert_close(view.dequantize(), plainly.dequantize() + up @ down)
    x = normal(5, 64, seed=7)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, view), torch.nn.functional.linear(x, plainly) + x @ down.t() @ up.t()
    )


def test_a_branch_beside_a_model_in_fp8_is_in_bf16():
    """Of what a model in fp8 computes with, fp8 would round a LoRA's matrices, and small ones to nothing."""
    blocks = GgufWeight(torch.zeros(2, 34, dtype=torch.uint8), Form("Q8_0", (2, 32), torch.float8_e4m3fn))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.float32):
        shown = blocks.form._replace(dtype=dtype)
        templates = Int8Weight.template((2, 32), dtype, rank=4), GgufWeight(blocks.blocks, shown).template(4)
        for template in templates:
            kept = torch.bfloat16 if dtype.itemsize == 1 else dtype
            assert template.dtype == dtype and template.down.dtype == template.up.dtype == kept
            assert template.down.shape == (4, 32) and template.up.shape == (2, 4)


def test_fp8_and_int8_sources():
    tensor = normal(16, 64)
    small = tensor.to(torch.float8_e4m3fn)
    assert torch.equal(weight_of(small).qdata, weight_of(small.float()).qdata)
    made = weight_of(tensor)
    again = weight_of(made)  # has one scale a row: taken as it is
    assert torch.equal(again.qdata, made.qdata) and torch.equal(again.scale, made.scale)


def test_quantising_by_rows_and_groups():
    tensor = normal(8, 64)
    for groups in (1, 2, 4):
        qdata, scale = quantise_rows(tensor, groups)
        assert qdata.dtype == torch.int8 and scale.shape == (8, groups)
        restored = dequantise_rows(qdata, scale, torch.float32)
        step = scale.repeat_interleave(64 // groups, 1)
        assert ((restored - tensor).abs() <= 0.5001 * step).all()
        assert relative(int8_linear(torch.eye(64), qdata, scale).t(), restored.double()) < 0.01
