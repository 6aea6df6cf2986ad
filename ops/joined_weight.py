"""A weight whose rows lie in several places, such as one of queries, keys and values that a file keeps apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .subclasses import writes_into


class JoinedWeight(torch.Tensor):
    """Tensors that are one weight, one below the other. Nothing is read until its numbers are used.

    pieces: contiguous, with the same dtype, device and columns. A bundle gathers them into one memory. Rows of it are
    joined too. Any other operation gets a copy of the whole. A write goes into the pieces.
    """

    pieces: tuple[torch.Tensor, ...]
    counted: tuple[torch.Tensor, ...]  # of which each is a view, and whose writes are counted

    @staticmethod
    def __new__(
        cls: type[JoinedWeight], pieces: Sequence[torch.Tensor], counted: Sequence[torch.Tensor] = ()
    ) -> JoinedWeight:
        first = pieces[0]
        rows = sum(piece.shape[0] for piece in pieces)
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
                cls, (rows, *first.shape[1:]), dtype=first.dtype, device=first.device, requires_grad=False
            )

    def __init__(self, pieces: Sequence[torch.Tensor], counted: Sequence[torch.Tensor] = ()) -> None:
        self.pieces, self.counted = tuple(pieces), tuple(counted or pieces)

    def whole(self) -> torch.Tensor:
        """Return a copy of the weight in one memory."""
        return torch.cat(self.pieces)

    def rows(self, start: int, stop: int) -> JoinedWeight:
        """Return a view of some rows, which is joined too."""
        parts, counted, at = [], [], 0
        for piece, base in zip(self.pieces, self.counted, strict=True):
            first, last = max(start - at, 0), min(stop - at, piece.shape[0])
            if first < last:
                parts.append(piece[first:last])
                counted.append(base)
            at += piece.shape[0]
        return JoinedWeight(parts or [self.pieces[0][:0]], counted)

    def assign(self, whole: torch.Tensor) -> None:
        """Write all numbers."""
        at = 0
        for piece, base in zip(self.pieces, self.counted, strict=True):
            piece.copy_(whole[at : at + piece.shape[0]])
            if not base.is_inference():
                torch.autograd.graph.increment_version(base)  # torch counts no writes below a subclass
            at += piece.shape[0]

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        copied = self.whole()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=False)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.whole().__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        aten = torch.ops.aten
        if isinstance(first, JoinedWeight):
            if func.overloadpacket is aten.to:  # in inference mode it comes as it is, else as what it is made of
                return func.decompose(*args, **kwargs)
            if func in (aten.detach.default, aten.alias.default):
                return JoinedWeight(first.pieces, first.counted)
            if func is aten.slice.Tensor and _dimension(first, args) == 0 and (len(args) < 5 or args[4] == 1):
                start, stop, _ = slice(*args[2:4]).indices(first.shape[0])
                return first.rows(start, stop)
            if func is aten.select.int and _dimension(first, args) == 0:
                row = args[2] % first.shape[0]
                rows = first.rows(row, row + 1)
                return JoinedWeight([rows.pieces[0][0]], rows.counted) if first.dim() > 1 else rows.pieces[0][0]
        joined = [(value, value.whole()) for value in (*args, *kwargs.values()) if isinstance(value, JoinedWeight)]
        memory = {id(value): whole for value, whole in joined}

        def plain(value: JoinedWeight) -> torch.Tensor:
            return memory[id(value)] if id(value) in memory else value.whole()

        given, named = torch.utils._pytree.tree_map_only(JoinedWeight, plain, (args, kwargs))
        if any(value.alias_info is not None for value in func._schema.returns) and not func._schema.is_mutable:
            with torch.inference_mode(False), torch.no_grad():
                return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, func(*given, **named))
        result = func(*given, **named)
        written = kwargs.get("out", first if writes_into(JoinedWeight, func, args) else None)
        if isinstance(written, JoinedWeight):
            written.assign(memory[id(written)])
            return written
        return result

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"JoinedWeight({tuple(self.shape)}, {self.dtype}, {len(self.pieces)} pieces)"


def _dimension(tensor: torch.Tensor, args: Any) -> int:
    dimension = args[1] if len(args) > 1 else 0
    return dimension if dimension >= 0 else dimension + tensor.dim()
