"""What lay under a name when this process first gave it to a node: a node may keep that, whatever lies there later.

ComfyUI's Load LoRA keeps the file that it read last, by its path, and packs keep more. What such a node makes after the
file was replaced may be of the old one, and nobody can tell. Under the new content's name it would be found by all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import nodes

# As deep as this package lies in that of all nodes of ours.
OURS = __name__.rsplit(".", 3)[0]
MAX_NAMES = 10_000
DIGESTS = ("source", "data")  # which hold only where nothing has changed since this process began
INSIDE = 5  # where a stamp has its path below the folder that the name stands for; '' for a file itself

Name = tuple[str, str]


class FirstSeen:
    """The stamps of names, as they were when a node was first given them."""

    def __init__(self) -> None:
        self._first: dict[Name, Any] = {}
        self._passed: set[Name] = set()  # given to nodes while nobody looked at files
        self._all_passed = False

    def pass_by(self, names: Iterable[Name]) -> None:
        """Note names that a node is given while nobody looks at what lies there."""
        self._passed.update(name for name in names if name not in self._first)
        if len(self._passed) > MAX_NAMES:
            self.pass_all()

    def pass_all(self) -> None:
        """Note that nodes are given any names while nobody looks."""
        self._all_passed = True
        self._passed.clear()

    def look(self, found: dict[Name, Any], started: int) -> None:
        """Note what lies there before a node is given these names. started: when this process began, in ns of 1970."""
        for name, value in found.items():
            if name[0] in DIGESTS or value in ([], None) or name in self._first:
                continue
            if len(self._first) >= MAX_NAMES:
                self._first.clear()
                self.pass_all()
            unseen = self._all_passed or name in self._passed
            # Where nobody looked, only a file that is older than the process is surely the one that was given.
            self._first[name] = None if unseen and _changed_since(value, started) else value

    def replaced(self, found: dict[Name, Any]) -> str | None:
        """Name what is not what a node of this process was first given. None where all is."""
        for name, value in found.items():
            if name in self._first and _is_another(self._first[name], value):
                return name[1]
        return None


first_seen = FirstSeen()


def _is_another(first: Any, now: Any) -> bool:
    """Say whether anything that lay under a name is another now. What came beside it nobody can have kept."""
    if first is None or now is None:  # what it was, or is, nobody knows
        return True
    then, later = _by_place(first), _by_place(now)
    return any(later.get(inside) != stamps for inside, stamps in then.items())


def _by_place(places: Any) -> dict[Any, list[Any]]:
    """Sort stamps by the path within what the name stands for."""
    found: dict[Any, list[Any]] = {}
    for place in places:
        for stamp in place:
            found.setdefault(stamp[INSIDE], []).append(stamp)
    return found


def _changed_since(places: Any, started: int) -> bool:
    return any(max(stamp[1], stamp[3]) > started for place in places for stamp in place)


def reads_anew(class_type: str) -> bool:
    """Say whether a node reads its files whenever it runs.

    So do all of Spillway's, and those of ComfyUI that tell when their file is another one. Of others nobody knows.
    """
    kind = nodes.NODE_CLASS_MAPPINGS.get(class_type)
    if kind is None:
        return False
    if is_ours(kind):
        return True
    module = getattr(kind, "RELATIVE_PYTHON_MODULE", kind.__module__)
    if module != "nodes" and not module.startswith("comfy_extras."):
        return False
    return any({"IS_CHANGED", "fingerprint_inputs"} & set(vars(one)) for one in kind.__mro__ if _is_a_node(one))


def is_ours(kind: type) -> bool:
    """Say whether a class of nodes is one of Spillway's."""
    return kind.__module__.startswith(f"{OURS}.")


def _is_a_node(kind: type) -> bool:
    """Say whether a class is a node, and not what ComfyUI makes nodes of, which has all methods."""
    return not kind.__module__.startswith("comfy_api")
