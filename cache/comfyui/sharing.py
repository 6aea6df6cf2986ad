"""Finds outputs in the shared store, and offers them to it, for the nodes of one prompt after the other.

The name of an entry is made of the node's key, which holds the inputs of all nodes that it is made from, and of the
CONTENT of what they name. So members agree whose files lie elsewhere. What a name cannot hold, such as files that a
text names which was put together, is stamped in the entry, and must hold for whoever finds it.
"""

from __future__ import annotations

import asyncio
import logging
import ntpath
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import nodes
from comfy_execution.graph_utils import is_link

from ...ops.files.file_state import MARK as FILE_STATE
from ...ops.ledger import Ledger, in_words
from ..disk_format import NotStorable, describe
from ..disk_tier import name_of
from ..disk_writer import DiskWriter, Job
from ..store.shared_store import SharedStore
from . import stamps
from .disk import made_by
from .stamp_book import StampBook
from .stamps import Stamps, portable

# What is shared: outputs that are tensors, and that take long. Models are not.
KINDS = {"IMAGE", "LATENT", "CONDITIONING", "MASK", "AUDIO", "VIDEO"}
# What was not there is asked for again after this time, as another member may have made it.
ABSENT_SECONDS = 10.0
# Stamps of an entry that are looked at, which takes time.
MOST_STAMPS = 2000


class Outputs(Protocol):
    """What is asked of the output cache."""

    stamps: StampBook
    dynprompt: Any

    def _key(self, node_id: str) -> Any: ...

    def _node(self, node_id: str) -> dict[str, Any]: ...

    def is_here(self, node_id: str) -> bool: ...


@dataclass
class Entry:
    """An entry by its name. made_from: the stamps that the name stands for, as they are on this machine."""

    name: str
    made_from: Stamps


@dataclass
class Asked:
    """What was asked for one prompt. looked: what lies under names, which holds for the prompt: it was queued before.

    absent: when an entry was found to be missing. first: nodes that were asked for once. given: what nodes were given,
    as (seconds that it took to make, its stamps).
    """

    looked: dict[tuple[str, str], Any] = field(default_factory=dict)
    named: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    entries: dict[str, Entry | None] = field(default_factory=dict)
    absent: dict[str, float] = field(default_factory=dict)
    first: set[str] = field(default_factory=set)
    plan: asyncio.Task[set[str]] | None = None
    given: dict[str, tuple[float, Stamps]] = field(default_factory=dict)


