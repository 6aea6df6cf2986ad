"""Makes the numbers of quantised blocks, in torch on any device, with the bits of the format's reference.

Each function takes blocks, uint8 (count, bytes of a block), and returns (count, numbers of a block) in the dtype that
it computes in. The order of the multiplications is the reference's (the `gguf` package), which computes in fp32.
Another order, or another dtype, rounds differently. Numbers are computed where they lie, as memory that the system has
just given costs a CPU more than the arithmetic.

Layouts: ggml's `ggml-common.h` and `dequantize_row_*`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy
import torch

from ..files.safetensors_header import SourceError
from .types import IDS

# The sixteen numbers that the four bits of IQ4_NL and IQ4_XS stand for.
NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Dequantise = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


def _plain(dtype: torch.dtype) -> Dequantise:
    """Make a function for blocks of one number each."""
    return lambda blocks, work: blocks.contiguous().view(dtype).to(work)


def _half(blocks: torch.Tensor, start: int, work: torch.dtype) -> torch.Tensor:
    """Return the fp16 number at byte `start` of each block (count, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).to(work)


def _bits(packed: torch.Tensor, shifts: tuple[int, ...], mask: int) -> torch.Tensor:
    """Return (..., shifts, bytes): each byte shifted by each of the shifts, and masked."""
    by = torch.tensor(shifts, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return torch.bitwise_and(torch.bitwise_right_shift(packed.unsqueeze(-2), by), mask)


def _nibbles(packed: torch.Tensor, parts: int = 1) -> torch.Tensor:
    """Return (count, 2 x bytes): of each of the parts all low halves, then all high halves."""
    count = packed.shape[0]
    packed = packed.reshape(count, parts, -1)
    halves = torch.empty((count, parts, 2, packed.shape[-1]), dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 0x0F, out=halves[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=halves[:, :, 1])
    return halves.reshape(count, -1)


def _bit_planes(packed: torch.Tensor) -> torch.Tensor:
    """Return (count, 8 x bytes): all lowest bits, then the next."""
    return _bits(packed, tuple(range(8)), 1).flatten(1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Return (count, 32) of four bytes: their bits from the lowest of the first on."""
    return _bits(packed.unsqueeze(-1), tuple(range(8)), 1).reshape(packed.shape[0], 32)


def _q4_0(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).to(work).sub_(8).mul_(_half(blocks, 0, work))


def _q4_1(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).to(work).mul_(_half(blocks, 0, work)).add_(_half(blocks, 2, work))


def _q5_0(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]) << 4
    return numbers.to(work).sub_(16).mul_(_half(blocks, 0, work))


def _q5_1(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    numbers = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]) << 4
    return numbers.to(work).mul_(_half(blocks, 0, work)).add_(_half(blocks, 2, work))


def _q8_0(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).to(work).mul_(_half(blocks, 0, work))


def _by_scale(numbers: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply each group of a block's numbers by its scale, and take its offset away. May write into `numbers`."""
    count, groups = scales.shape
    made = numbers.reshape(count, groups, -1).to(scales.dtype).mul_(scales.unsqueeze(-1))
    return (made if offsets is None else made.sub_(offsets.unsqueeze(-1))).reshape(count, -1)


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """Return (count, 4 x bytes): of each 32 bytes all lowest pairs of bits, then the next."""
    count = packed.shape[0]
    return _bits(packed.reshape(count, -1, 32), (0, 2, 4, 6), 3).reshape(count, -1)


def _q2_k(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    scales = _half(blocks, 80, work) * (blocks[:, :16] & 0x0F).to(work)
    offsets = _half(blocks, 82, work) * (blocks[:, :16] >> 4).to(work)
    return _by_scale(_two_bits(blocks[:, 16:80]), scales, offsets)


def _q3_k(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    high, low = blocks[:, :32], blocks[:, 32:96]
    scales = _nibbles(blocks[:, 96:104]) | _bits(blocks[:, 104:108], (0, 2, 4, 6), 3).flatten(1) << 4
    numbers = _two_bits(low).to(work).sub_((_bit_planes(high) ^ 1) << 2)
    return _by_scale(numbers, _half(blocks, 108, work) * (scales.to(work) - 32))


def _six_bit_scales(packed: torch.Tensor, work: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eight scales and eight offsets that twelve bytes hold with six bits each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 0x3F, third & 0x0F | first >> 2 & 0x30], 1)
    offsets = torch.cat([second & 0x3F, third >> 4 | second >> 2 & 0x30], 1)
    return scales.to(work), offsets.to(work)


def _q4_k(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    scales, offsets = _six_bit_scales(blocks[:, 4:16], work)
    return _by_scale(_nibbles(blocks[:, 16:], 4), _half(blocks, 0, work) * scales, _half(blocks, 2, work) * offsets)


def _q5_k(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    scales, offsets = _six_bit_scales(blocks[:, 4:16], work)
    numbers = _nibbles(blocks[:, 48:], 4) | _bit_planes(blocks[:, 16:48]) << 4
    return _by_scale(numbers, _half(blocks, 0, work) * scales, _half(blocks, 2, work) * offsets)


def _q6_k(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    numbers = _nibbles(blocks[:, :128], 2) | _two_bits(blocks[:, 128:192]) << 4
    scales = _half(blocks, 208, work) * blocks[:, 192:208].view(torch.int8).to(work)
    return _by_scale(numbers.to(work).sub_(32), scales)


@functools.cache
def _table(device: torch.device, work: torch.dtype) -> torch.Tensor:
    return torch.tensor(NON_LINEAR, dtype=work, device=device)


def _looked_up(numbers: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    """Return what four bits stand for. Indexing would make the indices anew, in 64 bits each."""
    return _table(numbers.device, work).index_select(0, numbers.int().view(-1)).view(numbers.shape)


def _iq4_nl(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    return _looked_up(_nibbles(blocks[:, 2:]), work).mul_(_half(blocks, 0, work))


def _iq4_xs(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
    count = blocks.shape[0]
    high = _bits(blocks[:, 2:4].unsqueeze(-1), (0, 2, 4, 6), 3).reshape(count, 8)
    low = _bits(blocks[:, 4:8].unsqueeze(-1), (0, 4), 0x0F).reshape(count, 8)
    numbers = _looked_up(_nibbles(blocks[:, 8:], 8), work)
    return _by_scale(numbers, _half(blocks, 0, work) * ((low | high << 4).to(work) - 32))


IN_TORCH: dict[str, Dequantise] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
# Of weights whose rows are put into another order.
PLAIN = {"F32": _plain(torch.float32), "F16": _plain(torch.float16), "BF16": _plain(torch.bfloat16)}
# Types whose numbers are computed one by one, and not looked up in a table.
ARITHMETIC = {*IN_TORCH, *PLAIN} - {"IQ4_NL", "IQ4_XS"}


def _by_reference(kind: str) -> Dequantise:
    """Return the `gguf` package's function, which computes on the CPU. Raises SourceError where it is missing."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise SourceError(
            f"weights of GGUF type {kind} need the package 'gguf': install it into ComfyUI's Python "
            "(pip install gguf), or get the model in Q2_K to Q8_0, IQ4_NL or IQ4_XS."
        ) from None
    wanted = GGMLQuantizationType(IDS[kind])

    def dequantise(blocks: torch.Tensor, work: torch.dtype) -> torch.Tensor:
        made = dequantize(numpy.ascontiguousarray(blocks.cpu().numpy()), wanted)
        return torch.from_numpy(made).to(blocks.device, work)

    return dequantise


@functools.cache
def function_for(kind: str) -> Dequantise:
    """Return what makes numbers of blocks of a type. Raises SourceError for one that needs a package."""
    return IN_TORCH.get(kind) or PLAIN.get(kind) or _by_reference(kind)
