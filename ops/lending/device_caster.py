"""The caster of devices with their own memory: gathered transfers on offload streams, ahead of their use.

The thread that launches kernels copies nothing. Readers bring what has no pin, further ahead than the device has room.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from ..device.backend import Backend, Event
from ..device.readers import Inline
from ..files.disk_map import SourceError
from ..gather import interpret_gathered_like
from ..ledger import Ledger
from ..vbar.protocol import VBAR
from .arena import Arena
from .bundle import Bundle
from .caster import Caster
from .loan import Loan
from .pins import Pins
from .read_ahead import ReadAhead, chain
from .reading import send_pinned
from .write_backs import WriteBacks

MOST_AHEAD = 128  # bundles that may be on their way, however small
# As many in an order that has just proved wrong. Twice as many with each that was right.
LEAST_AHEAD = 2
LOADING_AHEAD = 3 << 29  # bytes that may be on their way to slices of the VBAR, which need no buffers
# As many that have not come yet, in an order that is guessed: what is asked for in their place waits behind them.
GUESSED_AHEAD = 1 << 28


class DeviceCaster(Caster):
    """prefetch: bundles to start ahead of their use; None for as many as the arena holds. streams: offload streams to
    use, at most the device's.
    """

    def __init__(
        self,
        backend: Backend,
        vbar: VBAR,
        pins: Pins,
        ledger: Ledger,
        prefetch: int | None = None,
        streams: int = 2,
    ) -> None:
        super().__init__(backend, vbar, pins, ledger)
        count = min(streams, backend.streams)
        self.streams: list[Any] = [backend.stream() for _ in range(count)] or [None]
        # Of its own: what is written back waits for its computation, and what is brought would wait behind it.
        self.back = backend.stream() if count else None
        self.most_ahead = (MOST_AHEAD if prefetch is None else prefetch) if count else 0
        self.reads_ahead = prefetch is None and count > 0  # further than transfers are begun
        self.turn = 0
        self.arena = Arena(backend.empty, born=partial(backend.record, None))
        self.staging = Arena(backend.host_empty, later=True)  # host memory that unpinned bundles are read into
        # Any thread may drop a model. Without the wait, transfers under way would write into what others get there.
        self._settle = weakref.finalize(self, backend.settle)
        self._settle.atexit = False
        self.prefetched: dict[Bundle, Loan] = {}
        self._looked_at: Bundle | None = None  # the last bundle that is resident or on its way
        self.read_ahead = ReadAhead(backend.readers() if count else Inline(), pins, self.staging, self.prefetched)
        self._trusted = LEAST_AHEAD  # bundles that may be on their way in an order that is guessed
        self._doubted: set[Bundle] = set()  # on their way since an order that proved wrong; they are used some time
        self._loading = 0  # bytes on their way to slices of the VBAR, ahead of their use
        self.write_backs = WriteBacks(backend, pins)
        self.room = 1 << 62  # see set_room
        self._held = 0  # bytes of device memory that loans hold outside of VBAR and arena
        self.peak_buffer_bytes = self.recent_bytes = 0

    # -- memory beside the VBAR

    def set_room(self, nbytes: int, arena: int, written_back: int, staging: int, staged: int) -> None:
        self.room, self.write_backs.most = nbytes, written_back
        self.arena.resize(arena)
        self.staging.resize(staging, staged)
        self.make_way(0)

    @property
    def buffer_bytes(self) -> int:
        return self.arena.nbytes + self._outside()

    @property
    def ahead_bytes(self) -> int:
        loans = [loan for loan in self.prefetched.values() if loan.signature is None and loan.target is not None]
        return sum(loan.target.numel() for loan in loans)  # type: ignore[union-attr]

    @property
    def staging_bytes(self) -> int:
        return self.staging.nbytes

    def _outside(self) -> int:
        """Return the bytes that are held outside of VBAR and arena."""
        return self._held + self.rows_bytes + self.write_backs.nbytes

    def make_way(self, nbytes: int) -> None:
        if self.buffer_bytes + nbytes > self.room:
            self.write_backs.finish(self.buffer_bytes + nbytes - self.room)
        if self.buffer_bytes + nbytes > self.room:
            self._end_those_in_the_arena()
            self.arena.clear()
        self._mark(self.buffer_bytes + nbytes)

    def begin_use(self) -> None:
        self.recent_bytes = 0
        self.note_held()

    def note_held(self) -> None:
        self._mark(self.buffer_bytes)

    def _mark(self, held: int) -> None:
        """Note the bytes of buffers that are held."""
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, held)
        self.recent_bytes = max(self.recent_bytes, held + self.vbar.loaded_size())

    def free_buffers(self) -> int:
        with self.lock:
            before = self.buffer_bytes
            self.cancel_prefetch()
            self.write_backs.finish()
            self.arena.clear()
            self.staging.clear()
            return before - self.buffer_bytes

    # -- a loan's way

    def request(self, bundle: Bundle) -> Loan:
        self.write_backs.forget_done()
        loan = self._started_ahead(bundle)
        if loan is None:
            loan = self.ask(bundle)
            if loan.views is None:
                self._looked_at = None
                if self.traced:
                    self._pass_over(bundle)
                self.begin(loan)
        return loan

    def _pass_over(self, bundle: Bundle) -> None:
        """End what was begun to be used before `bundle`. The order is not what it was."""
        while self.prefetched:
            self._end_ahead(next(iter(self.prefetched)))
        self.read_ahead.pass_over(bundle)

    def trust(self, wholly: bool = False) -> None:
        self._trusted = MOST_AHEAD if wholly else min(2 * self._trusted, MOST_AHEAD)

    def doubt(self, bundle: Bundle) -> None:
        self._trusted = LEAST_AHEAD
        self.read_ahead.doubt()
        wanted = chain(bundle)
        self._doubted = {b for b in self.prefetched if b not in wanted}
        self._looked_at = None

    def _end_those_in_the_arena(self) -> None:
        for bundle in [b for b, loan in self.prefetched.items() if loan.extent is not None]:
            self._end_ahead(bundle)
        self._looked_at = None

    def _end_a_doubted(self) -> bool:
        """End the last that was begun in an order that proved wrong, for what is expected now. Say whether one was."""
        for bundle in reversed(self.prefetched):
            if bundle in self._doubted and self.prefetched[bundle].extent is not None:
                self._end_ahead(bundle)
                return True
        return False

    def request_aside(self, bundle: Bundle) -> Loan:
        return self._no_longer_ahead(bundle) if bundle in self.prefetched else super().request(bundle)

    def _started_ahead(self, bundle: Bundle) -> Loan | None:
        """Take the loan out of those that were begun ahead. What was to be asked for before it is not wanted now."""
        loan = self.prefetched.get(bundle)
        if loan is None:
            return None
        while self.traced and (passed_over := next(iter(self.prefetched))) is not bundle:
            self._end_ahead(passed_over)
        return self._no_longer_ahead(bundle)

    def _no_longer_ahead(self, bundle: Bundle) -> Loan:
        loan = self.prefetched.pop(bundle)
        self._doubted.discard(bundle)
        if loan.goes_to_its_slice:
            self._loading -= bundle.nbytes
        return loan

    def _end_ahead(self, bundle: Bundle) -> None:
        """End a loan that was begun ahead. What was read for it, and is not sent yet, is kept."""
        loan = self._no_longer_ahead(bundle)
        reading = loan.reading
        if reading is not None and loan.job is not None:
            loan.job.cancel()
            if not reading.is_sent:
                self.read_ahead.keep(reading)
                loan.reading = loan.job = None
        self.end(loan)

    def start(self, loan: Loan) -> None:
        while not self._try_to_start(loan):
            # What is asked for last holds what this bundle needs.
            last = next((b for b, ahead in reversed(self.prefetched.items()) if ahead.extent is not None), None)
            if last is None:  # nested modules hold the arena, or the bundle is larger than all of it
                self._hold_target(loan)
                self._send(loan)
                return
            self._end_ahead(last)
            self._looked_at = None

    def _try_to_start(self, loan: Loan, ahead: bool = False) -> bool:
        """Find memory for the bundle and start its transfer. Return False, with no target, where there is none.

        ahead: before its use, so nothing else gives way.
        """
        bundle = loan.bundle
        bundle.check_present()
        loan.started = True
        current = bundle.pin_is_current
        # Where the budget has no room for the source beside the final form, the host casts.
        loan.host_casts = not current and self._must_cast_on_host(loan)
        loan.brings_final = current or bundle.source_is_final or loan.host_casts
        if not self.read_ahead.ensure(bundle, loan.host_casts, offloaded=loan.signature is None, ahead=ahead):
            return False
        nbytes = bundle.nbytes if loan.brings_final else bundle.source_bytes
        if loan.signature is not None and (loan.brings_final or bundle.only_patched):
            loan.target = self.vbar.tensor(bundle.vbar_slice)[:nbytes]
            loan.after = [self.backend.record(None)]
        else:
            extent = self.arena.take(nbytes) if self._arena_has_room(loan, ahead) else None
            if extent is None:
                return False
            loan.extent, loan.target, loan.after = extent, extent.view, extent.after
            self._mark(self.buffer_bytes)
        self._send(loan)
        return True

    def _arena_has_room(self, loan: Loan, ahead: bool) -> bool:
        """Say whether the arena, whole, leaves what casting and patching this bundle takes."""
        arena = self.arena
        if arena.capacity + (0 if loan.brings_final else loan.cast_bytes()) > self.room:
            return False
        growth = arena.capacity - arena.nbytes
        if growth > 0 and self.buffer_bytes + growth > self.room:
            if ahead:
                return False
            self.make_way(growth)
        return True

    def _hold_target(self, loan: Loan) -> None:
        """Allocate device memory for the transfer, which the loan gives back when it ends."""
        nbytes = loan.bundle.nbytes if loan.brings_final else loan.bundle.source_bytes
        self.make_way(nbytes)
        loan.target = self._hold(loan, nbytes)
        loan.after = [self.backend.record(None)]

    def _send(self, loan: Loan) -> None:
        """Start the transfer, or have a reader start it when it has come so far."""
        bundle, target = loan.bundle, loan.target
        assert target is not None
        stream = self.streams[self.turn]
        self.turn = (self.turn + 1) % len(self.streams)
        reading = self.read_ahead.take(bundle)
        if reading is not None and self.watch is not None:
            self.watch.disturbed = True
        sent = reading is not None and reading.send_to(loan, self.backend, self.copy, stream)
        if not sent and not send_pinned(self.pins, loan, self.backend, self.copy, stream):
            self.read_ahead.begin(bundle, loan.host_casts, offloaded=False)  # the pin went a moment ago
            reading = self.read_ahead.take(bundle)
            assert reading is not None and reading.pin is None
            reading.send_to(loan, self.backend, self.copy, stream)
        if loan.signature is None:
            self.counters.bytes_streamed += target.numel()
        else:
            self.counters.bytes_loaded += target.numel()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> Event | None:
        """Start a transfer, and time it where the step is timed. Return the event after it."""
        watch = self.watch
        started = self.backend.timer(stream) if watch is not None else None
        self.backend.copy(target, source, stream)
        event = self.backend.record(stream)
        if watch is not None and started is not None:
            watch.sent(target.numel(), started, self.backend.timer(stream))
        return event

    def _must_cast_on_host(self, loan: Loan) -> bool:
        bundle = loan.bundle
        if loan.signature is None or bundle.source_is_final or not bundle.only_cast:
            return False
        return self.arena.capacity < bundle.source_bytes and self.buffer_bytes + bundle.source_bytes > self.room

    def _hold(self, loan: Loan, nbytes: int) -> torch.Tensor:
        """Allocate device memory that the loan gives back when it ends."""
        memory = self.backend.empty(nbytes)
        loan.held += nbytes
        self._held += nbytes
        return memory

    def complete(self, loan: Loan) -> Sequence[torch.Tensor]:
        bundle = loan.bundle
        assert loan.target is not None
        if loan.job is not None:
            with self.ledger.stalled():
                loan.job.wait()
            loan.job = loan.reading = None
        # Without this wait the main stream would compute with what lay in the target before the transfer.
        self.backend.wait(loan.event, None)
        if loan.brings_final:
            views: list[torch.Tensor] = interpret_gathered_like(bundle.final, loan.target)  # type: ignore[assignment]
        else:
            source: list[torch.Tensor] = interpret_gathered_like(bundle.source, loan.target)  # type: ignore[assignment]
            resident = loan.signature is not None
            self.make_way(loan.cast_bytes())
            memory = self.vbar.tensor(bundle.vbar_slice) if resident else self._hold(loan, bundle.nbytes)
            memory = memory[: bundle.nbytes]
            views = self.make_final(bundle, source, memory)
            if not resident:
                loan.keep = memory
                if bundle.worth_writing_back and self.write_backs.begin(bundle, memory, self.back):
                    self.counters.write_backs += 1
                    self.counters.bytes_written_back += bundle.nbytes
            del source
            loan.target = None  # or the loan would hold the buffer for as long as its op runs
            self._free_extent(loan)
        if loan.signature is not None:
            self.keep_resident(loan, views)
        return views

    def _free_extent(self, loan: Loan) -> None:
        extent, loan.extent = loan.extent, None
        if extent is not None:
            done = None
            try:
                done = self.backend.record(None)
            finally:
                self.arena.give(extent, done)

    def finish(self, loan: Loan) -> None:
        try:
            if loan.job is not None:
                loan.job.cancel()
                loan.job = None
            if loan.reading is not None:
                loan.reading.end()
                loan.reading = None
            if loan.views is None and loan.event is not None:
                # No kernel waited for this transfer. Its target would be used again while the copy still writes there.
                loan.event.synchronize()
        finally:
            if loan.held:
                self._held -= loan.held
                loan.held = 0
            self._free_extent(loan)

    # -- ahead of the use

    def prefetch_after(self, bundle: Bundle) -> None:
        """Start what is asked for next, as far as the arena reaches. What is resident is passed over."""
        last = self._looked_at or bundle
        most_ahead = self.most_ahead if self.guess is None else min(self.most_ahead, self._trusted)
        for _ in range(MOST_AHEAD):  # a guessed order may go round in a circle that `bundle` has no part in
            if len(self.prefetched) - len(self._doubted) >= most_ahead:
                break
            following = last.successor
            if following is None or following is bundle or following.loan is not None:
                break
            if following.views is None and following not in self.prefetched and not self._start_ahead(following):
                break
            last = following
        self._looked_at = last
        if self.reads_ahead and most_ahead == MOST_AHEAD:
            self.read_ahead.follow(bundle, last, self._is_offloaded)

    def _is_offloaded(self, bundle: Bundle) -> bool:
        return bundle.vbar_slice is None or not self.has_room_for(bundle)

    def _start_ahead(self, bundle: Bundle) -> bool:
        """Start a bundle ahead of its use. Return False where that has to wait."""
        if not bundle.has_come():
            return False
        loan = self.ask(bundle)
        if loan.views is not None:
            self.end(loan)
            return True
        try:
            enough = loan.signature is not None and self._has_enough_to_load(bundle)
            started = not enough and self._try_to_start(loan, ahead=True)
            while not (started or enough) and self._end_a_doubted():
                started = self._try_to_start(loan, ahead=True)
        except BaseException as error:
            try:
                self.backend.synchronize()  # a transfer may have begun
            finally:
                self._not_started(loan)
            if not isinstance(error, (RuntimeError, MemoryError, SourceError)):
                raise
            return False  # the request for this bundle itself will raise it
        if not started:
            self._not_started(loan)
            return False
        self.prefetched[bundle] = loan
        self._loading += bundle.nbytes if loan.goes_to_its_slice else 0
        self.counters.prefetched += 1
        return True

    def _has_enough_to_load(self, bundle: Bundle) -> bool:
        """Say whether so much is on its way to slices that this bundle has to wait."""
        if self.guess is None:
            return 0 < self._loading > LOADING_AHEAD - bundle.nbytes
        coming = [loan for loan in self.prefetched.values() if loan.goes_to_its_slice and not loan.has_come]
        return 0 < sum(loan.bundle.nbytes for loan in coming) > GUESSED_AHEAD - bundle.nbytes

    def _not_started(self, loan: Loan) -> None:
        """End a loan that is asked for again later."""
        self.counters.misses -= loan.signature is None
        self.counters.faults -= loan.signature is not None
        self.end(loan)

    def cancel_prefetch(self) -> None:
        with self.lock, ExitStack() as stack:  # all are ended, whatever fails, or pins would be held for ever
            stack.callback(self.read_ahead.end)
            for bundle in reversed(self.prefetched):
                stack.callback(self._end_ahead, bundle)
            self._looked_at = None

    def settle_prefetch(self) -> None:
        for bundle, loan in list(self.prefetched.items()):
            if loan.goes_to_its_slice:
                self._no_longer_ahead(bundle)
                try:
                    loan.views = self.complete(loan)
                except (RuntimeError, MemoryError, SourceError):
                    pass  # the request for this bundle will raise it
                finally:
                    self.end(loan)
        self.cancel_prefetch()

    def close(self) -> None:
        self._settle.detach()
        try:
            self.backend.synchronize()
        finally:
            self.free_buffers()
