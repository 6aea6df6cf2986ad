"""ComfyUI's list of loaded models, kept so that what goes through it cannot fail."""

from __future__ import annotations

import comfy.model_management


def forget_unloaded() -> None:
    """Take entries off the list that ComfyUI can do nothing with: their model was unloaded by hand, or is gone.

    `LoadedModel.model_unload` leaves an entry without `real_model` and `model_finalizer`. Whatever goes through the
    list calls both, so one such entry makes every later load and unload raise. It stops the finalizer of other models
    as well, and their entries then stay without a model.
    """
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [entry for entry in loaded if entry.real_model is not None and entry.real_model() is not None]
