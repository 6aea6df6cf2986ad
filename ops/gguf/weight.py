"""A weight in a GGUF file's blocks, as one tensor. It travels as its blocks do, and has numbers where it is used."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..gather import is_wrapper
from ..joined_weight import JoinedWeight
from ..ram import scratch
from ..subclasses import add_branch, empty_branch, linear_arguments, writes_into
from .dequantise import ARITHMETIC, function_for
from .types import IDS, TYPES

# Bytes of fp32 numbers that are made at a time, which bounds temporary memory. On a CPU they are fewer than what its
# allocator takes from the system anew each time, see ram/allocator.py. What making them takes beside the
# result, as a multiple of the fp32 numbers of one part. Types whose numbers are looked up in a table show 2.3, and
# what a device takes within its kernels comes on top. The others are arithmetic on single numbers.
PART_BYTES, PART_BYTES_ON_CPU = 16 << 20, 3 << 20
MAKING, LOOKING_UP = 1.55, 3.2
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Form(NamedTuple):
    """What blocks stand for: their type, and the shape and dtype of the weight.

    heads: that have their rows in pairs, one of each half of a head, where the model has half after half. 0 for none.
    work: in which numbers are computed, fp32 being the format's own. shown: the dtype that the weight was cast to
    since; None for none.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int = 0
    work: torch.dtype = torch.float32
    shown: torch.dtype | None = None


