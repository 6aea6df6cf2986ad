"""What to evict: the least loss for the bytes that are short."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

# What a candidate is worth falls by this factor with each prompt that did not use it.
GROWTH = 1.3
# A candidate that the running prompt used is likely to be used by the next one too.
CURRENT = 4.0
# Seconds that making even the cheapest output again is taken to cost.
LEAST_SECONDS = 0.01


@dataclass(slots=True)
class Candidates:
    """What could go, column by column. entries: those that would go together. freed: bytes.

    seconds: to make them again. age: prompts since the last use. chance: how likely they are to be used again, as
    others of their kind were. needed: the running prompt still waits to read them.
    """

    entries: list[Sequence[Any]] = field(default_factory=list)
    freed: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    age: list[int] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    needed: list[bool] = field(default_factory=list)

    def add(
        self,
        entries: Sequence[Any],
        freed: float,
        seconds: float,
        age: int = 1,
        chance: float = 1.0,
        needed: bool = False,
    ) -> None:
        """One more candidate."""
        self.entries.append(entries)
        self.freed.append(freed)
        self.seconds.append(seconds)
        self.age.append(age)
        self.chance.append(chance)
        self.needed.append(needed)

    def worth(self) -> Any:
        """Array: what would be lost with each."""
        age = numpy.asarray(self.age, dtype=float)
        worth = (numpy.asarray(self.seconds) + LEAST_SECONDS) * numpy.asarray(self.chance) * GROWTH**-age
        return numpy.where(age == 0, worth * CURRENT, worth)


def choose(candidates: Candidates, short: float) -> list[int]:
    """The places of those to evict so that `short` bytes are freed, the most expendable first.

    The OOM score is the bytes that help over what is lost: what is freed beyond the shortage helps nobody. What the
    running prompt still needs goes only when all the rest is not enough. Everything that frees anything is chosen
    where even that is not enough.
    """
    freed, worth = numpy.asarray(candidates.freed, dtype=float), candidates.worth()
    needed = numpy.asarray(candidates.needed, dtype=bool)
    chosen: list[int] = []
    for group in (~needed, needed):
        if short > 0:
            found = _greedy(numpy.flatnonzero(group & (freed > 0)), freed, worth, short)
            chosen += found
            short -= float(freed[found].sum())
    return chosen


def _greedy(places: Any, freed: Any, worth: Any, short: float) -> list[int]:
    scores = numpy.minimum(freed[places], short) / worth[places]
    # A score can only fall as the shortage shrinks, so one that still leads when it is computed again is the best.
    heap = list(zip((-scores).tolist(), places.tolist(), strict=True))
    heapq.heapify(heap)
    chosen: list[int] = []
    left = short
    while heap and left > 0:
        told, place = heap[0]
        score = -min(float(freed[place]), left) / float(worth[place])
        if score > told:
            heapq.heapreplace(heap, (score, place))
            if heap[0][1] != place:
                continue
        heapq.heappop(heap)
        chosen.append(place)
        left -= float(freed[place])
    return _without_the_needless(chosen, freed, worth, -left)


def _without_the_needless(chosen: list[int], freed: Any, worth: Any, surplus: float) -> list[int]:
    """A large one chosen last may free so much that some of the small ones before it can stay: the dearest first."""
    spared = set()
    for place in sorted(chosen, key=lambda place: -worth[place]) if surplus > 0 else ():
        if freed[place] <= surplus:
            surplus -= float(freed[place])
            spared.add(place)
    return [place for place in chosen if place not in spared]
