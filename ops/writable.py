"""Says which texts can be written. JSON and names of files bring some that cannot: halves of a character."""

from __future__ import annotations


def is_writable(text: str) -> bool:
    """Say whether a text can be written as UTF-8, to a file or to ComfyUI's log."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
