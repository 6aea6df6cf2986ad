"""Learns what ComfyUI expects of each load of models, which it tells only to the function that loads them.

ComfyUI takes memory from a dynamic model only for a model that is not. For another dynamic one it trusts in
comfy-aimdo, which sees every allocation. A software VBAR does not, so it has to be told.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher

from ...ops.never_raises import never_raises
from ...ops.ram.arena_log import arenas_logged
from ..dynamic_model import DynamicModel, models
from . import sizes
from .model_state import state_of

# By how much more than a batch's estimate ComfyUI wants free before it computes conditions in one batch.
BATCH_MARGIN = 1.5


@dataclass(frozen=True)
class Load:
    """A load under way. nbytes: what its computation is said to need. samples: whether ComfyUI will batch by it."""

    nbytes: int
    samples: bool


_here = threading.local()


def current_load() -> Load | None:
    """Give the load that this thread is in, or None."""
    return getattr(_here, "load", None)


def expected_bytes(memory_required: float) -> int:
    """Count the bytes that ComfyUI keeps free beside the weights for an estimate of its own."""
    management = comfy.model_management
    needed = max(management.minimum_inference_memory(), memory_required + management.extra_reserved_memory())
    return int(min(needed, 1 << 60))


def needed_bytes(memory_required: float, samples: bool) -> int:
    """Count the bytes that a load leaves free. samples: for a sampler, which batches by the memory that is free."""
    needed = expected_bytes(memory_required)
    if samples and not hasattr(ModelPatcher, "get_free_memory"):  # it compares with what is free as it stands
        needed = int(needed * BATCH_MARGIN)
    return needed


def install() -> None:
    """Listen to ComfyUI's loads. A second call does nothing."""
    original = comfy.model_management.load_models_gpu
    if hasattr(original, "spillway_original"):
        return

    @functools.wraps(original)
    def load_models_gpu(
        models: Any,
        memory_required: float = 0,
        force_patch_weights: bool = False,
        minimum_memory_required: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        samples = minimum_memory_required is not None
        needed = needed_bytes(memory_required, samples)
        before, _here.load = current_load(), Load(needed, samples)
        try:
            release_after_use(but=models)
            _leave_other_devices(models)
            _make_room(models, needed)
            with arenas_logged(f"loading {len(models)} models"):
                return original(models, memory_required, force_patch_weights, minimum_memory_required, *args, **kwargs)
        finally:
            _here.load = before

    load_models_gpu.spillway_original = original  # type: ignore[attr-defined]
    sizes.install()
    comfy.model_management.load_models_gpu = load_models_gpu


def _engines(patchers: Any) -> list[DynamicModel]:
    """List the engines of those patchers that have one."""
    states = [state_of(getattr(patcher, "model", None)) for patcher in patchers]
    return [state.dynamic for state in states if state is not None and state.dynamic is not None]


def _leave_other_devices(patchers: Any) -> None:
    """Take a classic model off the device where a clone of one of `patchers` runs it, if that is another device.

    ComfyUI lets the weights stay there, and takes the model for loaded: an op would meet a weight of another device.
    """
    for entry in list(comfy.model_management.current_loaded_models):
        loaded = entry.model
        if loaded is None or loaded.is_dynamic():
            continue
        if any(patcher.is_clone(loaded) and patcher.load_device != loaded.load_device for patcher in patchers):
            loaded.detach()


def _make_room(patchers: Any, needed: int) -> None:
    """Let software VBARs give way to dynamic models of ComfyUI's, which it makes no room for."""
    foreign = [patcher for patcher in patchers if patcher.is_dynamic() and state_of(patcher.model) is None]
    for device in {patcher.load_device for patcher in foreign}:
        sizes = [p.model_size() - p.loaded_size() for p in foreign if p.load_device == device]
        short = needed + sum(sizes) - comfy.model_management.get_free_memory(device)
        for model in sorted(models, key=lambda model: (model.rank, model.last_used)):
            if short > 0 and model.device == device and model.must_be_told and model.policy.keep != "always":
                short -= model.free(int(short))


# -- the end of a use, where ComfyUI does not say so


def is_tracked() -> bool:
    """Say whether ComfyUI tells a model when the prompt that used it has ended."""
    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    return hasattr(dynamic, "set_in_use_by_current_prompt")


def release_after_use(but: Any = ()) -> None:
    """Release the models that are to be freed after use, other than those of the patchers `but`.

    For versions of ComfyUI that say nothing. A model's use ends there when others are loaded, and with the prompt.
    """
    if is_tracked():
        return
    in_use = _engines(but)
    for model in list(models):
        if model.policy.keep == "free after use" and model not in in_use and not model.is_running:
            model.release()


def install_prompt_end() -> None:
    """Release models when a prompt ends, where ComfyUI does not say so. A second call does nothing."""
    executor = getattr(sys.modules.get("execution"), "PromptExecutor", None)
    if is_tracked() or executor is None or hasattr(executor.execute, "spillway_original"):
        return
    original: Callable[..., Any] = executor.execute

    @functools.wraps(original)
    def execute(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:
            never_raises("releasing models after a prompt")(release_after_use)()

    execute.spillway_original = original  # type: ignore[attr-defined]
    executor.execute = execute
