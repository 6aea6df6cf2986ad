"""Decides how the weights of a model that was just loaded are quantised, and says why."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import comfy.model_management

from ....ops.device.backend import backend_for
from ....ops.gather import tensor_bytes
from ....ops.ledger import in_words
from ....ops.ram.available import recent_ram
from ...first_use.check import first_use
from ...headroom import headroom_bytes
from ...quantised_layers import TEXT_ENCODER
from ..first_use import record_file
from ..model_state import memory_figures
from ..patcher import DynamicModelPatcher
from .formats import FORMATS
from .int8 import INT8, INT8_AUTO, OWN_INT8, choose_int8, noted
from .layers import KitchenLayers, chosen, rule_of

DEFAULT, AUTO = "default", "auto"


def quantise_model(patcher: DynamicModelPatcher, wanted: str, leave_out: Sequence[str] = ()) -> str:
    """Have a model's layers quantised as they are brought. Returns what was decided, in words.

    wanted: a name in FORMATS, 'int8', 'int8_auto', or 'auto' for the most exact that fits. leave_out: more parts of
    layers' names that keep their dtype. The model must be the patcher's own, with nothing that uses it yet.
    """
    patcher.state.close()
    reason = ""
    if wanted == AUTO:
        wanted, reason = most_exact(patcher, leave_out)
        if wanted == DEFAULT:
            return noted(patcher, reason)
    if wanted in (INT8, INT8_AUTO):
        words = choose_int8(patcher, wanted, leave_out)
        return words if not reason else noted(patcher, reason)
    return _choose_kitchen(patcher, wanted, leave_out, reason)


def _choose_kitchen(patcher: DynamicModelPatcher, wanted: str, leave_out: Sequence[str], reason: str) -> str:
    layers = kitchen_layers(patcher, wanted, leave_out)
    before, count, saved = patcher.model_size(), 0, 0
    for _, weight, form in chosen(patcher.model, layers):
        count += 1
        saved += tensor_bytes(weight) - form.nbytes(tuple(weight.shape))  # type: ignore[attr-defined]
    if not count:
        words = f"{wanted} was asked for, but {layers.architecture} has no layers for it: loaded as it is"
        return noted(patcher, words, logging.WARNING)
    patcher.state.quantise = layers
    patcher.size = before - saved  # the size that ComfyUI makes room for
    words = f"{count} layers are quantised to {wanted} as they are loaded: {in_words(before)} become "
    words += in_words(patcher.size)
    if reason:
        words += f". {reason}"
    if not layers.multiplies:
        whose = (
            "ComfyUI multiplies text encoders in floating point"
            if is_text_encoder(patcher)
            else (f"ComfyUI does not multiply in it on {patcher.load_device}")
        )
        words += f". {whose}, so each weight is dequantised where it is used: that saves memory, and no time"
    return noted(patcher, words)


def kitchen_layers(patcher: DynamicModelPatcher, wanted: str, leave_out: Sequence[str] = ()) -> KitchenLayers:
    """Return the choice of layers for a format, on the patcher's device."""
    if wanted not in FORMATS:
        raise ValueError(f"weight format '{wanted}' is not one of {', '.join([INT8, INT8_AUTO, *FORMATS, AUTO])}.")
    architecture, prefix = rule_of(patcher.model)
    known = FORMATS[wanted]
    multiplies = not is_text_encoder(patcher) and known.multiplies_on(patcher.load_device, _verdict(patcher))
    return KitchenLayers(known, architecture, prefix, leave_out, multiplies)


def is_text_encoder(patcher: Any) -> bool:
    """Say whether a patcher's model is one. ComfyUI dequantises the weights of those."""
    return rule_of(patcher.model)[0] == TEXT_ENCODER


def most_exact(patcher: DynamicModelPatcher, leave_out: Sequence[str] = ()) -> tuple[str, str]:
    """Return the most exact of the formats with which all weights fit, or the smallest, and why.

    Where ComfyUI multiplies in none of them on the device, all count that it can dequantise.
    """
    room, whose = room_for_weights(patcher)
    before = patcher.model_size()
    if before <= room:
        return (
            DEFAULT,
            f"auto: the weights stay as they are, for their {in_words(before)} fit in the {room_words(room, whose)}",
        )
    on_cpu = patcher.load_device.type == "cpu" and not is_text_encoder(patcher)
    sizes: dict[str, int] = {}
    for name in FORMATS:
        layers = kitchen_layers(patcher, name, leave_out)
        if layers.multiplies or is_text_encoder(patcher):
            saved = sum(
                tensor_bytes(weight) - form.nbytes(tuple(weight.shape))  # type: ignore[attr-defined]
                for _, weight, form in chosen(patcher.model, layers)
            )
            sizes[OWN_INT8 if on_cpu and layers.known.algorithm == "int8_tensorwise" else name] = before - saved
    sizes = {name: size for name, size in sizes.items() if size < before}
    if not sizes:
        return DEFAULT, "auto: the weights stay as they are, for no format makes them smaller here"
    too_large = [f"{in_words(before)} as they are"]
    for name, size in sizes.items():
        if size <= room:
            return name, (
                f"auto: {name} is the most exact with which the weights fit in the {room_words(room, whose)}; "
                f"they take {in_words(size)}, and {', '.join(too_large)}"
            )
        too_large.append(f"{in_words(size)} in {name}")
    smallest = min(sizes, key=sizes.__getitem__)
    return smallest, (
        f"auto: {smallest} is the smallest, and not even with that the weights fit in the {room_words(room, whose)} "
        f"({', '.join(too_large)}); the rest is offloaded"
    )


def room_for_weights(patcher: DynamicModelPatcher) -> tuple[int, str]:
    """Return the bytes that the weights may take, and who says so."""
    policy, device = patcher.policy, patcher.load_device
    if policy.vram_bytes is not None:
        return policy.vram_bytes, "that the policy allows"
    if device.type == "cpu":
        return recent_ram().available, "of RAM that are available"
    backend = backend_for(device, memory_figures)
    kept = max(headroom_bytes(policy, backend), int(comfy.model_management.minimum_inference_memory()))
    return backend.memory()[1] - kept, f"of {device} that are left beside what a computation needs"


def room_words(room: int, whose: str) -> str:
    """Say how much room there is, and who says so."""
    return f"{in_words(max(0, room))} {whose}"


def _verdict(patcher: DynamicModelPatcher) -> Any:
    return first_use(backend_for(patcher.load_device, memory_figures), record_file(), aimdo=False)
