"""Follows writes into the weights of a model: bundles whose weights were written into are made again."""

from __future__ import annotations

from collections.abc import Iterable

from ..ops.ledger import Ledger, in_words
from ..ops.lending.bundle import Bundle
from ..ops.lending.caster import Caster


def follow_writes(bundles: Iterable[Bundle], caster: Caster) -> bool:
    """Make writes count from now on, also where a copy of the weight is kept. Returns whether there were any.

    A lent bundle is left for the next call.
    """
    written = [bundle for bundle in bundles if bundle.count_writes() != bundle.writes and bundle.loan is None]
    if written:
        caster.cancel_prefetch()  # prefetched bundles hold the values from before the write
    for bundle in written:
        caster.follow_write(bundle)
    return bool(written)


def note_kept(bundles: Iterable[Bundle], ledger: Ledger) -> None:
    """Log the bytes of the model that stay in memory because the file no longer has them."""
    ranges = [file_range for bundle in bundles for param in bundle.params for file_range in param.where]
    kept = sum(nbytes for disk_map, offset, nbytes in ranges if disk_map.written(offset, nbytes))
    if kept:
        ledger.decide(f"{in_words(kept)} of weights were written into after they were read: they stay in memory.")
