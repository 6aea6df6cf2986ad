"""INT8 matrix products, with weights quantised by row and activations by row as they come (W8A8).

Method: dynamic per-token activation and per-channel weight scales, as in LLM.int8() (arXiv:2208.07339, section 3.1)
without its outlier columns. Symmetric, 127 steps to each side, scale = largest magnitude / 127.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# (x, qdata, scale, bias) -> the product in x's dtype, for weights with one scale a row.
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

STEPS = 127
# The largest of many normal numbers grows with their count, and the step with it. Beyond this many columns a scale for
# each group keeps the error of a product under 1.2 %.
GROUP = 2048
# Bytes and least rows of products before they are rescaled. A smaller bound saves temporary memory, but every product
# reads the whole weight again.
CHUNK_BYTES, CHUNK_ROWS = 64 << 20, 256
# Bytes of numbers that take several passes. They stay in the processor's cache, and get no memory map of their own.
CACHED_BYTES = 2 << 20

_kernels: dict[str, Kernel] = {}
_kernel_names: dict[str, str] = {}
_int_mm_works: dict[str, bool] = {}
# Devices whose products have been found wrong. Their weights are dequantised.
_distrusted: set[torch.device] = set()


def register_kernel(device_type: str, kernel: Kernel, name: str) -> None:
    """Use a library's kernel on devices of that type for weights with one scale a row. name: with its version."""
    _kernels[device_type], _kernel_names[device_type] = kernel, name


def kernel_name(device_type: str) -> str:
    """Name what multiplies weights with one scale a row on devices of that type."""
    return _kernel_names.get(device_type, "torch")


def distrust(device: torch.device) -> None:
    """Multiply with the dequantised weight on a device from now on."""
    _distrusted.add(device)


