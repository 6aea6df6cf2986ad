"""Turns 'manage every loader' on and off between prompts, by the user's setting or by what a prompt asks for."""

from __future__ import annotations

import functools
import gc
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..cache.comfyui.settings import manages_loaders
from ..ops.never_raises import never_raises
from ..ops.ram.garbage import collect_garbage
from ..patcher.comfyui.loading import managed

log = logging.getLogger("spillway")

# In a prompt's extra_data: true or false, in place of the setting and for this prompt alone.
ASKS = "spillway_manage"

# Gives what surrounds a prompt, by its executor, its id and its extra_data; None for most.
around: Callable[[Any, str, dict[str, Any]], AbstractContextManager[Any] | None] | None = None


def heed(wanted: bool, executor: Any = None) -> None:
    """Turn it on or off. Where that is a change, the executor's outputs go: they hold models of the other kind."""
    if wanted == managed.is_on():
        return
    (managed.turn_on if wanted else managed.turn_off)()
    words = "on: ComfyUI's loaders and those of other packs build Spillway models" if wanted else "off"
    log.info("[Spillway] manage every loader: %s", words)
    if executor is not None:
        drop_outputs(executor)
        log.info("[Spillway] cached outputs were dropped, as their models were loaded the other way")
        kept = kept_by_others()
        if kept:
            log.warning(
                "[Spillway] manage every loader: %s stay as they were loaded, as another pack keeps them in a cache of "
                "its own. Empty that one, or restart ComfyUI, to have them loaded the other way.",
                ", ".join(kept),
            )


def kept_by_others() -> list[str]:
    """Name the models that are still there although no output holds them."""
    collect_garbage()
    alive = [one for one in gc.get_objects() if issubclass(type(one), ModelPatcher)]
    return sorted({type(patcher.model).__name__ for patcher in alive if isinstance(patcher.model, torch.nn.Module)})


def drop_outputs(executor: Any) -> None:
    """Empty an executor's caches. What it says of its last prompt stays."""
    said, success = executor.status_messages, executor.success
    executor.reset()
    executor.status_messages, executor.success = said, success


def wanted_by(extra_data: Any) -> bool:
    """Say what holds for a prompt."""
    asked = extra_data.get(ASKS) if isinstance(extra_data, dict) else None
    return asked if isinstance(asked, bool) else manages_loaders()


def install() -> bool:
    """Look at each prompt from now on. Returns False where this ComfyUI's executor is not known. Twice is once."""
    heed(manages_loaders())
    executor = getattr(sys.modules.get("execution"), "PromptExecutor", None)
    if executor is None or getattr(executor.execute, "spillway_manage", False):
        return executor is not None
    original: Callable[..., Any] = executor.execute

    @functools.wraps(original)
    def execute(self: Any, prompt: Any, prompt_id: Any, extra_data: Any = None, *args: Any, **kwargs: Any) -> Any:
        extra_data = {} if extra_data is None else extra_data
        prepare = never_raises("turning 'manage every loader' on or off")
        prepare(lambda: heed(wanted_by(extra_data), self))()
        found = None if around is None else prepare(around)(self, prompt_id, extra_data)
        try:
            with nullcontext() if found is None else found:
                return original(self, prompt, prompt_id, extra_data, *args, **kwargs)
        finally:
            managed.forget()
            # What a prompt asked for itself ends with it.
            prepare(lambda: heed(manages_loaders(), self) if ASKS in extra_data else None)()

    execute.spillway_manage = True  # type: ignore[attr-defined]
    executor.execute = execute
    return True
