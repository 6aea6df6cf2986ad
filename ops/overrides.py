"""Attributes set on objects of others, and put back as they were."""

from __future__ import annotations

from typing import Any

# None is a value that an attribute can have.
MISSING = object()


class SavedAttributes:
    """Sets attributes and remembers what they were, also where they did not exist."""

    def __init__(self) -> None:
        self._saved: dict[tuple[int, str], tuple[Any, Any]] = {}

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute; `restore` puts the present state back."""
        before = getattr(target, "__dict__", {}).get(name, MISSING)
        self._saved.setdefault((id(target), name), (target, before))
        setattr(target, name, value)

    def restore(self) -> None:
        """Put every attribute back as it was before its first `set`."""
        for (_, name), (target, before) in self._saved.items():
            if before is not MISSING:
                setattr(target, name, before)
            elif name in getattr(target, "__dict__", {}):
                delattr(target, name)
        self._saved.clear()
