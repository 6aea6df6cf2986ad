"""The base of the pack's exceptions. ComfyUI shows users the module of an exception's class."""

from __future__ import annotations

from typing import Any

NAME = "spillway"


class SpillwayError:
    """Stands before the built-in class among the bases of each exception of the pack.

    ComfyUI names a custom node's modules by the path of their folder. Without this, an error's type would tell others
    where the user's files lie.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__module__ = NAME
