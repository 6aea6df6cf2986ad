"""Guesses the order of a first step: of blocks with the same names but for their number, from the first of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .bundle import Bundle

_FIRST_NUMBER = re.compile(r"\d+")


def kind_and_number(bundle: Bundle) -> tuple[str, int]:
    """Return the name with # in the place of its first number, and that number; -1 where there is none."""
    found = _FIRST_NUMBER.search(bundle.name)
    if found is None:
        return bundle.name, -1
    return f"{bundle.name[: found.start()]}#{bundle.name[found.end() :]}", int(found.group())


class OrderGuess:
    """The successors of bundles that have not run yet, by what followed others of their kind."""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self._places = {bundle: kind_and_number(bundle) for bundle in bundles}
        self._bundles = {place: bundle for bundle, place in self._places.items()}
        self._ran: set[Bundle] = set()  # whose successors are known
        self._known: set[tuple[str, str, int]] = set()

    def confirm(self, before: Bundle) -> None:
        """Note that a bundle was followed by its successor."""
        self._ran.add(before)

    def learn(self, before: Bundle, bundle: Bundle) -> None:
        """Note that one bundle followed another, which was not expected."""
        self._ran.add(before)
        if before not in self._places or bundle not in self._places:
            return
        (kind, number), (following, next_number) = self._places[before], self._places[bundle]
        step = next_number - number
        if number < 0 or next_number < 0 or (kind, following, step) in self._known:
            return
        self._known.add((kind, following, step))
        later = number + 1
        while (other := self._bundles.get((kind, later))) is not None:
            if other not in self._ran:
                other.successor = self._bundles.get((following, later + step), other.successor)
            later += 1
