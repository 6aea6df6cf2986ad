"""A linear layer's weight in INT8, as one tensor. It travels as its parts do, and multiplies where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..gather import inner_tensors, is_wrapper
from ..subclasses import add_branch, empty_branch, linear_arguments, wide, writes_into
from .linear import dequantise_rows, has_int_mm, int8_linear, quantise_rows

# Bytes of fp32 rows that are quantised at a time, which bounds temporary memory.
PART_BYTES = 16 << 20


class Int8Weight(torch.Tensor):
    """A (rows, columns) weight in INT8 that behaves like a weight in `dtype`.

    qdata: int8 (rows, columns); scale: fp32 (rows, groups), one for each `columns / groups` columns. down, up: a
    low-rank branch in floating point, (rank, columns) and (rows, rank), which is added exactly. The weight stands for
    `qdata * scale + up @ down`. `linear` multiplies in INT8; every other operation gets the dequantised weight.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    down: torch.Tensor | None
    up: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[Int8Weight],
        qdata: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> Int8Weight:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, qdata.shape, dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> None:
        self.qdata, self.scale, self.down, self.up = qdata, scale, down, up

    @classmethod
    def template(cls, shape: torch.Size, dtype: torch.dtype, groups: int = 1, rank: int = 0) -> Int8Weight:
        """Return a weight without memory. groups: scales for each row. rank: of its branch; 0 for none."""
        rows, _ = shape
        qdata = torch.empty(shape, dtype=torch.int8, device="meta")
        scale = torch.empty(rows, groups, dtype=torch.float32, device="meta")
        if not rank:
            return cls(qdata, scale, dtype)
        return cls(qdata, scale, dtype, *empty_branch(shape, rank, dtype))

    @property
    def rank(self) -> int:
        """Return the rank of the branch; 0 where there is none."""
        return 0 if self.down is None else self.down.shape[0]

    def quantise_(self, weight: torch.Tensor) -> None:
        """Fill `qdata` and `scale` from a weight of the same shape, some rows at a time.

        weight: in any floating point dtype, or another quantised tensor that has a `dequantize`. A tensor of INT8 with
        a scale for each row, or one scale for all, is taken as it is.
        """
        has_int_mm(self.device.type)  # asked now, since a graph that is traced later cannot try
        if is_wrapper(weight):
            parts = inner_tensors(weight)
            if parts[0].dtype == torch.int8 and self.scale.shape[1] == 1:
                self.qdata.copy_(parts[0])
                self.scale.copy_(parts[1].reshape(-1, 1))
                return
            weight = weight.dequantize()
        rows, step = self.qdata.shape[0], self._rows_of_a_part()
        for start in range(0, rows, step):
            part = slice(start, start + step)
            quantised, scale = quantise_rows(weight[part].to(wide(weight.dtype)), self.scale.shape[1])
            self.qdata[part] = quantised
            self.scale[part] = scale

    def _rows_of_a_part(self) -> int:
        """Count the rows that are quantised together."""
        return max(1, PART_BYTES // (4 * self.qdata.shape[1]))

    def quantising_bytes(self, source: torch.Tensor) -> int:
        """Return the most temporary memory that `quantise_` takes beside the source and its own parts.

        For a part: the product in fp32, and the INT8 that it is rounded to, beside that of the part before.
        """
        numel = self.qdata.numel()
        if is_wrapper(source):
            return 3 * min(PART_BYTES, 4 * numel)
        part = min(numel, self._rows_of_a_part() * self.qdata.shape[1])
        copied = 0 if source.dtype == wide(source.dtype) else wide(source.dtype).itemsize
        return part * (4 + 1 + (part < numel) + copied)

    def making_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return 0. Products are rescaled in small parts, and none needs the weight's numbers."""
        return 0

    def dequantize(self) -> torch.Tensor:
        """Return the weight that the INT8 weight stands for, in `dtype`."""
        if self.down is None:
            return dequantise_rows(self.qdata, self.scale, self.dtype)
        assert self.up is not None
        branch = self.up.float() @ self.down.float()
        return branch.add_(dequantise_rows(self.qdata, self.scale, torch.float32)).to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., columns). Return (..., rows), in x's dtype."""
        result = int8_linear(x, self.qdata, self.scale, bias)
        return add_branch(result, x, self.down, self.up)

    # -- torch's protocol for wrapper subclasses

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["qdata", "scale"] if self.down is None else ["qdata", "scale", "down", "up"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], context: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> Int8Weight:
        return Int8Weight(parts["qdata"], parts["scale"], context, parts.get("down"), parts.get("up"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = linear_arguments(*args, **kwargs)
            if isinstance(weight, Int8Weight) and not isinstance(x, Int8Weight) and x.is_floating_point():
                return weight.linear(x, bias)
        with torch._C.DisableTorchFunctionSubclass():  # else the result would be taken for an INT8 weight
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Int8Weight):
            if func.overloadpacket is torch.ops.aten.to:  # in inference mode it comes as it is
                return func.decompose(*args, **kwargs)
            if func is torch.ops.aten.detach.default:
                return first
            if func is torch.ops.aten._to_copy.default or func is torch.ops.aten.clone.default:
                return _copied(func, first, kwargs)
            if writes_into(Int8Weight, func, args):
                raise RuntimeError(f"{func} would write into an INT8 weight. Use a copy of `weight.dequantize()`.")
        args, kwargs = torch.utils._pytree.tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)}, {self.dtype}, {self.device}, groups={self.scale.shape[1]})"


@dataclass(frozen=True)
class Int8Rows:
    """INT8 with `groups` scales for each row, multiplied by this pack's own products."""

    groups: int = 1
    name = "INT8"
    bits = 8

    def template(self, shape: torch.Size, dtype: torch.dtype, rank: int = 0) -> Int8Weight:
        """Return a weight without memory."""
        return Int8Weight.template(shape, dtype, self.groups, rank)

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in fp32 as they are once they have been quantised."""
        return dequantise_rows(*quantise_rows(rows, self.groups), torch.float32)


def _copied(func: Any, weight: Int8Weight, kwargs: dict[str, Any]) -> Int8Weight:
    """Return a copy. Another dtype changes the weight that the copy stands for, not its parts."""
    dtype = kwargs.pop("dtype", None) or weight.dtype
    names, _ = weight.__tensor_flatten__()
    return Int8Weight.__tensor_unflatten__(
        {name: func(getattr(weight, name), **kwargs) for name in names}, dtype, None, None
    )
