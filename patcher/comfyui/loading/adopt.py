"""Makes dynamic models of those that other loaders made. What comes in stays usable as it is."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Sequence
from typing import Any

import torch

from ....ops.files.disk_map import SourceError
from ...attach import Unsupported
from ...policy import Policy
from ..compile.dynamic_models import refuse_compiled
from ..model_state import source_of
from ..patcher import DynamicModelPatcher
from .ggml import comfyui_classes, compute_dtype, is_ggml, own_form
from .load import CHECKPOINT_DTYPES, TEXT_DTYPES, quantise_loaded
from .loader_overrides import building

# Attributes that a patcher carries beside its model and its devices.
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
# Classes of which a model's copy has objects of its own. Configurations and the like are shared.
COPIED = (torch.nn.Module, torch.Tensor, dict, list, tuple, set, types.MethodType, functools.partial)
# Attributes that patchers keep on a model. None of them concerns its copy.
OWN = ("spillway_state", "spillway_maps", "spillway_path", "dynamic_pins", "dynamic_vbars", "dynamic_patchers")
ADVICE = "Load it with one of the Spillway loaders instead, or leave it to its own loader."


def _loaded_again(patcher: Any, policy: Policy | None) -> DynamicModelPatcher | None:
    """Load the model again through its own loader, from its file. None where it has no way back to one."""
    factory = getattr(patcher, "cached_patcher_init", None)
    if not factory:
        return None
    with building(DynamicModelPatcher, policy):
        try:
            loaded = factory[0](*factory[1])
        except SourceError:  # a pickle, say. The model in memory is still there to be copied.
            return None
    loaded = loaded[factory[2]] if len(factory) > 2 else loaded
    return loaded if isinstance(loaded, DynamicModelPatcher) else None


def _copied(patcher: Any) -> DynamicModelPatcher:
    """Copy the model's structure. The copy shares its tensors, so it takes no memory, and has no module in common."""
    if patcher.is_dynamic() and not isinstance(patcher, DynamicModelPatcher):
        raise Unsupported(
            f"{type(patcher.model).__name__}: ComfyUI's own dynamic VRAM has mapped this model and its loader keeps no "
            f"way to load it again. {ADVICE}"
        )
    # Not even copied: a copy of a buffer of comfy-aimdo's would give the same memory back once more.
    memo: dict[int, Any] = {id(value): value for name, value in vars(patcher.model).items() if name in OWN}
    modules, computes_in = dict(patcher.model.named_modules()), compute_dtype(patcher.model)
    for name, tensor in [*patcher.model.named_parameters(), *patcher.model.named_buffers()]:
        shared = source_of(patcher, name, tensor).to("cpu")
        if is_ggml(shared):
            shared = own_form(shared, modules[name.rpartition(".")[0]], computes_in)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(shared, requires_grad=False) if is_parameter else shared
    for module in patcher.model.modules():
        for value in vars(module).values():
            if not isinstance(value, COPIED) and not hasattr(type(value), "__deepcopy__"):
                memo[id(value)] = value
    model = copy.deepcopy(patcher.model, memo)
    comfyui_classes(model)
    for name in OWN:
        model.__dict__.pop(name, None)
    if hasattr(model, "current_patcher"):
        model.current_patcher = None
    model.model_loaded_weight_memory = 0
    return DynamicModelPatcher(model, patcher.load_device, patcher.offload_device)


def dynamic_model(patcher: Any, policy: Policy | None = None) -> Any:
    """Make a patcher that Spillway manages, of the same model, patches and options.

    Raises Unsupported, with the reason, where that cannot be: a tensor class that cannot be laid out, or a mapped model
    without a file.
    """
    if isinstance(patcher, DynamicModelPatcher):
        clone = patcher.clone()
        if policy is not None:
            clone.set_policy(policy)
        return clone
    return separate_model(patcher, policy)


def separate_model(patcher: Any, policy: Policy | None = None) -> Any:
    """Do so with a model of its own, also of one that Spillway manages already. That one is not changed."""
    if isinstance(patcher, DynamicModelPatcher) and policy is None:
        policy = patcher.policy
    if not hasattr(patcher, "model") or not hasattr(patcher, "object_patches"):
        raise Unsupported(f"a {type(patcher).__name__} is no model patcher that Spillway knows. {ADVICE}")
    ours = _loaded_again(patcher, policy) or _copied(patcher)
    ours.policy = policy or Policy()
    carrier = patcher.clone()
    for name in CARRIED:
        if hasattr(carrier, name):
            setattr(ours, name, getattr(carrier, name))
    # A compiled part belongs to the model that came in, and would compute with that model's weights.
    patches = ours.object_patches.items()
    ours.object_patches = {name: patch for name, patch in patches if not refuse_compiled(ours.model, name, patch)}
    _ = ours.dynamic  # makes the engine: a model that cannot be dynamic is refused here, not in the middle of a run
    return ours


def dynamic_clip(clip: Any, policy: Policy | None = None) -> Any:
    """Copy a CLIP and give the copy a dynamic patcher."""
    copied = clip.clone()
    copied.patcher = dynamic_model(clip.patcher, policy)
    copied.cond_stage_model = copied.patcher.model
    return copied


def quantised_model(
    patcher: Any, wanted: str, leave_out: Sequence[str] = (), policy: Policy | None = None
) -> tuple[Any, str]:
    """Make a patcher that Spillway manages, of a model of its own that is quantised. Returns it, and what was decided.

    wanted: one of CHECKPOINT_DTYPES. leave_out: more parts of layers' names that keep their dtype. Raises Unsupported
    as dynamic_model does.
    """
    ours = separate_model(patcher, policy)
    return ours, quantise_loaded(ours, wanted, CHECKPOINT_DTYPES, leave_out)


def quantised_clip(
    clip: Any, wanted: str, leave_out: Sequence[str] = (), policy: Policy | None = None
) -> tuple[Any, str]:
    """Do so with a CLIP. wanted: one of TEXT_DTYPES."""
    copied = clip.clone()
    copied.patcher = separate_model(clip.patcher, policy)
    words = quantise_loaded(copied.patcher, wanted, TEXT_DTYPES, leave_out)
    copied.cond_stage_model = copied.patcher.model
    return copied, words


def dynamic_vae(vae: Any, policy: Policy | None = None) -> Any:
    """Copy a VAE and give the copy a dynamic patcher. Raises Unsupported for a VAE that ComfyUI never offloads."""
    if getattr(vae, "disable_offload", False):
        raise Unsupported("this VAE is one that ComfyUI never offloads; connect it directly.")
    copied = copy.copy(vae)
    copied.patcher = dynamic_model(vae.patcher, policy)
    copied.first_stage_model = copied.patcher.model
    return copied
