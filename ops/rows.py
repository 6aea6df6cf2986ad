"""Rows of a large table: which forms of a tensor they can be copied out of, and how."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .gather import inner_tensors, is_wrapper
from .gguf.weight import GgufWeight

IDS = (torch.int64, torch.int32)

_by_rows: list[Callable[[torch.Tensor], bool]] = []


def register_by_rows(has: Callable[[torch.Tensor], bool]) -> None:
    """Add a test for quantised tensors of which each part has one row for each row of the tensor, or a single number.

    A format that scales blocks of several rows together, or stores its scales in another order, has no such parts.
    """
    _by_rows.append(has)


def has_rows(tensor: torch.Tensor) -> bool:
    """Say whether rows can be copied out of a table in host memory without the others."""
    parts = inner_tensors(tensor)
    if tensor.dim() != 2 or not all(part.device.type == "cpu" and part.is_contiguous() for part in parts):
        return False
    if isinstance(tensor, GgufWeight):
        return tensor.down is None and tensor.blocks.shape[0] % tensor.shape[0] == 0
    return not is_wrapper(tensor) or any(has(tensor) for has in _by_rows)


def row_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of one row of a table or of a part of one."""
    return _as_bytes(tensor).shape[1]


def rows_template(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return a tensor without memory, of the same form, for `count` rows of a table."""
    if isinstance(tensor, GgufWeight):
        per_row = tensor.blocks.shape[0] // tensor.shape[0]
        blocks = torch.empty(count * per_row, tensor.blocks.shape[1], dtype=torch.uint8, device="meta")
        return GgufWeight(blocks, tensor.form._replace(shape=(count, tensor.shape[1])))
    return torch.empty(count, *tensor.shape[1:], dtype=tensor.dtype, device="meta")


def copy_rows(target: torch.Tensor, table: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows of a table on the host into a tensor made after `rows_template`."""
    torch.index_select(_as_bytes(table), 0, rows, out=_as_bytes(target))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a table as (rows, bytes), since torch selects rows of some dtypes on some devices only."""
    count = tensor.shape[0]
    data = tensor.blocks if isinstance(tensor, GgufWeight) else tensor
    width = data.numel() // count if count else 1
    return data.detach().view(count, width).view(torch.uint8)


def distinct_rows(ids: torch.Tensor, count: int, *, from_end: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that are asked for, each once and in order, and for each id its place among them, on the host.

    count: rows of the table. from_end: negative ids count from its end. Raises torch's own error, an IndexError, for an
    id without a row.
    """
    asked = ids.detach().to("cpu", torch.int64)
    if from_end:
        asked = torch.where(asked < 0, asked + count, asked)
    rows, places = torch.unique(asked, return_inverse=True)
    if rows.numel() and not (rows[0] >= 0 and rows[-1] < count):
        wrong = int(rows[-1] if rows[0] >= 0 else rows[0])
        raise IndexError(f"index out of range in self: row {wrong} was asked for, and the table has {count}.")
    return rows, places
