"""Says which patches of a LoRA have another shape than the weight that they are for."""

from __future__ import annotations

import logging
import threading
from typing import Any

import comfy.lora
import comfy.utils
import torch


def misshapen(model: torch.nn.Module, patches: dict[Any, Any]) -> dict[Any, tuple[int, ...]]:
    """Return the keys of the patches that ComfyUI cannot apply for their shape, with the shape of the weight.

    ComfyUI's own arithmetic is asked, on tensors without memory, so every form of patch is covered and none is read.
    """
    found = {}
    with _Heard() as heard:
        for key, patch in patches.items():
            name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
            try:
                weight = torch.empty(comfy.utils.get_attr(model, name).shape, device="meta")
            except AttributeError:  # a scale that only the state dict of a quantised layer has
                continue
            heard.words.clear()
            try:
                comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weight, name)
            except (RuntimeError, ValueError, IndexError) as error:  # 'set' and parts of fused weights raise
                heard.words.append(str(error))
            # Some forms look at their numbers on the way, which a tensor without memory has not. Such shapes are right
            # so far.
            if heard.words and not any("meta tensor" in words for words in heard.words):
                found[key] = tuple(weight.shape)
    return found


class _Heard(logging.Filter):
    """Takes what this thread logs at the root. ComfyUI logs there that a patch cannot be applied, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread:
            return True
        if record.levelno >= logging.WARNING:
            self.words.append(record.getMessage())
        return False

    def __enter__(self) -> _Heard:
        logging.getLogger().addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeFilter(self)
