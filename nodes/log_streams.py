"""Lets any text be written to ComfyUI's log.

ComfyUI logs the error of a node where nothing catches what that raises. An error may name what is in a file, such as
half of a character, or a character that the log's encoding lacks. That would end the thread that runs prompts.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any


def install() -> None:
    """Write what the log's encoding does not have as its number. A second call changes nothing."""
    for stream in _streams():
        with suppress(Exception):  # of a stream that is closed, or of another pack's
            if stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")


def _streams() -> list[Any]:
    """List the streams that logs go to. Other packs put their own before ComfyUI's, which those write to."""
    logger = sys.modules.get("app.logger")
    theirs = [getattr(logger, f"{name}_interceptor", None) for name in ("stdout", "stderr")]
    return [sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__, *theirs]