class Sharing:
    """The shared store as one output cache uses it. store: None while it is off."""

    def __init__(self, cache: Outputs, room: Callable[[], int]) -> None:
        """Work for `cache`. room: tells how much RAM copies may take that wait to be written."""
        self.cache = cache
        self.room = room
        self.store: SharedStore | None = None
        self.ledger = Ledger("shared store")
        self.writer = DiskWriter(self.ledger, "shared store")
        self._asked = Asked()

    def begin_prompt(self, store: SharedStore | None) -> None:
        """Begin a prompt. What was asked for the last one is forgotten."""
        self._asked = Asked()
        self.store = store
        if store is not None:
            store.begin_prompt()

    def as_dict(self) -> dict[str, Any] | None:
        """Return figures, ready for JSON. None while it is off."""
        if self.store is None:
            return None
        waiting = {"writing_bytes": self.writer.nbytes, "dropped": self.writer.dropped}
        return self.store.as_dict() | waiting | {"decisions": list(self.ledger.decisions)[-20:]}

    def log_prompt(self) -> None:
        """Say in the debug log what the store has done so far."""
        if self.store is not None:
            self.ledger.decide(in_line(self.as_dict() or {}), level=logging.DEBUG)

    # -- names

    def may_share(self, node_id: str) -> bool:
        """Say whether a node's outputs are of a kind that is shared.

        Output nodes do something on the machine that they run on, such as saving a file, and so run on each.
        """
        kind = nodes.NODE_CLASS_MAPPINGS.get(self.cache._node(node_id).get("class_type"))
        if self.store is None or self._is_output(node_id) or getattr(kind, "NOT_IDEMPOTENT", False):
            return False
        return bool(KINDS & set(map(str, getattr(kind, "RETURN_TYPES", None) or ())))

    def _made_of(self, node_id: str) -> Iterator[str]:
        """Name a node and all that it is made from."""
        pending, seen = [node_id], {node_id}
        while pending:
            one = pending.pop()
            yield one
            fresh = [parent for parent in self._parents(one) if parent not in seen]
            seen.update(fresh)
            pending += fresh

    def _parents(self, node_id: str) -> list[str]:
        links = self.cache._node(node_id).get("inputs", {}).values()
        return list(dict.fromkeys(link[0] for link in links if is_link(link)))

    def _names(self, node_id: str) -> set[tuple[str, str]]:
        """Give all that a node's name stands for: what its inputs name, and those of all that it is made from."""
        named = self._asked.named
        found: set[tuple[str, str]] = set()
        for one in self._made_of(node_id):
            if one not in named:
                named[one] = stamps.names_of(self.cache._node(one))
            found |= named[one]
        return found

    def _look(self, kind: str, name: str) -> Any:
        looked = self._asked.looked
        if (kind, name) not in looked:
            looked[kind, name] = stamps.look(kind, name)
        return looked[kind, name]

    def _entry(self, node_id: str) -> Entry | None:
        """Give the entry that a node's outputs would be found in. None where it has none that others could know."""
        entries = self._asked.entries
        if node_id not in entries:
            entries[node_id] = self._entry_of(node_id, stamps.looked_up(self._names(node_id), self._look))
        return entries[node_id]

    def _entry_of(self, node_id: str, made_from: Stamps) -> Entry | None:
        key = self.cache._key(node_id)
        if self.store is None or key is None or any(value is None for value in made_from.values()):
            return None
        plain = shared_name(key, made_from)
        return Entry(self.store.name(plain), made_from) if plain is not None else None

    # -- finding

    async def find(self, node_id: str) -> list[Any] | None:
        """Find a node's outputs. None where they are to be made."""
        asked, store = self._asked, self.store
        entry = self._entry(node_id)
        if store is None or entry is None:
            return None
        if node_id not in asked.first:
            # The executor asks for all nodes when a prompt begins. Only what nothing found is made from is not read.
            asked.first.add(node_id)
            if asked.plan is None:
                asked.plan = asyncio.ensure_future(self._plan())
            if node_id not in await asyncio.shield(asked.plan):
                return None
        elif not await self._is_there(store, entry):
            return None
        loaded = await store.load(entry.name)
        if loaded is None:
            return None
        outputs, seconds, record = loaded
        also = self._checked(node_id, outputs, record)
        if also is None:
            store.refuse(entry.name, "it is not what this node gives, or was made from other files", damaged=False)
            return None
        asked.given[node_id] = seconds, entry.made_from | also
        return list(outputs)

    def given(self, node_id: str) -> tuple[float, Stamps] | None:
        """Take (seconds to make, stamps) of what a node was given. None where it was given nothing from here."""
        return self._asked.given.pop(node_id, None)

    async def _plan(self) -> set[str]:
        """Choose what to read: from the output nodes upwards, what is there first. All that it is made from is not."""
        store = self.store
        prompt = list(self.cache.dynprompt.all_node_ids())
        known = {one: self._entry(one) for one in prompt if self.may_share(one) and not self.cache.is_here(one)}
        entries = {one: entry for one, entry in known.items() if entry is not None}
        if store is None or not entries:
            return set()
        answers = await asyncio.gather(*(self._is_there(store, entry) for entry in entries.values()))
        there = {one for one, answer in zip(entries, answers, strict=True) if answer}
        read_by = {parent for one in prompt for parent in self._parents(one)}
        chosen, seen = set(), set()
        pending = [one for one in prompt if one not in read_by or self._is_output(one)]
        while pending:
            one = pending.pop()
            if one in seen:
                continue
            seen.add(one)
            if one in there:
                chosen.add(one)
            elif not self.cache.is_here(one):
                pending += self._parents(one)
        return chosen

    def _is_output(self, node_id: str) -> bool:
        kind = nodes.NODE_CLASS_MAPPINGS.get(self.cache._node(node_id).get("class_type"))
        return bool(getattr(kind, "OUTPUT_NODE", False))

    async def _is_there(self, store: SharedStore, entry: Entry) -> bool:
        absent = self._asked.absent
        if time.monotonic() - absent.get(entry.name, -ABSENT_SECONDS) < ABSENT_SECONDS:
            return False
        if await store.there(entry.name):
            return True
        absent[entry.name] = time.monotonic()
        store.counts.missed += 1
        return False

    def _checked(self, node_id: str, outputs: Any, record: Any) -> Stamps | None:
        """Give what an entry was made from beside what its name says. None where that does not hold here."""
        kind = nodes.NODE_CLASS_MAPPINGS.get(self.cache._node(node_id).get("class_type"))
        count = len(getattr(kind, "RETURN_TYPES", ()))
        if not isinstance(outputs, list) or not all(isinstance(items, list) for items in outputs):
            return None
        if len(outputs) != count or not isinstance(record, list) or len(record) > MOST_STAMPS:
            return None
        found: Stamps = {}
        for one in record:
            if not isinstance(one, list) or len(one) != 3 or not all(isinstance(text, str) for text in one[:2]):
                return None
            name, value = (one[0], one[1]), one[2]
            if one[0] not in stamps.LOOKS or portable(self._look(*name)) != value:
                return None
            found[name] = self._look(*name)
        return found

    # -- offering

    def offer(self, node_id: str, value: Any, seconds: float) -> None:
        """Queue what a node has just made, if it is worth it.

        It is copied now. A node that writes into its inputs would else change what is written, and what is written
        would be found by all.
        """
        store = self.store
        if store is None or value.ui or seconds < store.options.least_seconds or not self.may_share(node_id):
            return
        kind = self.cache._node(node_id).get("class_type", "")
        made_from = self.cache.stamps.of(hash(self.cache._key(node_id)))
        # A file that ComfyUI maps may have been written in place since its loader ran, and then was read as it is now.
        if made_from is None or any(stamps.look(*name) != value for name, value in made_from.items()):
            self.ledger.decide_once(
                f"{kind} is not written: what it was made from was not watched then, has changed, or is at an address",
                level=logging.INFO,
            )
            return
        names = self._names(node_id)
        entry = self._entry_of(node_id, {name: value for name, value in made_from.items() if name in names})
        if entry is None:
            return
        try:
            found = describe(value.outputs)
        except NotStorable:
            return
        nbytes = found.nbytes
        if nbytes > self.room() or self.writer.nbytes + nbytes > store.waiting_cap:
            self.writer.dropped += 1
            self.ledger.decide(f"{kind} is not written: a copy of {in_words(nbytes)} has no room beside what waits")
            return
        found.tensors[:] = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in found.tensors]
        also = [[*name, portable(value)] for name, value in sorted(made_from.items()) if name not in names]
        self.writer.put(Job(store, entry.name, found, seconds, kind, also, nbytes))


