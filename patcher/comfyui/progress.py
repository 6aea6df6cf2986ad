"""ComfyUI's progress bar."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils


class Progress:
    """Shows how much of something is done, and raises ComfyUI's interrupt once the user asks for it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)
