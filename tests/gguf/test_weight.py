"""A weight in blocks: its numbers, its branch, its memory."""

import pytest
import torch

from kit.gguf_files import random_blocks
from kit.live_memory import LiveMemory
from spillway.ops.gather import copy_into, gathered_bytes, interpret_gathered_like
from spillway.ops.gguf import weight as weight_module
from spillway.ops.gguf.dequantise import IN_TORCH, PLAIN
from spillway.ops.gguf.weight import Form, GgufWeight
from spillway.ops.ram import scratch

SIZES = {"F32": 4, "F16": 2, "BF16": 2}
KINDS = ("Q4_0", "Q5_K", "Q8_0", "IQ4_XS")


def made(kind="Q4_K", rows=48, columns=512, dtype=torch.bfloat16):
    """Return a weight, and the numbers that it stands for."""
    blocks = random_blocks(kind, rows * columns)
    return GgufWeight(blocks, Form(kind, (rows, columns), dtype)), IN_TORCH[kind](blocks, torch.float32).view(
        rows, columns
    ).to(dtype)


@pytest.mark.parametrize("inference", [False, True])
def test_a_cast_weight_keeps_its_branch_beside_it(inference):
    """In inference mode torch hands `to` over as it is, and every model of ComfyUI's runs in it."""
    weight, _ = made()
    branched = GgufWeight(weight.blocks, weight.form, torch.ones(4, 512), torch.ones(48, 4))
    with torch.inference_mode(inference):
        for cast in (branched.to(torch.float32), branched.to(dtype=torch.float16), branched.float()):
            assert isinstance(cast, GgufWeight) and cast.rank == 4
        assert branched.to(torch.bfloat16) is branched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part_bytes", [1 << 24, 4096, 1])
def test_numbers_are_rounded_once(kind, part_bytes, monkeypatch):
    """However much of the weight is made at a time."""
    monkeypatch.setattr(weight_module, "PART_BYTES", part_bytes)
    weight, numbers = made(kind)
    assert weight.shape == numbers.shape and weight.dtype == numbers.dtype and weight.device == numbers.device
    assert torch.equal(weight.dequantize(), numbers)
    cast = weight.to(torch.float32)
    assert isinstance(cast, GgufWeight) and cast.dtype == torch.float32
    assert torch.equal(cast.dequantize(), numbers.float()) and torch.equal(
        cast.to(torch.bfloat16).dequantize(), numbers
    )
    assert type(weight.to(torch.float64)) is torch.Tensor
    assert (
        torch.equal(weight + 0, numbers) and torch.equal(weight[3], numbers[3]) and torch.equal(weight.t(), numbers.t())
    )


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_numbers(x_dtype):
    weight, numbers = made()
    x, bias = torch.randn(2, 5, 512).to(x_dtype), torch.randn(48).to(x_dtype)
    wanted = torch.nn.functional.linear(x, numbers.to(x_dtype), bias)
    assert torch.equal(torch.nn.functional.linear(x, weight, bias), wanted)
    assert torch.equal(torch.nn.functional.linear(x, weight=weight, bias=bias), wanted)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    assert torch.equal(torch.nn.functional.linear(x, parameter, bias), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (3, 512), (2, 3, 512), (0, 512)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_branch_is_added_beside(dtype, shape, with_bias):
    """As near to the exact sum as one rounding of the whole."""
    weight, numbers = made(dtype=dtype)
    down, up = (torch.randn(4, 512) * 0.1).to(dtype), (torch.randn(48, 4) * 0.1).to(dtype)
    branched = GgufWeight(weight.blocks, weight.form, down, up)
    x, bias = torch.randn(shape).to(dtype), torch.randn(48).to(dtype) if with_bias else None
    exact = numbers.double() + up.double() @ down.double()
    wanted = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
    got = torch.nn.functional.linear(x, branched, bias)
    assert got.shape == wanted.shape and got.dtype == dtype
    # What the branch narrows x to is rounded, and so are the branch with the bias and the whole. Sums are in fp32.
    error = (32 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps * (wanted.abs() + 4)
    assert bool(((got.double() - wanted).abs() <= error).all())
    assert torch.allclose(
        branched.dequantize().double(), exact, atol=torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps
    )
    assert branched.rank == 4


@pytest.mark.parametrize("rank", [0, 4])
def test_it_travels_as_its_parts(rank):
    weight, _ = made()
    template = weight.template(rank)
    assert template.is_meta and template.rank == rank
    branch = [torch.ones_like(part, device="cpu") for part in (template.down, template.up)] if rank else []
    source = GgufWeight(weight.blocks, weight.form, *branch)
    buffer = torch.zeros(gathered_bytes([template]), dtype=torch.uint8)
    (view,) = interpret_gathered_like([template], buffer)
    copy_into(view, source)
    assert torch.equal(view.dequantize(), source.dequantize()) and view.form == weight.form


@pytest.mark.parametrize("indices", [[[0, 47, 3], [3, 3, 1]], []])
def test_a_table_reads_the_rows_that_are_asked_for(indices, monkeypatch):
    weight, numbers = made()
    wanted = torch.tensor(indices, dtype=torch.long)
    read = []
    original = GgufWeight._numbers
    noted = lambda self, blocks, dtype: read.append(len(blocks)) or original(self, blocks, dtype)  # noqa: E731
    monkeypatch.setattr(GgufWeight, "_numbers", noted)
    assert torch.equal(torch.nn.functional.embedding(wanted, weight), numbers[wanted])
    assert sum(read) == 2 * wanted.numel()  # blocks of 256, rows of 512


def test_a_write_is_refused():
    weight, _ = made()
    for write in (lambda: weight.add_(1), lambda: weight.copy_(torch.ones(48, 512))):
        with pytest.raises(RuntimeError, match="would write into a GGUF weight"):
            write()


def test_a_copy_keeps_the_blocks():
    weight, numbers = made()
    for copied in (weight.clone(), weight.to("cpu", copy=True), weight.detach()):
        assert type(copied) is GgufWeight and torch.equal(copied.dequantize(), numbers)
    assert weight.clone().blocks.data_ptr() != weight.blocks.data_ptr()


@pytest.mark.parametrize("kind", [*IN_TORCH, *PLAIN])
@pytest.mark.parametrize("part_bytes", [1 << 24, 1 << 18])
def test_the_plan_counts_what_making_numbers_takes(kind, part_bytes, monkeypatch):
    """However a weight gets into its op, and whatever order its rows have."""
    assert weight_module.PART_BYTES_ON_CPU < weight_module.PART_BYTES  # which the plan counts for every device
    for name in ("PART_BYTES", "PART_BYTES_ON_CPU"):
        monkeypatch.setattr(weight_module, name, part_bytes)
    rows, columns = 512, 512
    blocks = (
        random_blocks(kind, rows * columns) if kind in IN_TORCH else torch.zeros(rows * columns, SIZES[kind]).byte()
    )
    x = torch.randn(1, columns)
    for heads in (0, 4):
        weight = GgufWeight(blocks, Form(kind, (rows, columns), torch.bfloat16, heads))
        for use, dtype in (
            (lambda w: w.dequantize(), torch.bfloat16),
            (lambda w: torch.nn.functional.linear(x, w), torch.float32),
            (lambda w: torch.nn.functional.linear(x, w.to(torch.float32)), torch.float32),
        ):
            scratch.numbers.release()  # else memory of the use before is lent again
            with LiveMemory(blocks, x) as live:
                use(weight)
            counted = weight.making_bytes(dtype) + 4 * rows  # and the result
            assert live.peak <= counted and (kind in PLAIN or live.peak > 0.4 * counted)
