"""Asks what ComfyUI is doing, whether a node runs or is to stop, and takes models off their devices by its list."""

from __future__ import annotations

import functools
import threading
from typing import Any

import comfy.model_management
from comfy_execution.utils import get_executing_context

from ...ops.files.coming_file import patience
from .. import dynamic_model as dynamic


def in_a_node() -> bool:
    """Say whether this code runs in a node's execution, whose errors its author must see."""
    return get_executing_context() is not None


def _interrupt() -> BaseException | None:
    """Return ComfyUI's interrupt where the user has asked for it. The next prompt begins without."""
    asked = comfy.model_management.processing_interrupted()
    return comfy.model_management.InterruptProcessingException() if asked else None


patience.interrupt = _interrupt


# After a prompt, ComfyUI's worker unloads all models where `POST /free` has asked for it, and holds no lock meanwhile.
# Two threads in there take entries off one list: the IndexError of the second would end the worker for good.
_unloading = threading.RLock()


def _one_at_a_time() -> None:
    """Let one thread at a time unload all models. A second call does nothing."""
    original = comfy.model_management.unload_all_models
    if hasattr(original, "spillway_original"):
        return

    @functools.wraps(original)
    def unload_all_models(*args: Any, **kwargs: Any) -> Any:
        with _unloading:
            drop_unloaded()
            # A model that only a cycle holds may go while it is unloaded, and ComfyUI asks for its name afterwards.
            held = [entry.model for entry in comfy.model_management.current_loaded_models]
            try:
                return original(*args, **kwargs)
            finally:
                held.clear()

    unload_all_models.spillway_original = original  # type: ignore[attr-defined]
    comfy.model_management.unload_all_models = unload_all_models


def drop_unloaded() -> None:
    """Take entries off the list whose model was unloaded by hand or is gone.

    `LoadedModel.model_unload` leaves an entry without `real_model` and `model_finalizer`. Every pass over the list
    calls both, so one such entry makes every later load and unload raise. It stops the finalizer of other models as
    well, and their entries then stay without a model.
    """
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if entry.real_model is not None and entry.real_model() is not None]


_one_at_a_time()


def free_models() -> None:
    """Take all models off their devices. Holds none of them afterwards."""
    comfy.model_management.unload_all_models()
    for model in list(dynamic.models):
        model.free()


def free_pins() -> None:
    """Free the pins of all models. Holds none of them afterwards."""
    for model in list(dynamic.models):
        model.free_pins()
