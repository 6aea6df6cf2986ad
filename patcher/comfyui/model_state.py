"""What all patchers of one model share, and the facts about a model that follow from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher

from ...ops.device.backend import backend_for
from ...ops.overrides import SavedAttributes
from ..attach import Quantise
from ..dynamic_model import DynamicModel
from ..policy import Policy
from .compile.blocks import block_names
from .compile.dynamic_models import SharedCompilers
from .first_use import orders_file, record_file
from .flags import heed_flags
from .kitchen import register_kitchen
from .patches.weight_patch import WeightPatch
from .run_record import running_node

log = logging.getLogger("spillway")

ASSIGNING = "disable_weight_init."  # ComfyUI's Linear and Embedding, and what derives from them without a change
PIN_SUBSETS = ("weights", "patches", "weights-loaded", "patches-loaded")


class ModelState:
    """The engine of a model, and what was set on ComfyUI's modules for it."""

    def __init__(self) -> None:
        self.dynamic: DynamicModel | None = None
        self.attributes = SavedAttributes()
        self.patchers: set[int] = set()
        self.patches: dict[str, WeightPatch] = {}
        self.quantise: Quantise | None = None
        self.notes: list[tuple[str, int]] = []  # decisions of the load, and their level: for the ledger
        # The engine lends transformer blocks as a whole. Clones that are not compiled do not mind.
        self.lends_blocks = False
        self.compilers = SharedCompilers()
        self.loaded_by = running_node()  # (id, class) of the node that loaded the model
        self.chosen: dict[str, Any] = {}  # fields of a policy that the user set by hand, whatever a node says
        self._base = Policy()  # the policy without them
        self.size: str | None = None  # of what it computes or last computed, as `sizes` names it
        self.announced = False  # whether that is of the next load, not of one before
        self.guided = False  # whether the sampler that last used it computes more than one condition in a step
        self.samples = False  # whether the last load was for a sampler, which batches by the memory that is free

    def __deepcopy__(self, memo: dict) -> ModelState:
        copied = ModelState()
        copied.quantise, copied.notes = self.quantise, list(self.notes)
        return copied

    def announce(self, size: str) -> None:
        """Note the size of what the next load is for."""
        self.size, self.announced = size, True

    def join(self, patcher: object) -> None:
        """Count a patcher of the model."""
        self.patchers.add(id(patcher))

    def leave(self, patcher: object) -> None:
        """Count a patcher out. The last one closes the engine."""
        self.patchers.discard(id(patcher))
        if not self.patchers:
            self.close()

    def engine(self, model: torch.nn.Module, device: torch.device, policy: Policy, *, blocks: bool) -> DynamicModel:
        """The engine on `device`; a new one, within `policy`, where there is none.

        blocks: a new one lends transformer blocks as a whole. Raises Unsupported or SourceError where the model
        cannot be dynamic.
        """
        device = _with_index(device)
        if self.dynamic is not None and self.dynamic.device != device:
            self.close()
        if self.dynamic is None:
            self.lends_blocks = blocks
            register_kitchen()  # its products are checked with the device
            self.dynamic = DynamicModel(
                model,
                None,
                device,
                policy,
                name=type(model).__name__,
                model_dtype=model_dtype,
                quantise=self.quantise,
                backend=heed_flags(backend_for(device, memory_figures)),
                may_init=False,
                blocks=block_names(model) if blocks else (),
                first_use_file=record_file(),
                orders_file=orders_file(),
            )
            for words, level in self.notes:
                self.dynamic.ledger.decide(words, level=level)
        return self.dynamic

    def say(self, words: str) -> None:
        """Warn of something about the model in log and ledger; without an engine yet, in its ledger later."""
        if self.dynamic is not None:
            self.dynamic.ledger.decide(words, level=logging.WARNING)
        elif (words, logging.WARNING) not in self.notes:
            self.notes.append((words, logging.WARNING))
            log.warning("[Spillway] %s", words)

    def lend_blocks(self) -> None:
        """Close an engine that lends layer by layer: how it lends is decided when it is made."""
        if not self.lends_blocks:
            self.close()

    def follow(self, policy: Policy) -> None:
        """Hold the engine to another policy. One with other rules closes it: they are read when bundles are made."""
        if self.dynamic is None or self.dynamic.asked == policy:
            return
        if self.dynamic.policy.rules == policy.rules:
            self.dynamic.set_policy(policy)
        else:
            self.close()

    def heed(self, policy: Policy) -> Policy:
        """Put what the user chose by hand in the place of what a policy says."""
        if not self.chosen:
            return policy
        share = {"vram_share": None} if "vram_bytes" in self.chosen else {}
        return policy.with_changes(**self.chosen, **share)

    def choose(self, at_once: bool, **fields: Any) -> None:
        """Set fields of the policy by hand, whatever nodes say, until the model is loaded anew. None gives one back.

        at_once: no prompt runs. Otherwise it takes effect when the model is next loaded.
        """
        dynamic = self.dynamic
        if not self.chosen and dynamic is not None:
            self._base = dynamic.asked
        self.chosen.update(fields)
        for name in [name for name, value in self.chosen.items() if value is None]:
            del self.chosen[name]
        if at_once and dynamic is not None:
            dynamic.set_policy(self.heed(self._base))

    def close(self) -> None:
        """Give all memory back. The modules are as ComfyUI made them."""
        dynamic, self.dynamic, self.lends_blocks = self.dynamic, None, False
        try:
            if dynamic is not None:
                dynamic.close()
        finally:
            self.patches = {}
            self.attributes.restore()


