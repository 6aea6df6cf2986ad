"""A layer's weight in one of ComfyUI's quantised formats, with a low-rank branch beside it where LoRAs stay exact."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

from ....ops.files.disk_map import check_files
from ....ops.gather import is_wrapper
from ....ops.int8.weight import PART_BYTES
from ....ops.lending.idle_weight import as_stored
from ....ops.subclasses import add_branch, empty_branch, exact, linear_arguments, writes_into
from .layouts import MULTIPLE, ROTATIONS, Form, Format, Stored
from .making import Making, backend_for


class KitchenWeight(torch.Tensor):
    """A weight that behaves like one in `dtype`, and stands for `stored` plus `up @ down`.

    stored: ComfyUI's quantised tensor. form: its format. down, up: a low-rank branch in floating point, (rank, columns)
    and (rows, rank), which is added exactly. `linear` computes what ComfyUI computes with a file in the format, with
    the same bits. Every other operation gets the dequantised weight.
    """

    stored: Stored
    form: Form
    down: torch.Tensor | None
    up: torch.Tensor | None

    @staticmethod
    def __new__(
        cls: type[KitchenWeight],
        stored: Stored,
        form: Form,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> KitchenWeight:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, stored.shape, dtype=stored._params.orig_dtype, device=stored._qdata.device, requires_grad=False
        )

    def __init__(
        self,
        stored: Stored,
        form: Form,
        down: torch.Tensor | None = None,
        up: torch.Tensor | None = None,
    ) -> None:
        self.stored, self.form, self.down, self.up = stored, form, down, up

    @property
    def rank(self) -> int:
        """Return the rank of the branch; 0 where there is none."""
        return 0 if self.down is None else self.down.shape[0]

    def quantise_(self, weight: torch.Tensor) -> None:
        """Fill the stored tensors from a weight of the same shape, some rows at a time.

        weight: in any floating point dtype, or another quantised tensor that has a `dequantize`.
        """
        if is_wrapper(weight):
            weight = weight.dequantize()
        making, targets = Making(self.form, tuple(self.shape)), self.stored.state_dict("")
        dtype, edges = exact(self.dtype), making.edges()
        if making.looks:
            for start, stop in itertools.pairwise(edges):
                making.look(start, weight[start:stop].to(dtype))
            making.found()
        for start, stop in itertools.pairwise(edges):
            for suffix, part in making.make(weight[start:stop].to(dtype)).items():
                targets[suffix][start : start + part.shape[0]].copy_(part)
        for suffix, tensor in making.single.items():
            targets[suffix].copy_(tensor)

    def quantising_bytes(self, source: torch.Tensor) -> int:
        """Return the most temporary memory that `quantise_` takes: some rows in fp32, and what is made of them."""
        return 3 * min(PART_BYTES, 4 * source.numel())

    def making_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the most temporary memory that an operation on the weight takes for its numbers in a dtype.

        Weights of 4 bits that are multiplied in INT8 are unpacked before. Dequantising goes through fp32.
        """
        if self.form.multiplies:
            return 2 * self.numel() if self.form.bits < 8 and not self.form.quantises_input else 0
        return self.numel() * ((dtype or self.dtype).itemsize + 8)

    def dequantize(self) -> torch.Tensor:
        """Return the numbers that the weight stands for, its branch included, in `dtype`."""
        numbers: torch.Tensor = self.stored.dequantize()
        if self.down is None:
            return numbers
        assert self.up is not None
        return numbers.float().addmm_(self.up.float(), self.down.float()).to(self.dtype)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., columns). Return (..., rows), in x's dtype."""
        weight = _in_dtype(self.stored, x.dtype)
        if not self.form.multiplies or x.dim() < 2:
            result = torch.nn.functional.linear(x, weight.dequantize(), bias)
        else:
            # A matrix: of more dimensions, a trace would take a product with them apart into one with the numbers.
            flat: Any = x.reshape(-1, x.shape[-1])
            if self.form.quantises_input:
                given = self.form.input_scale
                scale = None if given is None else torch.full((), given, dtype=torch.float32, device=x.device)
                flat = QuantizedTensor.from_float(flat, weight._layout_cls, scale=scale)
            result = torch.nn.functional.linear(flat, weight, bias).reshape(*x.shape[:-1], self.shape[0])
        return add_branch(result, x, self.down, self.up)

    # -- torch's protocol for wrapper subclasses

    def __tensor_flatten__(self) -> tuple[list[str], Form]:
        return ["stored"] if self.down is None else ["stored", "down", "up"], self.form

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Any], context: Form, outer_size: Any, outer_stride: Any) -> KitchenWeight:
        return KitchenWeight(parts["stored"], context, parts.get("down"), parts.get("up"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear:
            x, weight, bias = linear_arguments(*args, **kwargs)
            if isinstance(weight, KitchenWeight) and not is_wrapper(x) and x.is_floating_point():
                return weight.linear(x, bias)
        with torch._C.DisableTorchFunctionSubclass():  # else the result would be taken for such a weight
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        aten = torch.ops.aten
        if isinstance(first, KitchenWeight):
            if func.overloadpacket is aten.to:  # in inference mode it comes as it is
                return func.decompose(*args, **kwargs)
            if func is aten.detach.default:
                return first
            if func is aten.clone.default or func is aten._to_copy.default:
                return _copied(func, first, kwargs)
            if writes_into(KitchenWeight, func, args):
                raise RuntimeError(f"{func} would write into a quantised weight. Use a copy of `weight.dequantize()`.")
        args, kwargs = torch.utils._pytree.tree_map_only(KitchenWeight, KitchenWeight.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        name = self.form.name
        return f"KitchenWeight({tuple(self.shape)}, {name} as {self.dtype}, {self.device}, rank={self.rank})"


def form_of(module: torch.nn.Module, multiplies: bool) -> Form | None:
    """Return the form of a linear layer's weight from a quantised file. None for other weights.

    multiplies: whether the device multiplies in it.
    """
    algorithm, weight = getattr(module, "quant_format", None), module._parameters.get("weight")
    if algorithm not in QUANT_ALGOS or not isinstance(weight, QuantizedTensor) or not hasattr(module, "in_features"):
        return None
    bits = 8 * QUANT_ALGOS[algorithm]["storage_t"].itemsize
    halves = weight._qdata.shape[-1] < weight.shape[-1]
    scale = module._parameters.get("input_scale")
    given = None
    if scale is not None:
        check_files([as_stored(scale)])
        given = float(as_stored(scale))
    return Form(Format(algorithm, algorithm, bits // 2 if halves else bits), 0, multiplies, given)


def with_branch(stored: Stored, form: Form, rank: int) -> KitchenWeight:
    """Return a template of a weight from a file with a branch beside it."""
    return KitchenWeight(stored, form, *empty_branch(stored.shape, rank, stored._params.orig_dtype))


def _in_dtype(stored: Stored, dtype: torch.dtype) -> Stored:
    """Return a quantised tensor around the same memory that behaves like one in a dtype."""
    if stored._params.orig_dtype == dtype:
        return stored
    params = dataclasses.replace(stored._params, orig_dtype=dtype)
    return QuantizedTensor(stored._qdata, stored._layout_cls, params)


def _copied(func: Any, weight: KitchenWeight, kwargs: dict[str, Any]) -> KitchenWeight:
    """Return the weight in another dtype, around the same memory, or a copy of it elsewhere."""
    dtype = kwargs.pop("dtype", None) or weight.dtype
    moves = {name: value for name, value in kwargs.items() if name in ("device", "non_blocking") and value is not None}
    stored = _in_dtype(weight.stored, dtype)
    if func is torch.ops.aten._to_copy.default and moves.get("device", weight.device) == weight.device:
        return KitchenWeight(stored, weight.form, weight.down, weight.up)
    names, context = stored.__tensor_flatten__()
    parts = {name: func(getattr(stored, name), **moves) for name in names}
    stored = type(stored).__tensor_unflatten__(parts, context, None, None)
    branch = [None if part is None else func(part, **moves) for part in (weight.down, weight.up)]
    return KitchenWeight(stored, weight.form, *branch)


@dataclass(frozen=True)
class KitchenFormat(Form):
    """How a weight is quantised to such a format as it is brought."""

    @staticmethod
    def of(known: Format, columns: int, multiplies: bool = False) -> KitchenFormat:
        """Return the format of a weight with so many columns."""
        rotation = next(size for size in ROTATIONS if columns % size == 0) if known.rotated else 0
        return KitchenFormat(known, rotation, multiplies)

    def template(self, shape: torch.Size, dtype: torch.dtype, rank: int = 0) -> KitchenWeight:
        """Return a weight without memory. rank: of its branch; 0 for none."""
        pieces = {suffix: piece.empty("meta") for suffix, piece in self.pieces(shape).items()}
        if not rank:
            return self.view(pieces, shape, dtype)
        return KitchenWeight(self.stored(pieces, shape, dtype), self, *empty_branch(shape, rank, dtype))

    def view(self, pieces: dict[str, torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> KitchenWeight:
        """Return a weight around its tensors, by suffix."""
        return KitchenWeight(self.stored(pieces, shape, dtype), self)

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in fp32 as they are once they have been quantised."""
        count = rows.shape[0]
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % MULTIPLE))
        made = {suffix: piece.empty(rows.device) for suffix, piece in self.pieces(tuple(rows.shape)).items()}
        weight = self.view(made, rows.shape, torch.float32)
        weight.quantise_(rows)
        with backend_for(self.format.algorithm, rows):
            return weight.dequantize()[:count]
