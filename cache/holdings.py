"""Who holds which memory, and what was made from what: the holdings of the output cache."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .measure import Block

# How many evicted entries are remembered, for what making their children again would cost.
MAX_GHOSTS = 4096


@dataclass(slots=True, eq=False)
class Entry:
    """What is known about one output. kind: the class of node that made it. seconds: it took to make.

    parents: the ids of the entries that it was made from. made, used: number of the prompt.
    """

    key: Hashable
    kind: str
    label: str
    seconds: float
    parents: tuple[int, ...]
    blocks: tuple[Hashable, ...]
    made: int
    used: int
    share: float = 0.0  # bytes of RAM that it holds, models aside; what others hold too is divided among them
    added: int = 0  # bytes of RAM that no other entry held when it was made
    hits: int = 0
    unfindable: bool = False  # its key is unlike itself: only the prompt that made it can find it
    lost: set[int] = field(default_factory=set)  # parents that have been evicted

    @property
    def number(self) -> int:
        """Its id for others: keys are large, and must not be kept by those that only refer to them."""
        return hash(self.key)


class Ghost(NamedTuple):
    """What is remembered of an evicted entry. ram: bytes that it added when it was made."""

    seconds: float
    parents: tuple[int, ...]
    ram: int


class Holdings:
    """Blocks and their holders, parents and children, and the ghosts of what was evicted."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, Entry] = {}
        self.blocks: dict[Hashable, Block] = {}
        self.holders: dict[Hashable, list[Entry]] = {}
        self.ghosts: OrderedDict[int, Ghost] = OrderedDict()
        self._children: defaultdict[int, set[Hashable]] = defaultdict(set)
        self._present: dict[int, Entry] = {}

    def add(self, entry: Entry, found: dict[Hashable, Block]) -> None:
        """Enter an entry and the blocks that it holds; sets its `added` and `lost`."""
        entry.added = sum(block.ram for key, block in found.items() if key not in self.blocks)
        for key, block in found.items():
            block = self.blocks.setdefault(key, block)
            holders = self.holders.setdefault(key, [])
            self._divide(block, holders, len(holders) + 1)
            holders.append(entry)
            if not block.is_model:
                entry.share += block.ram / len(holders)
        number = entry.number
        self.entries[entry.key] = entry
        self._present[number] = entry
        self.ghosts.pop(number, None)
        for child in self._children.get(number, ()):
            self.entries[child].lost.discard(number)
        for parent in entry.parents:
            self._children[parent].add(entry.key)
            if parent not in self._present and parent in self.ghosts:
                entry.lost.add(parent)

    def remove(self, entry: Entry) -> list[Hashable]:
        """Strike an entry out; returns the blocks that nobody holds any more."""
        self.entries.pop(entry.key, None)
        if self._present.get(entry.number) is entry:
            del self._present[entry.number]
        for parent in entry.parents:
            siblings = self._children.get(parent)
            if siblings is not None:
                siblings.discard(entry.key)
                if not siblings:
                    del self._children[parent]
        released = []
        for key in entry.blocks:
            holders = self.holders[key]
            holders.remove(entry)
            self._divide(self.blocks[key], holders, len(holders), before=len(holders) + 1)
            if not holders:
                del self.holders[key], self.blocks[key]
                released.append(key)
        return released

    def _divide(self, block: Block, holders: list[Entry], among: int, before: int | None = None) -> None:
        """Change the holders' shares of a block from a part of `before` (as many as they are) to a part of `among`."""
        if holders and not block.is_model:
            change = block.ram / among - block.ram / (before or len(holders))
            for holder in holders:
                holder.share += change

    def bury(self, entry: Entry) -> None:
        """Remember an entry that was evicted: its children are dearer from now on."""
        number = entry.number
        self.ghosts[number] = Ghost(entry.seconds, entry.parents, entry.added)
        while len(self.ghosts) > MAX_GHOSTS:
            self.ghosts.popitem(last=False)
        for child in self._children.get(number, ()):
            self.entries[child].lost.add(number)

    def lost_seconds(self, entry: Entry) -> float:
        """Seconds for the evicted ancestors that would have to be made again first."""
        seen: set[int] = set()
        pending, total = list(entry.lost), 0.0
        while pending:
            number = pending.pop()
            ghost = self.ghosts.get(number)
            if number in seen or ghost is None:
                continue
            seen.add(number)
            total += ghost.seconds
            pending.extend(parent for parent in ghost.parents if parent not in self._present)
        return total

    def groups(self) -> list[list[Entry]]:
        """Entries that share models, directly or through others."""
        found: list[dict[int, Entry]] = []
        for key, block in self.blocks.items():
            if not block.is_model:
                continue
            group = {id(entry): entry for entry in self.holders[key]}
            apart = []
            for other in found:
                if group.keys() & other.keys():
                    group = {**other, **group}
                else:
                    apart.append(other)
            found = [*apart, group]
        return [list(group.values()) for group in found]

    def ram_of_group(self, group: list[Entry]) -> float:
        """Bytes of RAM that go with all entries of a group."""
        members = {id(entry) for entry in group}
        total = 0.0
        for key in dict.fromkeys(key for entry in group for key in entry.blocks):
            holders = self.holders[key]
            total += self.blocks[key].ram * sum(id(holder) in members for holder in holders) / len(holders)
        return total

    def ram_alone(self, entry: Entry) -> int:
        """Bytes of RAM that only this entry holds."""
        return sum(self.blocks[key].ram for key in entry.blocks if len(self.holders[key]) == 1)

    def largest(self, count: int, prompt: int, protected: Set[Hashable]) -> list[dict[str, Any]]:
        """The entries that hold the most RAM, as plain data. Shared blocks count for each entry that holds them.

        prompt: the number of the running prompt, which ages are counted from. protected: blocks that never go.
        """
        sizes = [(sum(self.blocks[key].ram for key in entry.blocks), entry) for entry in self.entries.values()]
        sizes.sort(key=lambda pair: -pair[0])
        return [
            {
                "node": entry.kind,
                "id": entry.label,
                "ram_bytes": size,
                "seconds": round(entry.seconds, 3),
                "age_prompts": prompt - entry.used,
                "shared": any(len(self.holders[key]) > 1 for key in entry.blocks),
                "never_evict": not protected.isdisjoint(entry.blocks),
            }
            for size, entry in sizes[:count]
        ]


def never_equal(key: Any) -> bool:
    """Whether a key holds a NaN or another value that differs from itself, so that an equal key cannot be made."""
    pending = [key]
    while pending:
        value = pending.pop()
        if isinstance(value, tuple | frozenset | list):
            pending.extend(value)
        elif isinstance(value, float):
            if value != value:
                return True
        # The host stands a NaN in an object for what it cannot hash.
        elif not isinstance(value, str | int | bytes | type(None)) and isinstance(getattr(value, "value", 0), float):
            pending.append(value.value)
    return False