def memory_figures(device: torch.device) -> tuple[int, int]:
    """Give (free, total) bytes of a device as ComfyUI knows them, for devices that torch cannot be asked about."""
    management = comfy.model_management
    return int(management.get_free_memory(device)), int(management.get_total_memory(device))


def state_of(model: torch.nn.Module) -> ModelState | None:
    """The state that a model's dynamic patchers share; None for a model that has none."""
    return getattr(model, "spillway_state", None)


def shared_state(model: torch.nn.Module, device: torch.device) -> ModelState:
    """The state of a model. The first call makes it, and notes in which dtypes ComfyUI built the parameters.

    device: on which ComfyUI means to run the model.
    """
    state = state_of(model)
    if state is None:
        state = model.spillway_state = ModelState()  # type: ignore[assignment]
        # A diffusion model without such a dtype has layers that do not cast what they are given.
        casts = getattr(model, "manual_cast_dtype", True) is not None
        assigned = device.type == "cpu" and casts and _makes_layers_without_weights()
        for module in model.modules():
            if assigned and _filled_by_assignment(module):
                # ComfyUI notes here the dtype that it would cast to on a GPU. On a CPU it computes with the file's
                # weight as it is. Rounded to that dtype it would be another number.
                module.weight_comfy_model_dtype = module.bias_comfy_model_dtype = None  # type: ignore[assignment]
                continue
            for attr, parameter in module._parameters.items():
                if parameter is not None and getattr(module, f"{attr}_comfy_model_dtype", None) is None:
                    setattr(module, f"{attr}_comfy_model_dtype", parameter.dtype)
    return state


def _makes_layers_without_weights() -> bool:
    """Whether ComfyUI makes layers without weights now. With dynamic VRAM on it does, in 0.22 on Windows alone."""
    return comfy.ops.disable_weight_init.Linear(1, 1, device="meta").weight is None


def _filled_by_assignment(module: torch.nn.Module) -> bool:
    """Whether a casting layer is one of those, on any device."""
    if not getattr(module, "comfy_cast_weights", False):
        return False
    load = type(module)._load_from_state_dict
    return load.__qualname__.startswith(ASSIGNING)


def model_dtype(module: torch.nn.Module, attr: str, parameter: torch.Tensor) -> torch.dtype:
    """The dtype that ComfyUI built a parameter in. A file that is loaded by assignment may have another."""
    return getattr(module, f"{attr}_comfy_model_dtype", None) or parameter.dtype


def source_of(patcher: ModelPatcher, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """A weight without patches, wherever its patcher has put it."""
    state = state_of(patcher.model)
    dynamic = state.dynamic if state is not None else None
    if dynamic is not None and key in dynamic.by_key:
        return next(param.original for param in dynamic.by_key[key].params if param.key == key).detach()
    if key in patcher.backup:
        return patcher.backup[key].weight.detach()
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0].detach()
    return parameter.detach()


@contextmanager
def sources_standing(dynamic: DynamicModel | None, key: str | None = None) -> Iterator[None]:
    """Let the weights as they are stored stand in their modules, for code of ComfyUI's that patches what it reads.

    key: of the only one that is read.
    """
    bundles = [] if dynamic is None else dynamic.bundles if key is None else filter(None, [dynamic.by_key.get(key)])
    bundles = list(bundles)
    for bundle in bundles:
        bundle.arrive()  # ComfyUI reads them
    params = [param for bundle in bundles for param in bundle.params]
    standing = [param.owner._parameters[param.attr] for param in params]
    for param in params:
        param.owner._parameters[param.attr] = param.original  # type: ignore[assignment]
    try:
        yield
    finally:
        for param, parameter in zip(params, standing, strict=True):
            param.owner._parameters[param.attr] = parameter


def register_pins(model: torch.nn.Module, device: torch.device) -> None:
    """Give a model the books about pins that newer versions of ComfyUI read, for `device`.

    Pins are the engine's, so the books stay empty. Each subset has a buffer, its stack, split, bytes and buckets.
    """
    if getattr(model, "dynamic_pins", None) is None:
        model.dynamic_pins = {}  # type: ignore[assignment]
    books: dict[str, Any] = {name: (None, [], [-1], [0], [0], {}) for name in PIN_SUBSETS}
    books.update(hostbufs_initialized=True, failed=False, active=False, current_prompt=False)
    model.dynamic_pins.setdefault(device, books)  # type: ignore[operator, union-attr]


def _with_index(device: torch.device) -> torch.device:
    if device.type in ("cuda", "xpu") and device.index is None:
        return torch.device(device.type, torch.get_device_module(device).current_device())
    return device
