"""Lists what the output cache could evict, with what that would free and what would be lost."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

from .choose import Candidates
from .holdings import Entry, Holdings


@dataclass(slots=True)
class Kind:
    """Counts how many outputs a class of node made, and how many of them a later prompt used."""

    made: int = 0
    reused: int = 0
    ram: int = 0  # bytes that its last output added to all that was held

    @property
    def chance(self) -> float:
        """Estimate how likely one of its outputs is to be used again."""
        return (self.reused + 1) / (self.made + 1) if self.made > self.reused else 1.0


@dataclass(frozen=True)
class Expendable:
    """Knows what is held, and how likely outputs of each kind of node are to be used again."""

    holdings: Holdings
    kinds: Mapping[str, Kind]
    entry_bytes: int

    def candidates(self, prompt: int, stay: set[int], needed: Collection[Hashable], *, current: bool) -> Candidates:
        """List what could go. Entries that share a model are one candidate, as none of them frees it alone.

        stay: ids of entries that may not go. needed: keys that the running prompt will still read. current: whether
        entries of that prompt may go.
        """
        groups = self.holdings.groups()
        apart = {id(entry) for group in groups for entry in group} | stay
        # Columns are filled one by one, as there may be ten thousand entries.
        single = [entry for entry in self.holdings.entries.values() if id(entry) not in apart]
        if not current:
            single = [entry for entry in single if entry.used < prompt]
        chances = {kind: record.chance for kind, record in self.kinds.items()}
        candidates = Candidates(
            [(entry,) for entry in single],
            [entry.share + self.entry_bytes for entry in single],
            [entry.seconds if not entry.lost else self.seconds(entry) for entry in single],
            [prompt - entry.used for entry in single],
            [1.0 if entry.hits else chances[entry.kind] for entry in single],
            [entry.key in needed for entry in single] if needed else [False] * len(single),
        )
        for group in groups:
            self._add_group(candidates, group, prompt, stay, needed, current)
        return candidates

    def _add_group(
        self,
        candidates: Candidates,
        group: list[Entry],
        prompt: int,
        stay: set[int],
        needed: Collection[Hashable],
        current: bool,
    ) -> None:
        latest = max(entry.used for entry in group)
        if (current or latest < prompt) and not any(id(entry) in stay for entry in group):
            freed = self.holdings.ram_of_group(group) + self.entry_bytes * len(group)
            # Outputs that only earlier prompts made with the model would not be made again. Their seconds are no loss.
            seconds = sum(self.seconds(entry) for entry in group if entry.used == latest)
            wanted = any(entry.key in needed for entry in group)
            candidates.add(group, freed, seconds, prompt - latest, needed=wanted)
        for entry in group:
            # The patches of a LoRA that is no longer used can go while the model that carries them stays.
            if entry.used < latest and id(entry) not in stay:
                freed = self.holdings.ram_alone(entry) + self.entry_bytes
                candidates.add((entry,), freed, entry.seconds, prompt - entry.used)

    def seconds(self, entry: Entry) -> float:
        """Return the seconds that making an entry again would take, with those of its parents that are lost."""
        return entry.seconds + (self.holdings.lost_seconds(entry) if entry.lost else 0.0)