class GgufWeight(torch.Tensor):
    """A weight that behaves like one in `dtype`, and whose blocks are never made again.

    blocks: uint8 (count, bytes of a block), as the file has them. down, up: a low-rank branch in the form's dtype, or
    bf16 for fp8, (rank, columns) and (rows, rank), which is added exactly. `linear` computes the branch beside the
    weight. Every other operation gets the numbers, rounded once to the form's dtype. A cast weight stays in blocks.
    """

    blocks: torch.Tensor
    form: Form
    down: torch.Tensor | None
    up: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[GgufWeight],
        blocks: torch.Tensor,
        form: Form,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> GgufWeight:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, form.shape, dtype=form.shown or form.dtype, device=blocks.device, requires_grad=False
        )

    def __init__(
        self, blocks: torch.Tensor, form: Form, down: torch.Tensor | None = None, up: torch.Tensor | None = None
    ) -> None:
        self.blocks, self.form, self.down, self.up = blocks, form, down, up

    def template(self, rank: int = 0) -> GgufWeight:
        """Return a weight without memory, in the same blocks. rank: of its branch; 0 for none."""
        blocks = torch.empty(self.blocks.shape, dtype=torch.uint8, device="meta")
        if not rank:
            return GgufWeight(blocks, self.form)
        return GgufWeight(blocks, self.form, *empty_branch(self.shape, rank, self.form.dtype))

    @property
    def rank(self) -> int:
        """Return the rank of the branch; 0 where there is none."""
        return 0 if self.down is None else self.down.shape[0]

    def dequantize(self) -> torch.Tensor:
        """Return the numbers that the weight stands for, its branch included, in `dtype`."""
        if self.down is None:
            return self._own(self.dtype)
        assert self.up is not None
        merged = self._own(torch.float32).addmm_(self.up.float(), self.down.float())
        return merged.to(self.form.dtype).to(self.dtype)

    def making_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the most temporary memory that an operation on the weight takes for its numbers in a dtype."""
        wanted = dtype or self.dtype
        copies = bool(self.form.heads) + (wanted != self.dtype)
        factor = MAKING if self.form.kind in ARITHMETIC else LOOKING_UP
        making = int(factor * min(PART_BYTES, 4 * self.numel()))
        return self.numel() * wanted.itemsize + making + copies * self.blocks.numel()

    def _own(self, dtype: torch.dtype, made: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers without the branch. made: where they are to be; None for memory of their own."""
        blocks, heads = self.blocks, self.form.heads
        if heads:
            pairs = blocks.view(heads, self.form.shape[0] // (2 * heads), 2, -1)
            blocks = pairs.transpose(1, 2).reshape(blocks.shape)
        return self._numbers(blocks, dtype, made).view(self.form.shape)

    def _numbers(self, blocks: torch.Tensor, dtype: torch.dtype, made: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers of some blocks, one-dimensional."""
        function, per_block = function_for(self.form.kind), TYPES[IDS[self.form.kind]].numbers
        if made is None:
            made = torch.empty(blocks.shape[0] * per_block, dtype=dtype, device=blocks.device)
        part_bytes = PART_BYTES_ON_CPU if blocks.device.type == "cpu" else PART_BYTES
        step = max(1, part_bytes // (4 * per_block))
        for start in range(0, blocks.shape[0], step):
            part = function(blocks[start : start + step], self.form.work)
            made[start * per_block : start * per_block + part.numel()] = part.flatten().to(self.form.dtype)
            del part  # or it would live while the next one is made
        return made

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return some rows of a table, in `dtype`, of which only the blocks are read."""
        count, columns = self.shape
        if self.down is not None or self.form.heads or self.blocks.shape[0] % count:
            return torch.nn.functional.embedding(indices, self.dequantize())
        blocks = self.blocks.view(count, -1)[indices.flatten()]
        return self._numbers(blocks.view(-1, self.blocks.shape[1]), self.dtype).view(*indices.shape, columns)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., columns). Return (..., rows), in x's dtype."""
        if self._lives_briefly(x, bias):
            with scratch.numbers.lent((self.numel(),), x.dtype) as memory:
                result = torch.nn.functional.linear(x, self._own(x.dtype, memory), bias)
        else:
            result = torch.nn.functional.linear(x, self._own(x.dtype), bias)
        return add_branch(result, x, self.down, self.up)

    def _lives_briefly(self, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Say whether a product on a CPU is all that the numbers are made for. Gradients, and graphs, keep them."""
        if self.device.type != "cpu" or type(x) is not torch.Tensor or type(self.blocks) is not torch.Tensor:
            return False
        kept = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        return not kept and not torch.compiler.is_compiling()

    # -- torch's protocol for wrapper subclasses

    def __tensor_flatten__(self) -> tuple[list[str], Form]:
        return ["blocks"] if self.down is None else ["blocks", "down", "up"], self.form

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], context: Form, outer_size: Any, outer_stride: Any
    ) -> GgufWeight:
        return GgufWeight(parts["blocks"], context, parts.get("down"), parts.get("up"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = linear_arguments(*args, **kwargs)
            if isinstance(weight, GgufWeight) and not isinstance(x, GgufWeight) and x.is_floating_point():
                return weight.linear(x, bias)
        with torch._C.DisableTorchFunctionSubclass():  # else the result would be taken for such a weight
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        aten = torch.ops.aten
        if isinstance(first, GgufWeight):
            if func.overloadpacket is aten.to:  # in inference mode it comes as it is, else as what it is made of
                return func.decompose(*args, **kwargs)
            if func is aten.detach.default:
                return first
            if func is aten.clone.default or func is aten._to_copy.default:
                return _copied(func, first, kwargs)
            if func is aten.embedding.default and not isinstance(args[1], GgufWeight):
                return first.rows(args[1])
            if writes_into(GgufWeight, func, args):
                raise RuntimeError(f"{func} would write into a GGUF weight. Use a copy of `weight.dequantize()`.")
        args, kwargs = torch.utils._pytree.tree_map_only(GgufWeight, GgufWeight.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GgufWeight({tuple(self.shape)}, {self.form.kind} as {self.dtype}, {self.device}, rank={self.rank})"


def stays_quantised(tensor: torch.Tensor) -> bool:
    """Say whether a tensor keeps its quantised form when it is patched or saved. Blocks of a GGUF file do not."""
    return is_wrapper(tensor) and not isinstance(tensor, GgufWeight)


def numbers_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a weight in blocks, or in pieces. Any other tensor is returned as it is."""
    if isinstance(tensor, JoinedWeight):
        return tensor.whole()
    return tensor.dequantize() if isinstance(tensor, GgufWeight) else tensor


def _copied(func: Any, weight: GgufWeight, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return a copy in the same blocks, on another device or in another dtype perhaps."""
    dtype = kwargs.get("dtype") or weight.dtype
    if dtype not in FLOATS:
        return func(weight.dequantize(), **kwargs)  # type: ignore[no-any-return]
    kwargs = {name: value for name, value in kwargs.items() if name not in ("dtype", "memory_format")}
    names, form = weight.__tensor_flatten__()
    parts = {name: func(getattr(weight, name), **kwargs) for name in names}
    return GgufWeight.__tensor_unflatten__(parts, form._replace(shown=dtype), None, None)
