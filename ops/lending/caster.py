"""The caster: lends a bundle's tensors to an op. The two subclasses move the bytes.

The state of a bundle says what its loan costs:

    slice       steps
    current     none: the views are lent
    stale       gather, patch once, keep
    no room     with a current pin: one transfer of the final form
    no room     without: gather, patch, and write back where the pin budget allows
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..device.backend import Backend
from ..device.out_of_memory import is_out_of_memory
from ..gather import interpret_gathered_like
from ..ledger import Ledger, in_words
from ..ram.shortage import OutOfRAM, explained, give_way, is_refusal, refused_bytes
from ..vbar.protocol import VBAR
from .bundle import Bundle
from .final_form import make_final
from .guess import OrderGuess
from .idle_weight import IdleWeight
from .lend_rows import Rows, lend_rows
from .loan import Loan
from .lookup import Asked
from .pins import Pins
from .stopwatch import Stopwatch
from .table import Table


class Caster:
    """Lends bundles. `enter` and `exit` bracket one forward of a module, on the thread of the computation."""

    def __init__(self, backend: Backend, vbar: VBAR, pins: Pins, ledger: Ledger) -> None:
        self.backend = backend
        self.vbar = vbar
        self.pins = pins
        self.ledger = ledger
        self.counters = ledger.counters
        self.rows_bytes = 0  # of device memory that rows of tables hold
        self.previous: Bundle | None = None
        self.first: Bundle | None = None  # the bundle with which the last step began
        self.per_step = self.lent = 1 << 62  # loans within which a step asks for its first bundle again; since it began
        self.watch: Stopwatch | None = None  # set: times this step
        self.guess: OrderGuess | None = None  # set: in a first step, whose order nobody knows
        self.traced = False  # a step has shown the order; until then it is the order of registration
        # Called when a step begins: the first bundle is asked for, another way into the model is taken (`expect_step`),
        # or a step has lent so often that it must have begun anew somewhere else.
        self.on_step: Callable[[], None] = lambda: None
        # Told when weights had to give way to an error of the device's memory.
        self.on_out_of_memory: Callable[[], None] = lambda: None
        # Other threads may call `free`. Held while a loan begins or ends, never during the op.
        self.lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> None:
        """Return None, so that a copy of a dynamic module is an ordinary module."""

    @property
    def ahead_bytes(self) -> int:
        """Return the bytes that are streamed ahead of their use now."""
        return 0

    # -- what a bundle calls

    def enter(self, bundle: Bundle) -> Caster:
        """Let the module's parameters be tensors that its op can use. Return the caster itself, which ends the loan.

        Raises SourceError where a parameter has no data. After any error no slice stays pinned.
        """
        if bundle.coming:
            self._await(bundle)
        with self.lock:
            self.lent += 1
            if bundle is self.first or self.lent > self.per_step:
                self.on_step()
                self.first, self.lent = bundle, 1
            if self.watch is not None:
                self.watch.end()
            try:
                loan = self._bring(bundle)
            except Exception as error:
                if not self.make_room(bundle, error):
                    raise
                loan = self._bring(bundle)
            bundle.loan = loan
            bundle.depth = 1
            previous = self.previous
            if previous is not None and previous.successor is not bundle:
                previous.successor = bundle
                if self.guess is not None:
                    self.guess.learn(previous, bundle)
                    self.doubt(bundle)
            elif self.guess is not None:
                if previous is not None:
                    self.guess.confirm(previous)
                self.trust()
            self.previous = bundle
            try:
                self.prefetch_after(bundle)
            except BaseException:
                self.exit(bundle)
                raise
            if self.watch is not None:
                self.watch.begin(bundle)  # what this thread waits for above is no part of the computation
        return self

    def _await(self, bundle: Bundle) -> None:
        """Wait until the bundle has come, with the lock free: whoever frees memory meanwhile need not wait as long."""
        with self.lock:
            if self.watch is not None:
                self.watch.end()  # the wait is no part of the computation
        bundle.arrive()

    def _bring(self, bundle: Bundle) -> Loan:
        """Return a loan whose tensors stand in the module."""
        loan = self.request(bundle)
        try:
            views = loan.views
            if views is None:
                views = loan.views = self.complete(loan)
            bundle.install(self._cast(bundle, views) if bundle.casts_at_use else views)
        except BaseException:
            bundle.restore()
            self.end(loan)
            raise
        return loan

    def _cast(self, bundle: Bundle, views: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Cast where a rule keeps a weight in another dtype than its op is given."""
        self.make_way(bundle.cast_bytes())
        return [
            view if param.compute_dtype is None else view.to(param.compute_dtype)
            for param, view in zip(bundle.params, views, strict=True)
        ]

    def exit(self, bundle: Bundle) -> None:
        """End the loan. The idle parameters stand in the module again."""
        with self.lock:
            loan = bundle.loan
            if loan is None:
                return
            bundle.depth = 0
            bundle.loan = None
            bundle.restore()
            self.end(loan)

    def make_way(self, nbytes: int) -> None:
        """Free buffers where a cast of `nbytes` would take more than bundles on their way may."""

    def make_room(self, bundle: Bundle, error: BaseException, again: bool = True) -> bool:
        """Evict the bundles that are not in use, where the error of a forward or a loan says out of memory.

        again: the failed call may run once more. Returns `again` where memory was freed, else False. Where host memory
        was refused, whoever else holds some gives way too.
        """
        if not is_out_of_memory(error):
            return False
        self.on_out_of_memory()
        freed = self.free()
        if self.backend.in_place and is_refusal(error):
            freed += give_way(refused_bytes(error))
        if not freed:
            return False
        self.begin_use()  # what weights held before is no part of the peak that comes
        self.counters.retries += again
        done = "and ran it again" if again else "for whoever tries next; it cannot be run again half way"
        said = f"out of memory in '{bundle.name}': freed {in_words(freed)} of weights {done}."
        self.ledger.decide(f"{said} A larger headroom avoids this.", level=logging.WARNING)
        return again

    def explain(self, bundle: Bundle, error: BaseException) -> None:
        """Raise OutOfRAM in place of an error by which torch says that the system refused host memory."""
        if self.backend.in_place and is_refusal(error) and not isinstance(error, OutOfRAM):
            raise explained(refused_bytes(error), f"'{bundle.name}'") from error

    @contextmanager
    def borrow(self, bundle: Bundle) -> Iterator[list[torch.Tensor]]:
        """Enter and exit as a context manager. Yields the tensors, in the order of the bundle's parameters."""
        self.enter(bundle)
        try:
            yield [param.owner._parameters[param.attr] for param in bundle.params]  # type: ignore[misc]
        finally:
            self.exit(bundle)

    def expect_step(self) -> None:
        """Let a step begin with the next loan, whichever bundle it is of."""
        self.lent = 1 << 62

    @contextmanager
    def read(self, bundle: Bundle) -> Iterator[Sequence[torch.Tensor]]:
        """Lend the tensors to one operation outside of the module's forward. The traced order stays as it is."""
        if bundle.loan is not None:
            yield [param.owner._parameters[param.attr] for param in bundle.params]  # type: ignore[misc]
            return
        bundle.arrive()
        with self.lock:
            try:
                loan = self._bring_aside(bundle)
            except Exception as error:
                if not self.make_room(bundle, error):
                    raise
                loan = self._bring_aside(bundle)
            self.counters.reads += 1
        try:
            assert loan.views is not None
            yield self._cast(bundle, loan.views) if bundle.casts_at_use else loan.views
        finally:
            with self.lock:
                self.end(loan)

    def at_hand(self, bundle: Bundle) -> Caster:
        """Lend nothing yet. Return the caster itself, which will lend rows and makes room for them."""
        return self

    def rows(self, table: Table, idle: Sequence[IdleWeight], asked: Asked) -> Rows:
        """Lend rows of a table to an operation that looks them up. The traced order stays as it is."""
        return lend_rows(self, table, idle, asked)

    def follow_write(self, bundle: Bundle) -> None:
        """Forget the final form of a bundle whose source was written into."""
        bundle.writes = bundle.count_writes()
        self.pins.drop(bundle)
        bundle.invalidate()

    def _bring_aside(self, bundle: Bundle) -> Loan:
        """Return a loan whose tensors are ready and stand nowhere."""
        if bundle.count_writes() != bundle.writes:
            self.cancel_prefetch()
            self.follow_write(bundle)
        loan = self.request_aside(bundle)
        try:
            if loan.views is None:
                loan.views = self.complete(loan)
        except BaseException:
            self.end(loan)
            raise
        return loan

    # -- residency

    def request_aside(self, bundle: Bundle) -> Loan:
        """Request a bundle whose turn it is not. What was started ahead stays."""
        return self.request(bundle)

    def request(self, bundle: Bundle) -> Loan:
        """Return a loan for the bundle: ready where the bundle is resident and current, else started."""
        loan = self.ask(bundle)
        if loan.views is None:
            self.begin(loan)
        return loan

    def ask(self, bundle: Bundle) -> Loan:
        """Return a loan with what the VBAR grants. It is ready where the bundle is resident and current."""
        signature = self.vbar.fault(bundle.vbar_slice)
        loan = Loan(bundle, signature)
        counters = self.counters
        if signature is None:
            counters.misses += 1
            bundle.missed()
        else:
            counters.faults += 1
            if self.vbar.same(signature, bundle.signature):
                counters.hits += 1
                loan.views = views = bundle.views
                if bundle.in_place and bundle.lies(views):  # resident where it lies in its file
                    try:
                        bundle.check_files_often()
                    except BaseException:
                        self.end(loan)
                        raise
        return loan

    def begin(self, loan: Loan) -> None:
        """Start bringing the bytes. Ends the loan where that fails."""
        loan.started = True
        try:
            self.start(loan)
        except BaseException:
            try:
                self.backend.synchronize()  # a transfer may have begun
            finally:
                self.end(loan)
            raise

    def has_room_for(self, bundle: Bundle) -> bool:
        """Say whether the VBAR has room for the bundle now. Asking maps the slice's memory but moves no bytes."""
        if bundle.vbar_slice is None or self.vbar.fault(bundle.vbar_slice) is None:
            return False
        self.vbar.unpin(bundle.vbar_slice)
        return True

    def bring(self, bundle: Bundle) -> bool:
        """Bring a bundle ahead of any forward, the traced order unchanged. Return False where it was ready already.

        The caller holds the lock.
        """
        loan = self.request(bundle)
        try:
            if loan.views is not None:
                return False
            self.complete(loan)
            return True
        finally:
            self.end(loan)

    def free(self, nbytes: int = 1 << 62) -> int:
        """Free buffers, then bundles that are not in use, until `nbytes` are free. Return the bytes freed.

        Any thread may call it.
        """
        with self.lock, self.backend.current():
            freed = self.free_buffers()
            return freed + self.vbar.free_memory(nbytes - freed) if freed < nbytes else freed

    # -- how bytes move: the subclasses

    def start(self, loan: Loan) -> None:
        """Start bringing the bytes."""
        raise NotImplementedError

    def complete(self, loan: Loan) -> Sequence[torch.Tensor]:
        """Wait, cast and patch on the main stream. Return the tensors in their final form."""
        raise NotImplementedError

    def finish(self, loan: Loan) -> None:
        """Give back what bringing the bytes has taken. The bundle is still lent."""

    def end(self, loan: Loan) -> None:
        """End a loan, used or not."""
        try:
            if loan.started:
                loan.started = False
                self.finish(loan)
        finally:
            if loan.signature is not None:
                self.vbar.unpin(loan.bundle.vbar_slice)
                loan.signature = None

    def prefetch_after(self, bundle: Bundle) -> None:
        """Start the loans that will be asked for after `bundle`."""

    def trust(self, wholly: bool = False) -> None:
        """Note that the order in which bundles are begun ahead was guessed rightly. wholly: until it proves wrong."""

    def doubt(self, bundle: Bundle) -> None:
        """Note that the order in which bundles were begun ahead, to be used after this one, was a wrong guess."""

    def cancel_prefetch(self) -> None:
        """End the loans that were started ahead, since memory or another form of the weights is wanted."""

    def settle_prefetch(self) -> None:
        """End the loans that were started ahead. Bundles on their way to where they stay become resident."""

    def set_room(self, nbytes: int, arena: int, written_back: int, staging: int, staged: int) -> None:
        """Set the most device memory that bundles on their way may take, casts and patches included.

        arena: how much of it transfers may go to. written_back: how much may be on its way to pins. staging: the most
        host memory that bundles are gathered in, in blocks of `staged`.
        """

    def free_buffers(self) -> int:
        """Give buffers back that no loan uses. Return the bytes of device memory that were freed."""
        return 0

    peak_buffer_bytes = 0  # the most that `buffer_bytes` ever was
    recent_bytes = 0  # the most that buffers and the VBAR held together in this use

    def begin_use(self) -> None:
        """Begin to count what this use of the model holds at most."""

    def note_held(self) -> None:
        """Note what is held now."""

    @property
    def buffer_bytes(self) -> int:
        """Return the bytes of device memory that are held beside the VBAR."""
        return 0

    @property
    def staging_bytes(self) -> int:
        """Return the bytes of host memory that are held beside the pins."""
        return 0

    @property
    def has_buffers(self) -> bool:
        return self.buffer_bytes > 0 or self.staging_bytes > 0

    def follow_trace(self, bundles: Sequence[Bundle]) -> None:
        """Use what the first step has shown."""
        self.traced, self.guess = True, None

    def close(self) -> None:
        """Give all memory of the device back."""
        self.cancel_prefetch()

    # -- shared by the subclasses

    def make_final(self, bundle: Bundle, source: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
        """Cast `source` into `memory` and apply the patches there. Return views in the final form."""
        return self.fill(bundle, source, interpret_gathered_like(bundle.final, memory))  # type: ignore[arg-type]

    def fill(self, bundle: Bundle, source: Sequence[torch.Tensor], views: list[torch.Tensor]) -> list[torch.Tensor]:
        """Cast `source` into `views`, which have the final form, and apply the patches there. Return the views."""
        return make_final(bundle, source, views, self.counters, in_place=self.backend.in_place)

    def keep_resident(self, loan: Loan, views: Sequence[torch.Tensor]) -> None:
        """Note that the slice of the loan's bundle holds the final form."""
        loan.bundle.became_resident(loan.signature, views)
