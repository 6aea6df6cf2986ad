"""Keeps in a JSON file in which order the layers of a model ran, so that a later first step need not guess it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..ops.lending.bundle import Bundle
from ..ops.never_raises import never_raises
from .json_record import read_record, write_record

MOST = 64  # models; the one that was noted longest ago goes first


@never_raises("reading in which order layers ran", lambda *_: None)
def read(path: Path | None, bundles: Sequence[Bundle]) -> list[Bundle] | None:
    """Return the bundles in the order in which they ran in another process; None where the file does not know.

    bundles: as they are registered. Those that did not run come last.
    """
    places = _all(path).get(structure(bundles))
    if places is None or len(set(places)) != len(places) or not all(0 <= place < len(bundles) for place in places):
        return None
    ran = [bundles[place] for place in places]
    return list(dict.fromkeys([*ran, *bundles]))


@never_raises("noting in which order layers ran", lambda *_: None)
def write(path: Path | None, bundles: Sequence[Bundle], order: Sequence[Bundle]) -> None:
    """Note an order, where the file says another one or none."""
    if path is None:
        return
    place = {bundle: number for number, bundle in enumerate(bundles)}
    known, key, places = _all(path), structure(bundles), [place[bundle] for bundle in order]
    if known.pop(key, None) == places:
        return
    kept = dict(list(known.items())[1 - MOST :])
    write_record(path, "orders", {**kept, key: places})


def structure(bundles: Sequence[Bundle]) -> str:
    """Name a model by its layers. Whatever else differs, they run in the same order."""
    return hashlib.sha256("\n".join(bundle.name for bundle in bundles).encode()).hexdigest()[:32]


def _all(path: Path | None) -> dict[str, list[int]]:
    """Return what the file says."""
    return {key: places for key, places in read_record(path, "orders").items() if _is_order(places)}


def _is_order(places: object) -> bool:
    return isinstance(places, list) and all(type(place) is int for place in places)
