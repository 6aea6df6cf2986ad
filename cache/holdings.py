"""Records which entries of the output cache hold which memory, and which outputs each was made from."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .measure import Block

# Evicted entries that are remembered. Making their children again would cost their seconds too.
MAX_GHOSTS = 4096


@dataclass(slots=True, eq=False)
class Entry:
    """All that is known about one output.

    kind: the class of node that made it. label: that node's id. seconds: the time that the node took. parents: numbers
    of the entries that it was made from. blocks: keys of the memory that it holds. made, used: numbers of prompts.
    """

    key: Hashable
    kind: str
    label: str
    seconds: float
    parents: tuple[int, ...]
    blocks: tuple[Hashable, ...]
    made: int
    used: int
    share: float = 0.0  # bytes of RAM that it holds, without models; a block of several holders is divided among them
    added: int = 0  # bytes of RAM that no other entry held when it was made
    hits: int = 0  # later prompts that used it
    unfindable: bool = False  # its key never equals another, so only the prompt that made it can find it
    lost: set[int] = field(default_factory=set)  # numbers of parents that have been evicted

    @property
    def number(self) -> int:
        """Names the entry to others. A key is large, and a reference to it would keep it after the entry is gone."""
        return hash(self.key)


class Ghost(NamedTuple):
    """An evicted entry, as far as it is remembered. ram: bytes that it added when it was made."""

    seconds: float
    parents: tuple[int, ...]
    ram: int


class Holdings:
    """Blocks with their holders, entries with their children, and ghosts of evicted entries."""

    def __init__(self) -> None:
        self.entries: dict[Hashable, Entry] = {}
        self.blocks: dict[Hashable, Block] = {}
        self.holders: dict[Hashable, list[Entry]] = {}
        self.ghosts: OrderedDict[int, Ghost] = OrderedDict()
        self._children: defaultdict[int, set[Hashable]] = defaultdict(set)
        self._present: dict[int, Entry] = {}

    def add(self, entry: Entry, held: dict[Hashable, Block]) -> None:
        """Enter an entry and the blocks that it holds. Sets its `added`, `share` and `lost`."""
        entry.added = sum(block.ram for key, block in held.items() if key not in self.blocks)
        for key, block in held.items():
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
        """Strike an entry out. Returns the keys of blocks that no entry holds any more."""
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
        """Change each holder's share of a block from 1 / `before` (by default their number) to 1 / `among`."""
        if holders and not block.is_model:
            change = block.ram / among - block.ram / (before or len(holders))
            for holder in holders:
                holder.share += change

    def bury(self, entry: Entry) -> None:
        """Remember an evicted entry. Making one of its children again now costs its seconds too."""
        number = entry.number
        self.ghosts[number] = Ghost(entry.seconds, entry.parents, entry.added)
        while len(self.ghosts) > MAX_GHOSTS:
            self.ghosts.popitem(last=False)
        for child in self._children.get(number, ()):
            self.entries[child].lost.add(number)

    def lost_seconds(self, entry: Entry) -> float:
        """Add up the seconds of evicted ancestors, which would have to be made again first."""
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
        """Group the entries that share models, directly or through other entries."""
        groups: list[dict[int, Entry]] = []
        for key, block in self.blocks.items():
            if not block.is_model:
                continue
            group = {id(entry): entry for entry in self.holders[key]}
            apart = []
            for other in groups:
                if group.keys() & other.keys():
                    group = {**other, **group}
                else:
                    apart.append(other)
            groups = [*apart, group]
        return [list(group.values()) for group in groups]

    def ram_of_group(self, group: list[Entry]) -> float:
        """Add up the RAM that would go with all entries of a group, in bytes."""
        members = {id(entry) for entry in group}
        total = 0.0
        for key in dict.fromkeys(key for entry in group for key in entry.blocks):
            holders = self.holders[key]
            total += self.blocks[key].ram * sum(id(holder) in members for holder in holders) / len(holders)
        return total

    def ram_alone(self, entry: Entry) -> int:
        """Add up the RAM that only this entry holds, in bytes."""
        return sum(self.blocks[key].ram for key in entry.blocks if len(self.holders[key]) == 1)

    def bytes_on(self, device: str, entry: Entry) -> float:
        """Count the bytes of tensors on a device that would go with the entry. Of shared ones it has its part.

        Models count none, as they give way by themselves.
        """
        return sum(
            self.blocks[key].vram / len(self.holders[key])
            for key in entry.blocks
            if isinstance(key, tuple) and key[:2] == ("storage", device)
        )

    def largest(self, count: int, prompt: int, protected: Set[Hashable]) -> list[dict[str, Any]]:
        """List the entries that hold the most RAM, ready for JSON. A shared block counts for each entry that holds it.

        prompt: the number of the running prompt. protected: keys of blocks that are never evicted.
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
    """Say whether a key holds a NaN or another value that differs from itself. No later key can equal such a key."""
    pending = [key]
    while pending:
        value = pending.pop()
        if isinstance(value, tuple | frozenset | list):
            pending.extend(value)
        elif isinstance(value, float):
            if value != value:
                return True
        # ComfyUI puts an object with a NaN in the place of each value that it cannot hash.
        elif not isinstance(value, str | int | bytes | type(None)) and isinstance(getattr(value, "value", 0), float):
            pending.append(value.value)
    return False
