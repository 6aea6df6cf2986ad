"""The caster: lends a bundle's tensors to an op. What all devices share; how the bytes move is in the two subclasses.

Four cases of a loan: resident and current (views); resident but stale (gather, patch once, keep); no room and pin
current (one transfer of the finished bundle); no room and no pin (gather, patch, write back where the pin budget
allows).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .backend import Backend
from .bundle import Bundle, Param
from .gather import copy_into, interpret_gathered_like, is_wrapper
from .int8_weight import Int8Weight
from .layer import is_out_of_memory
from .ledger import Ledger, in_words
from .pins import Pins
from .ring import Slot
from .vbar import VBAR


class Loan:
    """One use of a bundle, from the request for its memory to the end of the op."""

    # Defaults of the class: most loans are of resident bundles and never set them; one is made for every layer call.
    views: Sequence[torch.Tensor] | None = None  # set: ready to use
    target: torch.Tensor | None = None  # where the transfer goes
    slot: Slot | None = None
    event: object | None = None
    finished = False  # the transfer brings the finished form
    keep: object | None = None  # memory that must outlive a transfer

    def __init__(self, bundle: Bundle, signature: object | None) -> None:
        self.bundle = bundle
        self.signature = signature  # not None: the slice is pinned in the VBAR


class Caster:
    """Lends bundles. `enter` and `exit` bracket one forward of one module; both on the thread of the computation."""

    def __init__(self, backend: Backend, vbar: VBAR, pins: Pins, ledger: Ledger) -> None:
        self.backend = backend
        self.vbar = vbar
        self.pins = pins
        self.ledger = ledger
        self.counters = ledger.counters
        self.previous: Bundle | None = None
        self.first: Bundle | None = None
        # Called whenever the first bundle is asked for: a step begins.
        self.on_step: Callable[[], None] = lambda: None
        # Memory may be freed by other threads; held while a loan begins or ends, never during the op.
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a dynamic module is a plain one."""

    # -- what a layer calls

    def enter(self, bundle: Bundle) -> None:
        """Borrow: after this the module's parameters are tensors that its op can use.

        Raises SourceError where a parameter has no data; whatever is raised, nothing stays pinned.
        """
        with self.lock:
            if self.first is None:
                self.first = bundle
            if bundle is self.first:
                self.on_step()
            try:
                loan = self._bring(bundle)
            except Exception as error:
                if not is_out_of_memory(error) or not self.make_room(bundle, error):
                    raise
                loan = self._bring(bundle)
            bundle.loan = loan
            bundle.depth = 1
            previous = self.previous
            if previous is not None:
                previous.successor = bundle
            self.previous = bundle
            try:
                self.look_ahead(bundle)
            except BaseException:
                self.exit(bundle)
                raise

    def _bring(self, bundle: Bundle) -> Loan:
        """A loan whose tensors stand in the module."""
        loan = self.take(bundle)
        try:
            if loan.views is None:
                loan.views = self.finish(loan)
            views = loan.views
            if bundle.computes:
                views = [
                    view if param.compute_dtype is None else view.to(param.compute_dtype)
                    for param, view in zip(bundle.params, views, strict=True)
                ]
            bundle.install(views)
        except BaseException:
            bundle.restore()
            self.release(loan)
            raise
        return loan

    def exit(self, bundle: Bundle) -> None:
        """Give back: the idle parameters stand in the module again."""
        with self.lock:
            loan = bundle.loan
            if loan is None:
                return
            bundle.depth = 0
            bundle.loan = None
            bundle.restore()
            self.release(loan)

    @contextmanager
    def borrow(self, bundle: Bundle) -> Iterator[list[torch.Tensor]]:
        """The same as a context manager that yields the tensors, in the order of the bundle's parameters."""
        self.enter(bundle)
        try:
            yield [param.owner._parameters[param.attr] for param in bundle.params]  # type: ignore[misc]
        finally:
            self.exit(bundle)

    # -- residency

    def take(self, bundle: Bundle) -> Loan:
        """A loan for the bundle: ready where it is resident and current, else begun."""
        signature = self.vbar.fault(bundle.piece)
        loan = Loan(bundle, signature)
        if signature is None:
            self.counters.misses += 1
        else:
            self.counters.faults += 1
            if self.vbar.same(signature, bundle.signature):
                self.counters.hits += 1
                loan.views = bundle.views
                return loan
        try:
            self.begin(loan)
        except BaseException:
            try:
                self.backend.synchronize()  # a transfer may have begun
            finally:
                self.release(loan)
            raise
        return loan

    def make_room(self, bundle: Bundle, error: BaseException, again: bool = True) -> bool:
        """After an out-of-memory error in a layer: evict what is not in use. Returns whether to run it again.

        again: it may be (see `may_repeat`). It is not where nothing was freed.
        """
        freed = self.free()
        if not freed:
            return False
        self.counters.retries += again
        done = "and ran it again" if again else "for whoever tries next; it cannot be run again half way"
        self.ledger.decide(
            f"out of memory in '{bundle.name}': freed {in_words(freed)} of weights {done}. "
            "A larger headroom avoids this.",
            level=logging.WARNING,
        )
        return again

    def free(self, nbytes: int = 1 << 62) -> int:
        """Evict what is not in use until that much is free; returns the bytes freed. For any thread."""
        with self.lock:
            self.forget()
            return self.vbar.free_memory(nbytes)

    # -- how bytes move: the subclasses

    def begin(self, loan: Loan) -> None:
        """Start bringing the bytes."""
        raise NotImplementedError

    def finish(self, loan: Loan) -> Sequence[torch.Tensor]:
        """The work of the main stream: wait, cast, patch. Returns the tensors in their finished form."""
        raise NotImplementedError

    def release(self, loan: Loan) -> None:
        """End a loan, used or not."""
        if loan.signature is not None:
            self.vbar.unpin(loan.bundle.piece)
            loan.signature = None

    def look_ahead(self, bundle: Bundle) -> None:
        """Begin what will be asked for next."""

    def forget(self) -> None:
        """Drop what was begun ahead: the order changed, or memory is wanted."""

    def close(self) -> None:
        """Give all memory of the device back."""
        self.forget()

    # -- shared by the subclasses

    def form(self, bundle: Bundle, source: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
        """Cast `source` into `memory` and apply the patches there; returns the finished views."""
        views = interpret_gathered_like(bundle.form, memory)
        for param, view, tensor in zip(bundle.params, views, source, strict=True):
            assert view is not None
            if isinstance(view, Int8Weight):
                self._quantise(param, view, tensor)
            elif param.patch is None:
                copy_into(view, tensor)
            else:
                # A patch gets the weight in the dtype that the op computes in, as its own: it may write into it, and on
                # a CPU `tensor` is the source itself.
                wanted = param.compute_dtype or view.dtype
                start = tensor if is_wrapper(tensor) else tensor.to(wanted, copy=self.backend.in_place)
                copy_into(view, param.patch(start))
                self.counters.patched += 1
        return views  # type: ignore[return-value]

    def _quantise(self, param: Param, view: Int8Weight, tensor: torch.Tensor) -> None:
        if param.patch is None:
            view.quantise_(tensor)
        elif view.down is not None and view.up is not None:
            view.quantise_(tensor)
            down, up = param.patch.low_rank(tensor.device)  # type: ignore[attr-defined]
            view.down.copy_(down)
            view.up.copy_(up)
        else:  # merged in floating point, rounded once
            start = tensor if is_wrapper(tensor) else tensor.to(view.dtype, copy=self.backend.in_place)
            view.quantise_(param.patch(start))
            self.counters.patched += 1
        self.counters.quantised += 1

    def keep_resident(self, bundle: Bundle, loan: Loan, views: Sequence[torch.Tensor]) -> None:
        """The bundle's slice now holds its finished form."""
        bundle.signature = loan.signature
        bundle.views = list(views)
