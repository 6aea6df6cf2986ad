"""What the names of layers say of them, in the architectures that there are."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

# Parts of the names of layers that multiply one vector for each image, of its time and its pooled text.
VECTOR = ("*mod", "*modulation*", "adaln*", "adaLN*", "time_*", "vector_in", "guidance_in")


def has_part(name: str, patterns: Iterable[str]) -> bool:
    """Say whether a part of a layer's name, between its dots, matches one of the patterns (shell wildcards)."""
    parts = name.split(".")
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in parts)