def shared_name(key: Any, made_from: Stamps) -> str | None:
    """Name an entry by a key and the content of what it was made from. None for keys that others cannot make.

    A path that is written out names the same file elsewhere. Its content and its last part stand for it.
    """

    def content(text: str) -> Any:
        if text.startswith(FILE_STATE):  # of a file that a loader's input names
            return [FILE_STATE]
        places = made_from.get(("file", text))
        return [ntpath.basename(text), portable(places)] if places and _is_whole_path(text) else None

    said = [
        [*name, portable(value)]
        for name, value in sorted(made_from.items())
        if not (name[0] == "file" and value and _is_whole_path(name[1]))
    ]
    return name_of(key, ["shared", *made_by(), said], content)


def _is_whole_path(text: str) -> bool:
    return os.path.isabs(text) or ntpath.isabs(text)


def in_line(told: dict[str, Any]) -> str:
    """Word the figures of a store in one line."""
    words = (
        f"{told['address']}: found {told['found']} outputs ({told['saved_seconds']:.0f} s saved), "
        f"missed {told['missed']}, wrote {told['written']} ({in_words(told['written_bytes'])}), "
        f"waited {told['waited_seconds']:.1f} s in this run"
    )
    more = {"refused": told["refused"], "dropped": told["dropped"], "evicted": told["evicted"], "late": told["late"]}
    words += "".join(f", {count} {name}" for name, count in more.items() if count)
    return f"{words}; {told['state']}" if told["state"] else words
