"""Lends rows of a table: read from the file, brought in one transfer, cast and patched as the whole would be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from ..device.backend import Backend
from ..files.disk_map import extent, locate
from ..gather import gathered_bytes, inner_tensors, interpret_gathered_like, memory_of
from ..gguf.weight import GgufWeight, numbers_of
from ..ledger import Counters
from ..rows import copy_rows, distinct_rows, row_bytes, rows_template
from .bundle import Bundle
from .idle_weight import IdleWeight
from .lookup import Asked
from .table import Table


class RowLender(Protocol):
    """What lending rows needs of the caster. rows_bytes: of device memory that rows hold."""

    backend: Backend
    counters: Counters
    rows_bytes: int

    @property
    def lock(self) -> AbstractContextManager[object]: ...

    def make_way(self, nbytes: int) -> None: ...

    def make_room(self, bundle: Bundle, error: BaseException, again: bool = True) -> bool: ...


# The rows for each idle weight, and for each id its place among them.
Rows = AbstractContextManager[tuple[list[torch.Tensor], torch.Tensor]]


@contextmanager
def lend_rows(
    caster: RowLender, table: Table, idle: Sequence[IdleWeight], asked: Asked
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Lend the rows that an operation looks up, for each of the idle weights that it has as a table.

    Yields them with, for each id, its place among them. The transfer is synchronous, and on the main stream: it is a
    few megabytes once for each text, and nothing then has to wait for it.
    """
    count = table.params[0].source.shape[0]
    rows, places = distinct_rows(asked.ids, count, from_end=asked.from_end)
    if rows.numel() == 1 and isinstance(table.params[0].final, GgufWeight) and table.params[0].patch is not None:
        rows = rows.repeat(2)  # torch rounds the product of a single row in another way
    if table.coming:
        for weight in idle:
            _await(weight.in_source(), rows)
    with caster.lock:
        try:
            lent, held = _bring(caster, table, idle, rows)
        except Exception as error:
            if not caster.make_room(table, error):
                raise
            lent, held = _bring(caster, table, idle, rows)
        caster.rows_bytes += held
    try:
        yield lent, places.to(asked.ids.device, asked.ids.dtype)
    finally:
        with caster.lock:
            caster.rows_bytes -= held


def _bring(
    caster: RowLender, table: Table, idle: Sequence[IdleWeight], rows: torch.Tensor
) -> tuple[list[torch.Tensor], int]:
    """Return the rows for each idle weight, and the bytes of device memory that they hold."""
    backend = caster.backend
    table.check_present()
    stored = [weight.in_source() for weight in idle]
    templates = [rows_template(tensor, rows.numel()) for tensor in stored]
    nbytes = gathered_bytes(templates)
    held = 0 if backend.in_place else nbytes + sum(_cast_bytes(weight, rows.numel()) for weight in idle)
    caster.make_way(held)
    host = backend.empty(nbytes) if backend.in_place else torch.empty(nbytes, dtype=torch.uint8)
    table.check_unchanged()
    for tensor in stored:
        _read_ahead(tensor, rows)
    for target, tensor in zip(interpret_gathered_like(templates, host), stored, strict=True):
        assert target is not None
        copy_rows(target, tensor, rows)
    table.check_unchanged()  # rows that were written meanwhile must not be used
    table.note_read(rows.numel())
    memory = host
    if not backend.in_place:
        memory = backend.empty(nbytes)
        backend.copy(memory, host, None)
    caster.counters.bytes_streamed += rows.numel() * sum(map(row_bytes, stored))
    caster.counters.rows += rows.numel()
    made = []
    for weight, view in zip(idle, interpret_gathered_like(templates, memory), strict=True):
        assert view is not None
        made.append(weight.view_of(_final(caster, weight, view, rows)))
    return made, held


def _await(tensor: torch.Tensor, rows: torch.Tensor) -> None:
    """Wait until the rows of a table have come. Of one in pieces, or with rows apart, the whole is waited for."""
    parts = memory_of(tensor)
    for part in parts:
        place = extent(part)
        if place is None:
            continue
        file, offset, nbytes = place
        count = tensor.shape[0]
        if len(parts) == 1 and part.is_contiguous() and nbytes % count == 0:
            width = nbytes // count
            file.check_all([(offset + row * width, width) for row in rows.tolist()])
        else:
            file.check(offset, nbytes)


def _read_ahead(tensor: torch.Tensor, rows: torch.Tensor) -> None:
    """Ask the system to read the rows from the file all at once. Page by page would wait for the disk each time."""
    (data,) = inner_tensors(tensor)
    place = locate(data)
    if place is not None:
        disk_map, offset, _ = place
        width = row_bytes(tensor)
        for row in rows.tolist():
            disk_map.will_need(offset + row * width, width)


def _final(caster: RowLender, weight: IdleWeight, rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Return rows in the final form of their weight. which: their places in it."""
    param, patch = weight.param, weight.param.patch
    if weight.inner is not None:  # of a quantised weight, which its op casts
        return rows
    dtype = param.final.dtype
    if patch is None:
        made = rows if isinstance(rows, GgufWeight) else rows.to(dtype)
    elif isinstance(rows, GgufWeight) and isinstance(param.final, GgufWeight):
        down, up = patch.low_rank(torch.device("cpu"))  # type: ignore[attr-defined]
        down, up = (part.to(rows.device, dtype) for part in (down, up[which]))
        made = GgufWeight(rows.blocks, rows.form, down, up)
    else:
        numbers = numbers_of(rows).to(param.compute_dtype or dtype)
        made = patch.of_rows(which)(numbers).to(dtype)  # type: ignore[attr-defined]
    caster.counters.patched += patch is not None
    return made if param.compute_dtype is None else made.to(param.compute_dtype)


def _cast_bytes(weight: IdleWeight, count: int) -> int:
    """Return the bytes that casting and patching `count` rows takes beside them."""
    param = weight.param
    if weight.inner is not None or (not param.is_cast and param.patch is None and param.compute_dtype is None):
        return 0
    dtypes = {param.final.dtype, param.compute_dtype or param.final.dtype}
    return 2 * count * param.source.shape[1] * max(dtype.itemsize for dtype in dtypes)
