"""Checks that a device's INT8 and FP8 products are those of their reference on the CPU."""

from __future__ import annotations

import torch

from ...ops.int8.linear import has_int_mm, int8_dot, int8_linear_by_kernel
from .bytes import Wrong

# (rows of x, columns, rows of the weight). Few rows go another way than many. CUDA wants multiples of 8, FP8 of 16. No
# matrix has more numbers than the 32768 that torch gives to one CPU thread: on a busy machine, waiting for others would
# be most of the check.
SHAPES = ((1, 64, 16), (16, 128, 48), (17, 256, 64), (24, 1024, 32), (130, 248, 96))
FP8_SHAPES = SHAPES[:3]  # torch's FP8 product on a CPU, where a simulated device is checked, takes its time
# Of the norm of a product of normal numbers. INT8 loses 1.2 % by rounding; FP8 products of the same FP8 numbers lose
# what their sums and a 16-bit result lose.
INT8_ERROR, FP8_ERROR = 0.02, 0.02


def _integers(rows: int, columns: int, largest: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, (rows, columns), generator=generator, dtype=torch.int32)


def _normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _exactly(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    got = got.to("cpu", wanted.dtype)
    if torch.equal(got, wanted):
        return
    wrong = got != wanted
    at = tuple(int(index) for index in wrong.nonzero()[0])
    raise Wrong(
        f"{what}: {int(wrong.sum())} of {wanted.numel()} products are wrong, the first at {at} ({got[at].item():g} "
        f"instead of {wanted[at].item():g})"
    )


def _nearly(what: str, got: torch.Tensor, wanted: torch.Tensor, bound: float) -> None:
    error = float((got.to("cpu", torch.float64) - wanted).norm() / wanted.norm())
    if not error <= bound:  # NaN too
        raise Wrong(f"{what}: off by {100 * error:.2f} % of the norm, where {100 * bound:.0f} % are expected at most")


def check_int8(device: torch.device) -> None:
    """Raise Wrong where products of INT8 weights are not right, whichever kernel computes them on the device."""
    for count, columns, rows in SHAPES:
        if has_int_mm(device.type):
            x, weight = _integers(count, columns, 127, 1), _integers(rows, columns, 127, 2)
            x[0], weight[0] = 127, -127  # the largest sums that there are
            got = int8_dot(x.to(torch.int8).to(device), weight.to(torch.int8).to(device))
            _exactly("INT8 dot products", got, x @ weight.t())
        # Numbers of -1, 0 and 1 with a largest of 127 are quantised without rounding, and their sums are exact in any
        # dtype. A sum that is off by one shows.
        x, weight = _integers(count, columns, 1, 3), _integers(rows, columns, 1, 4)
        x[:, 0], weight[:, 0] = 127, 0
        x[:, 65:], weight[:, 65:] = 0, 0
        scale = torch.full((rows, 1), 0.5)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            got = int8_linear_by_kernel(x.to(dtype).to(device), weight.to(torch.int8).to(device), scale.to(device))
            _exactly(f"INT8 products in {dtype}", got, (x @ weight.t()).float() * 0.5)
        floats, weight = _normal(count, columns, 5), _integers(rows, columns, 127, 6)
        got = int8_linear_by_kernel(floats.to(device), weight.to(torch.int8).to(device), scale.to(device))
        _nearly("INT8 products", got, floats.double() @ weight.double().t() * 0.5, INT8_ERROR)


def check_fp8(device: torch.device) -> None:
    """Raise Wrong where torch's scaled FP8 product is not right. Raises what torch raises where it has none."""
    one = torch.ones((), device=device)
    for count, columns, rows in FP8_SHAPES:
        x, weight = _integers(count, columns, 1, 7).float(), _integers(rows, columns, 1, 8).float()
        x[:, 64:] = 0
        _exactly("FP8 products", _scaled_mm(x, weight, one, device), x @ weight.t())
        x, weight = (_normal(*shape).to(torch.float8_e4m3fn) for shape in ((count, columns, 9), (rows, columns, 10)))
        wanted = x.double() @ weight.double().t()
        _nearly("FP8 products", _scaled_mm(x, weight, one, device), wanted, FP8_ERROR)


def _scaled_mm(x: torch.Tensor, weight: torch.Tensor, one: torch.Tensor, device: torch.device) -> torch.Tensor:
    left, right = x.to(torch.float8_e4m3fn).to(device), weight.to(torch.float8_e4m3fn).to(device)
    return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16)  # type: ignore[no-any-return]
