"""Has a node fail in which a mapped file was cut short while something read it: what it made is worth nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ...ops.files.lost_pages import lost_so_far, raise_since


def install() -> bool:
    """Look at each node from now on. Returns False where this ComfyUI's executor is not known. Twice is once."""
    execution: Any = sys.modules.get("execution")
    original: Callable[..., Any] | None = getattr(execution, "get_output_data", None)
    if original is None or hasattr(original, "spillway_lost_files"):
        return original is not None

    @functools.wraps(original)
    async def checked(*args: Any, **kwargs: Any) -> Any:
        before = lost_so_far()
        made = await original(*args, **kwargs)
        raise_since(before)
        return made

    checked.spillway_lost_files = True  # type: ignore[attr-defined]
    execution.get_output_data = checked
    return True
