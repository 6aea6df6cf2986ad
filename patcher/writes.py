"""Weights that somebody writes into while the model has them: what was made of them is made again."""

from __future__ import annotations

from collections.abc import Iterable

from ..ops.ledger import Ledger, in_words
from ..ops.lending.bundle import Bundle
from ..ops.lending.caster import Caster


def follow_writes(bundles: Iterable[Bundle], caster: Caster) -> bool:
    """Let writes count from now on, also where a copy of the weight is kept. Returns whether there were any.

    A bundle that is lent is looked at the next time.
    """
    written = [bundle for bundle in bundles if bundle.count_writes() != bundle.writes and bundle.loan is None]
    if written:
        caster.cancel_prefetch()  # what was started ahead holds what was there before
    for bundle in written:
        bundle.writes = bundle.count_writes()
        caster.pins.drop(bundle)
        bundle.invalidate()
    return bool(written)


def note_kept(bundles: Iterable[Bundle], ledger: Ledger) -> None:
    """Say how much of the model is in memory because its file no longer has it."""
    places = [place for bundle in bundles for param in bundle.params for place in param.where]
    kept = sum(nbytes for disk_map, offset, nbytes in places if disk_map.written(offset, nbytes))
    if kept:
        ledger.decide(f"{in_words(kept)} of weights were written into after they were read: they stay in memory.")
