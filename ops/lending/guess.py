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
    """The successors of bundles that have not run yet, by what followed others of their kind.

    Blocks of another name that hold layers of the same names are guessed alike, until they themselves have run.
    """

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self._places = {bundle: kind_and_number(bundle) for bundle in bundles}
        self._bundles = {place: bundle for bundle, place in self._places.items()}
        self._ran: set[Bundle] = set()  # whose successors are known
        self._known: set[tuple[str, str, int]] = set()
        self._seen: set[str] = set()  # kinds of which one has run
        self._numbers: dict[str, list[int]] = {}
        for kind, number in self._bundles:
            self._numbers.setdefault(kind, []).append(number)
        self._blocks = dict.fromkeys(kind.partition("#")[0] for kind in self._numbers)

    def confirm(self, before: Bundle) -> None:
        """Note that a bundle was followed by its successor."""
        self._ran.add(before)
        self._seen.add(self._places[before][0] if before in self._places else "")

    def learn(self, before: Bundle, bundle: Bundle) -> None:
        """Note that one bundle followed another, which was not expected."""
        self.confirm(before)
        if before not in self._places or bundle not in self._places:
            return
        (kind, number), (following, next_number) = self._places[before], self._places[bundle]
        step = next_number - number
        if number < 0 or next_number < 0 or (kind, following, step) in self._known:
            return
        self._known.add((kind, following, step))
        self._follows(kind, following, step, (other for other in self._numbers[kind] if other > number))
        (block, _, layer), (next_block, _, next_layer) = kind.partition("#"), following.partition("#")
        for like in self._blocks if block == next_block else ():
            other = f"{like}#{layer}"
            if other in self._numbers and other not in self._seen:
                self._follows(other, f"{like}#{next_layer}", step, self._numbers[other])

    def _follows(self, kind: str, following: str, step: int, numbers: Iterable[int]) -> None:
        """Guess that bundles of a kind with these numbers are followed by those of another, if they are there."""
        for number in numbers:
            other = self._bundles[kind, number]
            if other not in self._ran:
                other.successor = self._bundles.get((following, number + step), other.successor)
