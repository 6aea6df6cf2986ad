"""Attaches the patches of a patcher to the engine, and sets ComfyUI's modules up for weights that are lent."""

from __future__ import annotations

import logging

import torch
from comfy.model_patcher import ModelPatcher

from ...ops.gguf.weight import GgufWeight, stays_quantised
from ...ops.lending.param import Param
from ...ops.lending.table import Table
from ...ops.quantisation import Quantisation
from ..dynamic_model import DynamicModel
from .first_use import as_it_is, multiplies_wrongly
from .model_state import ModelState
from .patches.int8_lora import FEWEST_MERGED, branch_of, place_loras
from .patches.rows import TablePatch
from .patches.weight_patch import WeightPatch, idle_function
from .quantise.layouts import Form
from .quantise.weight import form_of

HookPatches = dict[str, list[tuple]]


def attach_patches(
    patcher: ModelPatcher,
    state: ModelState,
    dynamic: DynamicModel,
    hooked: HookPatches,
    *,
    had_hooks: bool,
    int8_lora: str,
) -> None:
    """Patch the engine's weights with what the patcher carries, and with `hooked` on top.

    Only bundles whose patches differ from those attached are made again. had_hooks: hooks were attached before.
    int8_lora: as in Policy.
    """
    patches = {}
    forms: dict[str, Quantisation | Form] = {}
    for key in {*patcher.patches, *hooked}:
        bundle = dynamic.by_key.get(key)
        if bundle is not None:
            param = next(param for param in bundle.params if param.key == key)
            form = param.quantisation or form_in_file(patcher, dynamic, param, int8_lora)
            if form is not None:
                forms[key] = form
            patch = WeightPatch(
                patcher.model,
                key,
                param.original,
                param.final.dtype,
                patcher.patches.get(key, []),
                hooked.get(key, []),
                rounded=param.quantisation is None,
            )
            if isinstance(bundle, Table):
                patch = TablePatch(patch, param.final)
            beside = branch_of(patch) if isinstance(param.source, GgufWeight) and param.quantisation is None else None
            patches[key] = patch if beside is None else beside
    if forms and not hooked:
        chosen = {key: patches[key] for key in forms}
        patches.update(place_loras(chosen, forms, int8_lora, dynamic.device, dynamic.ledger))
    changed = [
        key
        for key in {*patches, *state.patches}
        if key not in patches or not patches[key].same_as(state.patches.get(key))
    ]
    attached = {key: patch if key in changed else state.patches[key] for key, patch in patches.items()}
    if changed:
        touched = dynamic.set_patches(attached, changed)
        dynamic.ledger.counters.patch_changes += 1
        if hooked or had_hooks:  # between two conditions: at every step
            if hooked:
                dynamic.ledger.decide_once(f"hooks change {len(hooked)} weights while sampling", level=logging.INFO)
        else:
            dynamic.ledger.decide(f"{len(attached)} weights patched, {touched} bundles touched by the change")
    state.patches = attached
    set_weight_functions(patcher, state, dynamic)


def form_in_file(patcher: ModelPatcher, dynamic: DynamicModel, param: Param, int8_lora: str) -> Form | None:
    """Return the form that a file has a weight in, where a LoRA may stay beside it. None for other weights.

    ComfyUI merges into weights of 8 bits and rounds them again, and so do we unless the policy says 'side branch'.
    """
    if param.attr != "weight" or int8_lora == "merge":
        return None
    module = param.owner
    plainly = getattr(module, "_full_precision_mm", True) or patcher.force_cast_weights
    form = form_of(module, not plainly and not multiplies_wrongly(module, dynamic.first_use()))
    return form if form is not None and (form.bits < FEWEST_MERGED or int8_lora == "side branch") else None


def set_weight_functions(patcher: ModelPatcher, state: ModelState, dynamic: DynamicModel) -> None:
    """Give ComfyUI's op classes their weight functions.

    A weight is patched when an op gets it, and meets only wrappers. A quantised one that is read while it is idle must
    still be patched.
    """
    verdict = dynamic.first_use()
    for bundle in dynamic.bundles:
        bundle.lent_attributes = []
    for bundle in dynamic.bundles:
        for param in bundle.params:
            module, name = param.owner, f"{param.attr}_function"
            ours = param.quantisation is not None or getattr(state.patches.get(param.key), "form", None) is not None
            if ours and getattr(module, "layout_type", None) is not None:
                # ComfyUI's op would quantise the input for a weight in the file's format, and ours does so itself.
                bundle.lent_attributes.append((module, "layout_type", module.layout_type, None))
            if not hasattr(module, "comfy_cast_weights") or not hasattr(module, name):
                continue
            wrappers = list(patcher.weight_wrapper_patches.get(param.key, []))
            if param.attr == "weight" and not ours and multiplies_wrongly(module, verdict):
                wrappers.append(as_it_is)
            if param.key in state.patches and stays_quantised(param.source):
                idle = [idle_function(param.key, {param.key: state.patches[param.key].all_patches}), *wrappers]
                bundle.lent_attributes.append((module, name, idle, wrappers))
                state.attributes.set(module, name, idle)
            elif getattr(module, name) != wrappers:
                state.attributes.set(module, name, wrappers)


def cast_in_ops(patcher: ModelPatcher, state: ModelState, dynamic: DynamicModel) -> None:
    """Have ComfyUI's ops cast what they are lent to the input's dtype, as they do for ComfyUI's own dynamic models.

    The cost of an offloaded bundle includes that cast. Diffusion models say which dtype they compute in, text encoders
    by an object patch. An embedding looks up rows first, so it casts hardly anything.
    """
    computes_in = patcher.object_patches.get("manual_cast_dtype", getattr(patcher.model, "manual_cast_dtype", None))
    for bundle in dynamic.bundles:
        for param in bundle.params:
            casts = hasattr(param.owner, "comfy_cast_weights") and not isinstance(param.owner, torch.nn.Embedding)
            param.op_dtype = computes_in if casts else None
    for module in patcher.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            if not module.comfy_cast_weights:
                state.attributes.set(module, "comfy_cast_weights", True)
            if getattr(module, "comfy_force_cast_weights", False) != patcher.force_cast_weights:
                state.attributes.set(module, "comfy_force_cast_weights", patcher.force_cast_weights)
