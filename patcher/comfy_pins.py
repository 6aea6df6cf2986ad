"""The pin books that newer cores keep on every dynamic model. Ours are the engine's, so these stay empty."""

from __future__ import annotations

from typing import Any

PIN_SUBSETS = ("weights", "patches", "weights-loaded", "patches-loaded")


def pin_state() -> dict[str, Any]:
    """In the shape that the core reads: a buffer, its stack, its split, its bytes and its buckets for every subset."""
    state: dict[str, Any] = {name: (None, [], [-1], [0], [0], {}) for name in PIN_SUBSETS}
    return {**state, "hostbufs_initialized": True, "failed": False, "active": False, "current_prompt": False}
