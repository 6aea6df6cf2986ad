"""What follows when a VBAR takes the memory of a bundle back."""

from __future__ import annotations

from collections.abc import Callable

from ..ops.ledger import Ledger
from ..ops.lending.bundle import Bundle


def on_eviction(bundle: Bundle, ledger: Ledger) -> Callable[[], None]:
    """For the VBAR to call: the bundle's views are void; one that is used where it lies gives its file's pages back."""

    def evicted() -> None:
        ledger.counters.evictions += 1
        bundle.views = None
        if bundle.in_place:
            bundle.drop_pages()

    return evicted
