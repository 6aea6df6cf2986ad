"""Remembers what outputs were made from, as it was when each was made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from . import stamps
from .first_seen import first_seen, reads_anew
from .stamps import Stamps

MAX_REMEMBERED = 10_000


class StampBook:
    """The stamps of outputs by the number of their entry, also of those that were evicted.

    None stands for unknown: what was made of it is not worth keeping either.
    """

    def __init__(self) -> None:
        self._before: dict[str, Stamps] = {}
        self._known: OrderedDict[int, Stamps] = OrderedDict()
        self._told: dict[int, set[tuple[str, str]]] = {}  # what an output names, for those who read it

    def begin_prompt(self) -> None:
        """What was seen before the nodes of the last prompt ran is of no use."""
        self._before.clear()

    def begin(self, node_id: str, node: Mapping[str, Any], watched: bool) -> None:
        """A node is asked for, or about to run. watched: whether anything asks for stamps."""
        if not watched:
            first_seen.pass_by(stamps.names_of(node))
        elif node_id not in self._before:
            self._before[node_id] = stamps.stamps_of(node)
            first_seen.look(self._before[node_id], stamps.STARTED)

    def made(
        self, number: int, node_id: str, node: Mapping[str, Any], outputs: Any, parents: Iterable[int]
    ) -> str | None:
        """A node ran. Unknown where something changed while it did, or since what it was made from was made.

        Unknown too where the node may have kept a file that was replaced since. Returns the name of that file.
        """
        self.forget(number)
        found = stamps.stamps_of(node)
        if found != self._before.pop(node_id, None):
            return None
        given = dict(found)
        for parent in parents:
            theirs = self._known.get(parent)
            if theirs is None or any(found.get(name, value) != value for name, value in theirs.items()):
                return None
            found |= theirs
            given |= {name: theirs[name] for name in self._told.get(parent, ()) if name in theirs}
        replaced = None if reads_anew(node.get("class_type", "")) else first_seen.replaced(given)
        if replaced is not None:
            return replaced
        # A text that was put together may name files of its own, for those who read it.
        names = stamps.names_of({"inputs": outputs})
        found |= {name: value for name, value in stamps.looked_up(names - set(found), stamps.look).items()}
        if all(value is not None for value in found.values()):
            self.remember(number, found, outputs)
        return None

    def made_unwatched(self, number: int, outputs: Any) -> None:
        """A node ran, and nothing asks for stamps."""
        self.forget(number)
        first_seen.pass_by(stamps.names_of({"inputs": outputs}))

    def remember(self, number: int, made_from: Stamps, outputs: Any) -> None:
        """The stamps of an output that is known otherwise."""
        self._known[number] = made_from
        self._known.move_to_end(number)
        told = self._told[number] = stamps.names_of({"inputs": outputs}) & set(made_from)
        first_seen.look({name: made_from[name] for name in told}, stamps.STARTED)
        while len(self._known) > MAX_REMEMBERED:
            self._told.pop(self._known.popitem(last=False)[0], None)

    def forget(self, number: int) -> None:
        """An output that is now another one."""
        self._known.pop(number, None)
        self._told.pop(number, None)

    def of(self, number: int) -> Stamps | None:
        """The stamps of an output; None where they are unknown."""
        return self._known.get(number)
