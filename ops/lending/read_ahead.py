"""Brings bundles into host memory ahead of their transfers, for which the device has no room yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress

from ..device.readers import Readers
from ..files.disk_map import SourceError
from .arena import Arena, Extent
from .bundle import Bundle
from .loan import Loan
from .pins import Pins
from .reading import Reading

MOST = 128  # bundles that may be read ahead, however small, or passed over to find the next one


class ReadAhead:
    """The bundles that readers bring, or have brought, and that are not sent yet, in the order of their use.

    under_way: those that are sent, or will be as soon as they are read.
    """

    def __init__(self, readers: Readers, pins: Pins, staging: Arena, under_way: Mapping[Bundle, Loan]) -> None:
        self.readers, self.pins, self.staging, self.under_way = readers, pins, staging, under_way
        self._readings: dict[Bundle, Reading] = {}
        self._up_to: Bundle | None = None  # the last bundle that needs no reading
        self._doubted = False  # some of them may have been guessed wrongly

    def take(self, bundle: Bundle) -> Reading | None:
        """Hand the reading of a bundle over; None where there is none."""
        return self._readings.pop(bundle, None)

    def keep(self, reading: Reading) -> None:
        """Keep what was read for a transfer that is not to be. It is needed before all others."""
        reading.keep()
        self._readings = {reading.bundle: reading, **self._readings}

    def ensure(self, bundle: Bundle, as_final: bool, offloaded: bool, ahead: bool) -> bool:
        """See to it that the bundle has a pin, or that a reader brings it. Return False where that has to wait."""
        reading = self._readings.get(bundle)
        if reading is not None and reading.as_final == as_final:
            return True
        if reading is not None:
            self._end(bundle)
        elif not as_final and self.pins.holds(bundle):
            return True
        self._up_to = None  # it is not this far, and must not go over what is used before
        return self.begin(bundle, as_final, offloaded, ahead)

    def begin(self, bundle: Bundle, as_final: bool, offloaded: bool, ahead: bool = False) -> bool:
        """Have a reader bring the bundle. Return False where that has to wait for memory.

        as_final: the host casts. offloaded: the bundle does not stay on the device. ahead: nothing gives way.
        """
        pin = extent = None
        if offloaded and bundle.worth_writing_back:
            # The main stream fills the pin later, when there is no time to lock memory.
            self.pins.make_room(bundle, bundle.nbytes)
        elif offloaded:  # what stays on the device needs no pin, which those that are brought at each step would lack
            pin = self.pins.take(bundle, bundle.source_bytes, None)
        if pin is None:
            extent = self._staging_for(bundle.nbytes if as_final else bundle.source_bytes, ahead)
            if extent is None and ahead:
                return False
        self._readings[bundle] = Reading(self.readers, self.pins, self.staging, bundle, pin, extent, as_final)
        return True

    def follow(self, bundle: Bundle, start: Bundle, is_offloaded: Callable[[Bundle], bool]) -> None:
        """Have readers bring what is asked for after `bundle`, as far as the staging memory reaches.

        start: what comes before is on the device, or under way.
        """
        last = self._up_to or start
        for _ in range(MOST):
            following = last.successor
            if following is None or following is bundle or following.loan is not None:
                break
            if self._is_wanted(following) and not self._begin_sooner(following, is_offloaded):
                if self._forget(bundle):
                    continue
                break
            last = following
        self._up_to = last

    def _is_wanted(self, bundle: Bundle) -> bool:
        if bundle.views is not None or bundle in self.under_way or bundle in self._readings:
            return False
        return not self.pins.holds(bundle)

    def _begin_sooner(self, bundle: Bundle, is_offloaded: Callable[[Bundle], bool]) -> bool:
        """Have a bundle read ahead of its use. Return False where that has to wait."""
        # A reader that waited for a download would hold up those that wait for the reader.
        if len(self._readings) >= MOST or not bundle.has_come():
            return False
        if bundle.source_bytes + sum(reading.nbytes for reading in self._readings.values()) > self.staging.capacity:
            return False
        try:
            bundle.check_present()
            return self.begin(bundle, as_final=False, offloaded=is_offloaded(bundle), ahead=True)
        except (RuntimeError, MemoryError, SourceError):
            return False  # the request for this bundle itself will raise it

    def _staging_for(self, nbytes: int, ahead: bool) -> Extent | None:
        """Return an extent of the staging memory; None where there is none. ahead: nothing gives way."""
        extent = self.staging.take(nbytes)
        if ahead or extent is not None:
            return extent
        for last in [bundle for bundle, reading in reversed(self._readings.items()) if reading.extent is not None]:
            self._end(last)
            self._up_to = None
            extent = self.staging.take(nbytes)
            if extent is not None:
                return extent
        for loan in list(self.under_way.values()):
            if loan.reading is not None and loan.job is not None:
                with suppress(Exception):  # raised where its bundle is asked for
                    loan.job.wait()
                extent = self.staging.take(nbytes)
                if extent is not None:
                    return extent
        return None

    # -- what was begun in vain

    def doubt(self) -> None:
        """Note that the order was a wrong guess. What was read is kept while nothing else needs its memory."""
        self._doubted, self._up_to = True, None

    def _forget(self, bundle: Bundle) -> bool:
        """End what is not expected to follow the bundle, after a doubt. Say whether that has freed memory."""
        if not self._doubted:
            return False
        self._doubted = False
        wanted = chain(bundle)
        wrong = [other for other in self._readings if other not in wanted]
        for other in wrong:
            self._end(other)
        return bool(wrong)

    def pass_over(self, bundle: Bundle) -> None:
        """End what was to be used before `bundle`. The order is not what it was."""
        while bundle in self._readings and (first := next(iter(self._readings))) is not bundle:
            self._end(first)

    def end(self) -> None:
        """End all of them, whatever fails."""
        self._up_to = None
        with ExitStack() as stack:
            for bundle in reversed(self._readings):
                stack.callback(self._end, bundle)

    def _end(self, bundle: Bundle) -> None:
        self._readings.pop(bundle).end()


def chain(bundle: Bundle) -> Collection[Bundle]:
    """Return the bundle and those that are expected to follow it."""
    found, following = {bundle}, bundle.successor
    while following is not None and following not in found and len(found) < 2 * MOST:
        found.add(following)
        following = following.successor
    return found