def group_count(columns: int, device_type: str) -> int:
    """Return the groups of a row that have a scale each: on a CPU as few as keep the error bound, else 1.

    Kernels of other devices take one scale a row, and lose more by several products than more scales gain.
    """
    if device_type != "cpu":
        return 1
    for count in range(max(1, -(-columns // GROUP)), max(2, columns // 256)):
        if columns % count == 0:
            return count
    return 1


def quantise_rows(x: torch.Tensor, groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise (rows, columns) float. Return int8 of the same shape, and fp32 scales (rows, groups)."""
    count, columns = x.shape
    if _is_symbolic(count) or x.device.type != "cpu" or 4 * count * columns <= CACHED_BYTES:
        return _quantised(x, groups)
    quantised, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(count, groups)
    step = max(1, CACHED_BYTES // (4 * columns))
    for start in range(0, count, step):
        part = slice(start, start + step)
        quantised[part], scale[part] = _quantised(x[part], groups)
    return quantised, scale


def _quantised(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    parts = x.reshape(rows, groups, columns // groups)
    # Never zero, whose reciprocal would make NaN of a row of zeros.
    scale = parts.abs().amax(-1, keepdim=True).float().div_(STEPS).clamp_(min=torch.finfo(torch.float32).tiny * 256)
    quantised = torch.mul(parts, scale.reciprocal()).round_().to(torch.int8)
    return quantised.reshape(rows, columns), scale.squeeze(-1)


def _is_symbolic(count: int) -> bool:
    """Say whether a graph is traced for any number of rows. Work in parts would fix that number."""
    return torch.compiler.is_compiling() or isinstance(count, torch.SymInt)


def dequantise_rows(qdata: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return (rows, columns) in `dtype` of int8 (rows, columns) with scales (rows, groups)."""
    rows, columns = qdata.shape
    parts = qdata.reshape(rows, scale.shape[1], -1)
    return torch.mul(parts, scale.unsqueeze(-1)).to(dtype).reshape(rows, columns)


def has_int_mm(device_type: str) -> bool:
    """Say whether torch multiplies INT8 matrices on such devices. Tried once, as the first weight is quantised."""
    known = _int_mm_works.get(device_type)
    if known is None:
        if torch.compiler.is_compiling():
            return True
        ones = torch.ones(32, 32, dtype=torch.int8, device=device_type)
        try:
            known = int(torch._int_mm(ones, ones.t())[0, 0]) == 32
        except (RuntimeError, NotImplementedError):
            known = False
        _int_mm_works[device_type] = known
    return known


def _multiplies(x: torch.Tensor, qdata: torch.Tensor) -> bool:
    """Say whether torch._int_mm takes these shapes. CUDA wants multiples of 8: aten/native/cuda/Blas.cpp."""
    rows, columns = qdata.shape
    if x.device.type != "cpu" and (rows % 8 or columns % 8):
        return False
    return has_int_mm(x.device.type)


def int8_linear(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x (..., columns) times qdata (rows, columns) transposed, plus bias (rows), in x's dtype.

    scale: (rows, groups), fp32. Shapes that no INT8 kernel takes, and all on a device whose products were found wrong,
    are computed with the dequantised weight.
    """
    if x.device in _distrusted:
        return torch.nn.functional.linear(x, dequantise_rows(qdata, scale, x.dtype), bias)
    return int8_linear_by_kernel(x, qdata, scale, bias)


def int8_linear_by_kernel(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Do as int8_linear, on any device that has a kernel."""
    flat = x.reshape(-1, x.shape[-1])
    groups = scale.shape[1]
    if groups == 1:
        kernel = _kernels.get(x.device.type)
        if kernel is not None:
            return kernel(flat, qdata, scale, bias).reshape(*x.shape[:-1], qdata.shape[0])
    if not _multiplies(flat, qdata):
        return torch.nn.functional.linear(x, dequantise_rows(qdata, scale, x.dtype), bias)
    return _products(flat, qdata, scale, bias).reshape(*x.shape[:-1], qdata.shape[0])


def _products(x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    count, (rows, groups) = x.shape[0], scale.shape
    step = max(CHUNK_ROWS, CHUNK_BYTES // (4 * rows * groups))
    if _is_symbolic(count) or x.device.type != "cpu":
        return _rescaled(*_product(x, qdata, scale), bias, x.dtype)
    result = x.new_empty(count, rows)
    for start in range(0, count, step):
        products, scales, x_scale = _product(x[start : start + step], qdata, scale)
        # Rescaling takes several passes, so it goes by parts that stay in the cache.
        small = max(1, CACHED_BYTES // (rows * 4))
        for first in range(0, products[0].shape[0], small):
            part = slice(first, first + small)
            rescaled = _rescaled([product[part] for product in products], scales, x_scale[part], bias, x.dtype)
            result[start + first : start + first + rescaled.shape[0]] = rescaled
    return result


def _product(
    x: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return the int32 products of each group, the scales of its columns, and those of the rows (rows, groups)."""
    groups = scale.shape[1]
    width = x.shape[1] // groups
    quantised, x_scale = quantise_rows(x, groups)
    if groups == 1:
        return [int8_dot(quantised, qdata)], [scale[:, 0]], x_scale
    parts = [slice(group * width, (group + 1) * width) for group in range(groups)]
    products = [int8_dot(quantised[:, part], qdata[:, part]) for part in parts]
    return products, list(scale.t().contiguous()), x_scale


def _rescaled(
    products: list[torch.Tensor],
    scales: list[torch.Tensor],
    x_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    total = products[0].float().mul_(x_scale[:, :1]).mul_(scales[0])
    for group in range(1, len(products)):
        total.addcmul_(products[group].float().mul_(x_scale[:, group : group + 1]), scales[group])
    if bias is not None:
        total += bias
    return total.to(dtype)


def int8_dot(x: torch.Tensor, qdata: torch.Tensor) -> torch.Tensor:
    """Return the int32 products of INT8 x (count, columns) with qdata (rows, columns) transposed."""
    count = x.shape[0]
    if x.device.type != "cpu" and count <= 16:  # CUDA wants more rows
        return torch._int_mm(torch.nn.functional.pad(x, (0, 0, 0, 32 - count)), qdata.t())[:count]
    return torch._int_mm(x, qdata.t())
