"""Models of other loaders as dynamic ones. What comes in stays usable as it is."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch

from ....ops.files.disk_map import SourceError
from ...attach import Unsupported
from ...policy import Policy
from ..compile.dynamic_models import refuse_compiled
from ..patcher import DynamicModelPatcher
from .loader_overrides import building

# What a patcher carries beside its model and its devices.
CARRIED = (
    "patches",
    "patches_uuid",
    "object_patches",
    "weight_wrapper_patches",
    "model_options",
    "force_cast_weights",
    "attachments",
    "additional_models",
    "callbacks",
    "wrappers",
    "injections",
    "hook_patches",
    "forced_hooks",
    "is_clip",
    "hook_mode",
    "cached_patcher_init",
)
# What a model's copy has of its own; configurations and the like are the same objects.
COPIED = (torch.nn.Module, torch.Tensor, dict, list, tuple, set, types.MethodType, functools.partial)
# What patchers keep on a model, and none of it concerns its copy.
OWN = ("spillway_state", "spillway_maps", "spillway_path", "dynamic_pins", "dynamic_vbars", "dynamic_patchers")
ADVICE = "Load it with one of the Spillway loaders instead, or leave it to its own loader."


def _loaded_again(patcher: Any, policy: Policy | None) -> DynamicModelPatcher | None:
    """The same model through its own loader, from its file; None where it has no way back to one."""
    factory = getattr(patcher, "cached_patcher_init", None)
    if not factory:
        return None
    with building(DynamicModelPatcher, policy):
        try:
            made = factory[0](*factory[1])
        except SourceError:  # a pickle, say: there is still the model in memory
            return None
    made = made[factory[2]] if len(factory) > 2 else made
    return made if isinstance(made, DynamicModelPatcher) else None


def _copied(patcher: Any) -> DynamicModelPatcher:
    """A copy of the model's structure that shares its tensors: no memory, and no module in common."""
    if patcher.is_dynamic():
        raise Unsupported(
            f"{type(patcher.model).__name__}: ComfyUI's own dynamic VRAM has mapped this model and its loader keeps no "
            f"way to load it again. {ADVICE}"
        )
    memo: dict[int, Any] = {}
    for name, tensor in [*patcher.model.named_parameters(), *patcher.model.named_buffers()]:
        original = patcher.backup[name].weight if name in patcher.backup else tensor
        plain = original.detach().to("cpu")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(plain, requires_grad=False) if is_parameter else plain
    for module in patcher.model.modules():
        for value in vars(module).values():
            if not isinstance(value, COPIED) and not hasattr(type(value), "__deepcopy__"):
                memo[id(value)] = value
    model = copy.deepcopy(patcher.model, memo)
    for name in OWN:
        model.__dict__.pop(name, None)
    if hasattr(model, "current_patcher"):
        model.current_patcher = None
    model.model_loaded_weight_memory = 0
    return DynamicModelPatcher(model, patcher.load_device, patcher.offload_device)


def dynamic_model(patcher: Any, policy: Policy | None = None) -> Any:
    """A patcher of the same model, patches and options, managed by Spillway.

    Raises Unsupported, with the reason, where it cannot be (a tensor class that cannot be laid out, a mapped model
    without a file).
    """
    if isinstance(patcher, DynamicModelPatcher):
        made = patcher.clone()
        if policy is not None:
            made.set_policy(policy)
        return made
    if not hasattr(patcher, "model") or not hasattr(patcher, "object_patches"):
        raise Unsupported(f"a {type(patcher).__name__} is no model patcher that Spillway knows. {ADVICE}")
    made = _loaded_again(patcher, policy) or _copied(patcher)
    made.policy = policy or Policy()
    carrier = patcher.clone()
    for name in CARRIED:
        if hasattr(carrier, name):
            setattr(made, name, getattr(carrier, name))
    # A part that was compiled is of the model that came in, and has that one's weights.
    patches = made.object_patches.items()
    made.object_patches = {name: patch for name, patch in patches if not refuse_compiled(made.model, name, patch)}
    _ = made.dynamic  # what cannot be dynamic is said here, not in the middle of a run
    return made


def dynamic_clip(clip: Any, policy: Policy | None = None) -> Any:
    """The same CLIP with a dynamic patcher."""
    made = clip.clone()
    made.patcher = dynamic_model(clip.patcher, policy)
    made.cond_stage_model = made.patcher.model
    return made


def dynamic_vae(vae: Any, policy: Policy | None = None) -> Any:
    """The same VAE with a dynamic patcher. Raises Unsupported for one that the core never offloads."""
    if getattr(vae, "disable_offload", False):
        raise Unsupported("this VAE is one that ComfyUI never offloads; connect it directly.")
    made = copy.copy(vae)
    made.patcher = dynamic_model(vae.patcher, policy)
    made.first_stage_model = made.patcher.model
    return made
