"""Recognises operations that look rows up in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..rows import IDS


class _Lookup(NamedTuple):
    """Positions of an operation's arguments: tables that have the same rows, and the ids of rows."""

    tables: tuple[int, ...]
    ids: int


_aten = torch.ops.aten
_lookups: dict[Any, _Lookup] = {
    _aten.embedding.default: _Lookup((0,), 1),
    _aten.index_select.default: _Lookup((0,), 2),
    _aten.index.Tensor: _Lookup((0,), 1),
}


def register_lookup(func: Any, tables: tuple[int, ...], ids: int) -> None:
    """Say of an operation that it uses those rows of its tables that the ids name, and no others."""
    _lookups[func] = _Lookup(tables, ids)


class Asked(NamedTuple):
    """What an operation asks for. tables: positions of arguments. from_end: negative ids count from the end."""

    tables: tuple[int, ...]
    ids: torch.Tensor
    from_end: bool


def asked_for(func: Any, args: Sequence[Any]) -> Asked | None:
    """Say which rows an operation looks up. None for an operation that uses a weight in any other way."""
    lookup = _lookups.get(func)
    if lookup is None or len(args) <= max(lookup.ids, *lookup.tables):
        return None
    ids = args[lookup.ids]
    if func is _aten.index_select.default and args[1] not in (0, -2):
        return None
    if func is _aten.index.Tensor:
        ids = ids[0] if len(ids) == 1 else None
    if not isinstance(ids, torch.Tensor) or ids.dtype not in IDS or ids.is_meta:
        return None
    return Asked(lookup.tables, ids, func is _aten.index.Tensor)


def with_rows(func: Any, args: Sequence[Any], rows: Mapping[int, torch.Tensor], places: torch.Tensor) -> list[Any]:
    """Return the operation's arguments with some rows in the place of each table, and their places in that of ids."""
    replaced = list(args)
    for position, some in rows.items():
        replaced[position] = some
    replaced[_lookups[func].ids] = [places] if func is _aten.index.Tensor else places
    return replaced
