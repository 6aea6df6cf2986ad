"""Asks what ComfyUI is doing: whether a node runs, and which models it has on its list of loaded ones."""

from __future__ import annotations

import comfy.model_management
from comfy_execution.utils import get_executing_context


def in_a_node() -> bool:
    """Say whether this code runs in a node's execution, whose errors its author must see."""
    return get_executing_context() is not None


def drop_unloaded() -> None:
    """Take entries off the list whose model was unloaded by hand or is gone.

    `LoadedModel.model_unload` leaves an entry without `real_model` and `model_finalizer`. Every pass over the list
    calls both, so one such entry makes every later load and unload raise. It stops the finalizer of other models as
    well, and their entries then stay without a model.
    """
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if entry.real_model is not None and entry.real_model() is not None]
