"""A table: the weight of an embedding that stays in its file, of which each lookup brings the rows that it asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..device.backend import Backend
from ..files.disk_map import check_files
from ..gather import inner_tensors, memory_of, tensor_bytes
from ..gguf.weight import GgufWeight, stays_quantised
from ..ledger import Ledger, in_words
from ..rows import has_rows
from .bundle import Bundle
from .idle_weight import IdleWeight, stands_itself
from .param import Param
from .repeat import may_repeat

# Below this a table may as well stay on the device: looking rows up makes the launching thread wait for it.
LARGE_BYTES = 16 << 20
# What the first read of a page maps beside it, on Linux.
FAULT_BYTES = 64 << 10
_NO_ROWS = torch.empty(0, dtype=torch.int64)


def is_table(module: torch.nn.Module, params: Sequence[Param]) -> bool:
    """Say whether a module does nothing with its parameters but look up rows, and has so many that this is worth it.

    `max_norm` is no reason to look: torch would write into the weight.
    """
    if not isinstance(module, torch.nn.Embedding) or module.max_norm is not None or len(params) != 1:
        return False
    (param,) = params
    if param.owner is not module or param.attr != "weight" or param.quantisation is not None:
        return False
    return tensor_bytes(param.source) >= LARGE_BYTES and has_rows(param.source)


class Table(Bundle):
    """by_rows: lookups bring rows. Otherwise it is a bundle as any other: once a layer or a read has needed the whole
    weight, and while a patch does.

    While it is by rows, it has no slice, no pin and no place in the order of the step. A call of its module lends
    nothing. The forward finds the idle weight, and the operation in it that looks rows up gets those.
    """

    def __init__(self, name: str, module: torch.nn.Module, params: Sequence[Param]) -> None:
        self._needed_whole = False
        self._parts: list[torch.Tensor] = []  # of a quantised weight: an idle weight, or a small tensor of the source
        self._read = 0  # bytes of the file that lookups have mapped since its pages were dropped
        super().__init__(name, module, params)

    def refresh(self) -> None:
        super().refresh()
        (param,) = self.params
        self.by_rows = not self._needed_whole and (param.patch is None or _patches_rows(param))

    def invalidate(self) -> bool:
        before = self.by_rows
        resized = super().invalidate()
        if before and not self.by_rows:
            self.lender.ledger.decide_once(
                f"'{self.name}' ({in_words(self.nbytes)}) has a patch that needs all of its rows: it takes a place "
                "like any other layer.",
                level=logging.INFO,
            )
        return resized or before != self.by_rows

    def missed(self) -> None:
        if self.by_rows:
            self.by_rows, self._needed_whole = False, True
            self.lender.ledger.decide_once(
                f"'{self.name}' ({in_words(self.nbytes)}) was read as a whole: from the next step on it takes a place "
                "like any other layer.",
                level=logging.INFO,
            )

    def stand_in(self, device: torch.device | None) -> None:
        super().stand_in(device)
        (param,) = self.params
        self._parts = []
        if not stays_quantised(param.source) or stands_itself(param, device):
            return
        device = device or param.source.device
        for inner, part in enumerate(inner_tensors(param.source)):
            if part.numel() > 1:
                shown = torch.empty(part.shape, dtype=part.dtype, device="meta")
                part = IdleWeight(self, param, device, shown, inner=inner)
            self._parts.append(part)

    def let_go(self) -> None:
        self.by_rows = False  # an idle weight that somebody kept gives the source
        super().let_go()

    def run(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.depth or not self.by_rows:
            return super().run(module, forward, args, kwargs)
        lending = self.lender.at_hand(self)
        try:
            return self._run_idle(lending.backend, forward, args, kwargs)
        except Exception as error:
            if not lending.make_room(self, error, may_repeat(module)):
                lending.explain(self, error)
                raise
        return self._run_idle(lending.backend, forward, args, kwargs)

    def _run_idle(
        self, backend: Backend, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call the forward with the idle weight standing, which for a quantised one is made of idle parts.

        Where a CPU uses the source in place, that stands there itself.
        """
        (param,) = self.params
        self.check_unchanged()  # a lookup waits for its rows
        check_files(one for part in self._parts if not isinstance(part, IdleWeight) for one in memory_of(part))
        self.depth = 1  # whatever the forward does with the weight is no loan of the whole
        try:
            if self._parts:
                param.owner._parameters[param.attr] = self._of_parts(param, backend)  # type: ignore[assignment]
            return forward(*args, **kwargs)
        finally:
            self.depth = 0
            self.restore()
            if backend.in_place and self.in_place:
                self.drop_pages()

    def _of_parts(self, param: Param, backend: Backend) -> torch.Tensor:
        """Build the quantised weight around its idle parts, with its single numbers on the device."""
        names, context = param.source.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {
            name: part if isinstance(part, IdleWeight) else part.to(backend.device)
            for name, part in zip(names, self._parts, strict=True)
        }
        # Not as an `nn.Parameter`, which would make copies of the parts.
        return type(param.source).__tensor_unflatten__(parts, context, param.source.shape, None)  # type: ignore

    def note_read(self, rows: int) -> None:
        """Count rows that were read from the map. Give its pages back when they have become many."""
        self._read += rows * FAULT_BYTES
        if self._read >= LARGE_BYTES:
            self._read = 0
            self.drop_pages()


def _patches_rows(param: Param) -> bool:
    """Say whether the patch of a weight can be computed for some rows, with the bits that they have in the whole."""
    if stays_quantised(param.source):
        return False
    if isinstance(param.final, GgufWeight):
        return True  # the patch is a branch
    of_rows = getattr(param.patch, "of_rows", None)
    return of_rows is not None and of_rows(_NO_ROWS) is not None


def note_tables(bundles: Sequence[Bundle], ledger: Ledger) -> None:
    """Log which weights stay in their file."""
    for table in [bundle for bundle in bundles if bundle.by_rows]:
        size = in_words(table.source_bytes)
        ledger.decide(f"'{table.name}' ({size}) stays in its file: each lookup brings the rows that it asks for")


def leave_order(bundles: Sequence[Bundle]) -> None:
    """Take tables that are by rows out of the order in which bundles are brought ahead."""
    for bundle in bundles:
        following = bundle.successor
        for _ in bundles:
            if following is None or not following.by_rows:
                break
            following = following.successor
        else:  # tables that follow one another in a circle
            following = None
        bundle.successor = following
