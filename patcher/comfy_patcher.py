"""The host's ModelPatcher on top of the engine's dynamic model."""

from __future__ import annotations

import logging
import uuid
import weakref
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from ..ops.bundle import Bundle, Param
from ..ops.disk_map import SourceError
from ..ops.gather import is_wrapper
from ..ops.ledger import Ledger, in_words
from ..ops.never_raises import never_raises
from ..ops.repeat import register_pure
from ..ops.saved_attributes import MISSING, SavedAttributes
from .attach import Int8Choice
from .comfy_blocks import block_names
from .comfy_compile import CompileRequest, SharedCompilers, refuse_compiled
from .comfy_fixed import place_fixed, place_read_idle
from .comfy_int8 import quantise_with_progress
from .comfy_int8_lora import place_loras
from .comfy_loaded import forget_unloaded
from .comfy_outside import in_a_node
from .comfy_patches import HostPatch, idle_function, rounded
from .comfy_pins import PIN_SUBSETS, pin_state
from .comfy_ram import free_ram
from .dynamic import DynamicModel
from .policy import Policy

log = logging.getLogger("spillway")

# ComfyUI's op classes, quantised ones too. Architectures derive their own from them, which are judged by themselves.
register_pure("comfy.ops")


class HostState:
    """What all patchers of one model share: the engine, and what was set on the host's modules for it."""

    def __init__(self) -> None:
        self.dynamic: DynamicModel | None = None
        self.attributes = SavedAttributes()
        self.patchers: set[int] = set()
        self.patches: dict[str, HostPatch] = {}
        self.int8: Int8Choice | None = None
        self.notes: list[tuple[str, int]] = []  # decisions of the load, and their level: for the ledger
        # The engine lends transformer blocks as a whole. Clones that are not compiled do not mind.
        self.lends_blocks = False
        self.compilers = SharedCompilers()

    def __deepcopy__(self, memo: dict) -> HostState:
        copied = HostState()
        copied.int8, copied.notes = self.int8, list(self.notes)
        return copied

    def close(self) -> None:
        """Give all memory back; the modules are the host's again."""
        dynamic, self.dynamic, self.lends_blocks = self.dynamic, None, False
        try:
            if dynamic is not None:
                dynamic.close()
        finally:
            self.patches = {}
            self.attributes.restore()


def model_dtype(module: torch.nn.Module, attr: str, parameter: torch.Tensor) -> torch.dtype:
    """The dtype that the host built a parameter in; a file loaded by assignment may have another."""
    return getattr(module, f"{attr}_comfy_model_dtype", None) or parameter.dtype


class DynamicModelPatcher(comfy.model_patcher.ModelPatcher):
    """A model whose weights are managed by Spillway. `policy` is this patcher's own; clones inherit it.

    One engine serves all clones of a model. Loading attaches patches and moves nothing.
    """

    # A twin's classic patcher (a weak reference): see dynamic_twin.
    origin: Any = None
    # Set: transformer blocks are lent as a whole, and compiled as it says.
    compile_request: CompileRequest | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.policy = Policy()
        state = getattr(model, "spillway_state", MISSING)
        if state is MISSING:
            model.spillway_state = HostState()
            for module in model.modules():
                for attr, parameter in module._parameters.items():
                    if parameter is not None and getattr(module, f"{attr}_comfy_model_dtype", None) is None:
                        setattr(module, f"{attr}_comfy_model_dtype", parameter.dtype)
        self.state.patchers.add(id(self))
        # Newer cores read these from every dynamic model.
        if getattr(model, "dynamic_pins", None) is None:
            model.dynamic_pins = {}
        model.dynamic_pins.setdefault(load_device, pin_state())

    @never_raises("giving up a model that nothing uses any more")
    def __del__(self) -> None:
        state = getattr(getattr(self, "model", None), "spillway_state", None)
        if state is None:
            return
        state.patchers.discard(id(self))
        if not state.patchers:
            state.close()

    @property
    def state(self) -> HostState:
        """Shared by all clones."""
        return self.model.spillway_state  # type: ignore[no-any-return]

    @property
    def ledger(self) -> Ledger | None:
        """The engine's; None before there is one."""
        return self.state.dynamic.ledger if self.state.dynamic is not None else None

    @property
    def dynamic(self) -> DynamicModel:
        """The engine; made by the first use. Raises Unsupported or SourceError where the model cannot be dynamic."""
        state = self.state
        if state.dynamic is not None and state.dynamic.device != _engine_device(self.load_device):
            state.close()
        if state.dynamic is None:
            state.lends_blocks = self.compile_request is not None
            state.dynamic = DynamicModel(
                self.model,
                None,
                _engine_device(self.load_device),
                self.policy,
                name=type(self.model).__name__,
                model_dtype=model_dtype,
                int8=state.int8,
                may_init=False,
                blocks=block_names(self.model) if state.lends_blocks else (),
            )
            for words, level in state.notes:
                state.dynamic.ledger.decide(words, level=level)
            place_fixed(state.dynamic)
        return state.dynamic

    def add_object_patch(self, name: str, obj: Any) -> None:
        """Refused for a module of ours that another node has compiled: see `refuse_compiled`."""
        if not refuse_compiled(self.model, name, obj):
            super().add_object_patch(name, obj)

    def set_policy(self, policy: Policy) -> None:
        """The policy of this patcher; it takes effect when the model is next loaded."""
        self.policy = policy

    # -- what the core asks

    def is_dynamic(self) -> bool:
        return True

    def register_load_device(self, device: torch.device) -> None:
        """Core's device selectors call this after changing `load_device`."""
        self.model.dynamic_pins.setdefault(device, pin_state())

    def clone(self, disable_dynamic: bool = False, *args: Any, **kwargs: Any) -> Any:
        # A CLIP's module stays beside the clone, so a classic patcher of another module would patch in vain. The core
        # asks a CLIP for one only because of hooks, which this patcher serves itself.
        cloned = super().clone(disable_dynamic and not self.is_clip, *args, **kwargs)
        if isinstance(cloned, DynamicModelPatcher):
            cloned.policy = self.policy
            cloned.compile_request = self.compile_request
        return cloned

    @never_raises("measuring a model", lambda _: 0, unless=in_a_node)
    def loaded_size(self) -> int:
        dynamic = self.state.dynamic
        return dynamic.resident_bytes + dynamic.fixed_bytes if dynamic is not None else 0

    def lowvram_patch_counter(self) -> int:
        return 0

    def pinned_memory_size(self) -> int:
        return self.state.dynamic.pinned_bytes if self.state.dynamic is not None else 0

    def resident_ram_bytes(self) -> int:
        """RAM that resident weights take beside their file's pages; 0 on devices with memory of their own."""
        dynamic = self.state.dynamic
        if dynamic is None or dynamic.caster is None or not dynamic.backend.in_place:
            return 0
        vbar = dynamic.caster.vbar
        made = (bundle for bundle in dynamic.bundles if not bundle.in_place and bundle.piece is not None)
        return sum(bundle.nbytes for bundle in made if vbar.resident(bundle.piece))

    def loaded_ram_size(self) -> int:
        return self.pinned_memory_size()

    @never_raises("marking a model as in use, or not")
    def set_in_use_by_current_prompt(self, in_use: bool) -> None:
        self.model.dynamic_pins[self.load_device]["current_prompt"] = in_use
        forget_unloaded()  # after a prompt ComfyUI may unload everything, where nobody catches what that raises
        if not in_use and self.policy.keep == "free after use" and self.state.dynamic is not None:
            self.state.dynamic.release()

    # -- loading

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            before = self.loaded_size()
            # Also before a model is shrunk: equal weight patches do not make it this clone's. Object patches, wrappers,
            # callbacks, the policy and the compile request are others, and on a full card every load is a shrinking.
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
                if extra_memory < 0:
                    self.partially_unload(self.offload_device, int(-extra_memory))
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - before

    def load(
        self,
        device_to: torch.device | None = None,
        lowvram_model_memory: float = 0,
        force_patch_weights: bool = False,
        full_load: bool = False,
        **_: Any,
    ) -> None:
        """Attach patches and policy. Weights come when the first forward uses them."""
        with self.use_ejected():
            device_to = self.load_device if device_to is None else device_to
            if self.origin is not None and self.state.dynamic is None:
                self._take_over()
            self._check_complete()
            if self.compile_request is not None and not self.state.lends_blocks:
                self.state.close()
            dynamic = self.dynamic
            free_ram(2 * self.model_size(), keep=dynamic)
            if dynamic.policy != self.policy:
                self._apply_policy(dynamic)
                dynamic = self.dynamic
            self._cast_in_ops(dynamic)
            hooked = self.get_combined_hook_patches(self.forced_hooks)
            self._attach_patches(hooked)
            self._hooked = bool(hooked)
            self.state.compilers.use(dynamic, self.compile_request)
            self.model.device = device_to
            self.model.model_lowvram = False
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)
            if self.state.int8 is not None:
                quantise_with_progress(self)

    def _take_over(self) -> None:
        """A twin needs the weights as the classic patcher got them."""
        origin = self.origin()
        if origin is not None:
            origin.unpatch_model(origin.offload_device)
            self.patches = origin.patches

    def _check_complete(self) -> None:
        """Core leaves what a file lacks as it is; a dynamic model would have nothing to read."""
        root = getattr(self.model, "diffusion_model", None)
        if root is None or self.state.dynamic is not None:
            return
        missing = [name for name, parameter in root.named_parameters() if parameter.is_meta]
        if missing:
            path = getattr(self.model, "spillway_path", "the file")
            raise SourceError(
                f"{path}: {len(missing)} tensors that {type(root).__name__} needs are missing, such as "
                f"{', '.join(missing[:3])}. The file is incomplete or of another architecture: get a complete one."
            )

    def _apply_policy(self, dynamic: DynamicModel) -> None:
        if dynamic.policy.rules == self.policy.rules:
            dynamic.set_policy(self.policy)
        else:  # rules are read when bundles are made
            self.state.close()

    def _cast_in_ops(self, dynamic: DynamicModel) -> None:
        """The core's ops cast what they are lent to the input's dtype, as they do for its own dynamic models.

        What that costs is counted: diffusion models say which dtype they compute in, text encoders by an object patch.
        An embedding looks up rows first.
        """
        attributes = self.state.attributes
        computes = self.object_patches.get("manual_cast_dtype", getattr(self.model, "manual_cast_dtype", None))
        for bundle in dynamic.bundles:
            for param in bundle.params:
                casts = hasattr(param.owner, "comfy_cast_weights") and not isinstance(param.owner, torch.nn.Embedding)
                param.op_dtype = computes if casts else None
        for module in self.model.modules():
            if hasattr(module, "comfy_cast_weights"):
                if not module.comfy_cast_weights:
                    attributes.set(module, "comfy_cast_weights", True)
                if getattr(module, "comfy_force_cast_weights", False) != self.force_cast_weights:
                    attributes.set(module, "comfy_force_cast_weights", self.force_cast_weights)

    # -- patches

    def _attach_patches(self, hook_patches: dict[str, list[tuple]] | None = None) -> None:
        dynamic, state = self.dynamic, self.state
        hooked = hook_patches or {}
        patches = {}
        quantised: dict[str, Param] = {}
        for key in {*self.patches, *hooked}:
            bundle = dynamic.by_key.get(key)
            if bundle is not None:
                param = next(param for param in bundle.params if param.key == key)
                if param.int8:
                    quantised[key] = param
                patches[key] = HostPatch(
                    self.model,
                    key,
                    param.original,
                    param.form.dtype,
                    self.patches.get(key, []),
                    hooked.get(key, []),
                    rounded=not param.int8,
                )
        if quantised and not hooked:
            chosen = {key: patches[key] for key in quantised}
            patches.update(place_loras(chosen, quantised, self.policy.int8_lora, dynamic.device, dynamic.ledger))
        changed = [
            key
            for key in {*patches, *state.patches}
            if key not in patches or not patches[key].same_as(state.patches.get(key))
        ]
        kept = {key: patch if key in changed else state.patches[key] for key, patch in patches.items()}
        if changed:
            touched = dynamic.set_patches(kept, changed)
            dynamic.ledger.counters.patch_changes += 1
            if hooked or self._hooked:  # between two conditions: at every step
                if hooked:
                    dynamic.ledger.decide_once(f"hooks change {len(hooked)} weights while sampling", level=logging.INFO)
            else:
                dynamic.ledger.decide(f"{len(kept)} weights patched, {touched} bundles touched by the change")
            place_read_idle(dynamic, changed, self.backup)
        state.patches = kept
        self._functions(dynamic, kept)

    def _functions(self, dynamic: DynamicModel, patches: dict[str, HostPatch]) -> None:
        """Weight functions: a lent weight is finished, so it meets only wrappers; an idle one must still be patched."""
        for bundle in dynamic.bundles:
            bundle.lent_attributes = []
        for bundle in dynamic.bundles:
            for param in bundle.params:
                module, name = param.owner, f"{param.attr}_function"
                if param.int8 and getattr(module, "layout_type", None) is not None:
                    # Else the core's op would quantise the input, for a weight in the file's format.
                    bundle.lent_attributes.append((module, "layout_type", module.layout_type, None))
                if not hasattr(module, "comfy_cast_weights") or not hasattr(module, name):
                    continue
                wrappers = list(self.weight_wrapper_patches.get(param.key, []))
                if param.key in patches and param.key not in self.backup:
                    idle = [idle_function(param.key, {param.key: patches[param.key].all_patches}), *wrappers]
                    bundle.lent_attributes.append((module, name, idle, wrappers))
                    self.state.attributes.set(module, name, idle)
                elif getattr(module, name) != wrappers:
                    self.state.attributes.set(module, name, wrappers)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[tuple]]:
        """For merges into other models: weights that the file has in another dtype count as what they are in ours."""
        patches: dict[str, list[tuple]] = super().get_key_patches(filter_prefix)
        for key, entries in patches.items():
            owner, _, attr = key.rpartition(".")
            weight = entries[0][0]
            dtype = model_dtype(comfy.utils.get_attr(self.model, owner) if owner else self.model, attr, weight)
            if weight.is_floating_point() and dtype != weight.dtype and not is_wrapper(weight):
                entries[0] = (weight, rounded(dtype))
        return patches

    def patch_weight_to_device(self, key: str, *args: Any, return_weight: bool = False, **kwargs: Any) -> Any:
        """For saving; a resized weight is patched already."""
        if return_weight and key in self.backup:
            return comfy.utils.get_attr(self.model, key)
        return super().patch_weight_to_device(key, *args, return_weight=return_weight, **kwargs)

    def patch_hooks(self, hooks: Any) -> None:
        """Hooks are patches on top of the LoRAs: one copy of the weights, and only touched bundles are made again."""
        with self.use_ejected():
            combined = self.get_combined_hook_patches(hooks) if hooks is not None else {}
            if self.state.dynamic is not None and (combined or self._hooked):
                self._attach_patches(combined)
            self._hooked = bool(combined)
            self.current_hooks = hooks

    _hooked = False

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        if self._hooked:
            self.patch_hooks(None)
        self.current_hooks = None

    def get_non_dynamic_delegate(self) -> Any:
        """The core asks for a classic patcher where conditions carry hooks; this one serves them itself."""
        return self

    # -- after sampling

    def cleanup(self) -> None:
        super().cleanup()
        dynamic = self.state.dynamic
        if dynamic is not None and dynamic.caster is not None:
            dynamic.note_peak()
            dynamic.ledger.summarise(dynamic.resident_bytes, dynamic.total_bytes)
            if self.policy.keep == "free after use":
                dynamic.release()

    # -- unloading

    @never_raises("giving device memory back", lambda *_, **__: 0, unless=in_a_node)
    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        dynamic = self.state.dynamic
        if dynamic is None:
            return 0
        if self.policy.keep == "always":
            # Less than asked would make the core unload the model as a whole. It measures what is really free
            # afterwards.
            return int(min(memory_to_free, 1 << 60))
        return dynamic.free(None if memory_to_free >= 1 << 60 else int(memory_to_free))

    @never_raises("giving RAM back", lambda *_, **__: 0, unless=in_a_node)
    def partially_unload_ram(self, ram_to_unload: float, subsets: Any = PIN_SUBSETS) -> int:
        dynamic = self.state.dynamic
        if dynamic is None or "weights" not in subsets:
            return 0
        return dynamic.free_pins(ram_to_unload)

    def unregister_inactive_pins(self, ram_to_unload: float, subsets: Any = PIN_SUBSETS) -> int:
        return self.partially_unload_ram(ram_to_unload, subsets)

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        # The base class restores object patches; weights have nothing to be restored from.
        super().unpatch_model(device_to=None, unpatch_weights=False)
        if unpatch_weights:
            dynamic = self.state.dynamic
            if dynamic is not None:
                dynamic.release(pins=False)  # they give way to whoever needs RAM
            self.model.current_weight_patches_uuid = None

    @never_raises("unloading a model", lambda patcher, *_, **__: patcher.model, unless=in_a_node)
    def detach(self, unpatch_all: bool = True) -> Any:
        model = super().detach(unpatch_all)
        if self.origin is not None:  # the next to use the model may be the classic patcher
            self.state.close()
        return model

    def restore_loaded_backups(self) -> int:
        """Nothing of a dynamic model is kept in backups."""
        return 0

    def pin_weight_to_device(self, key: str) -> None:
        """Pins are the engine's."""

    def unpin_weight(self, key: str) -> None:
        """Pins are the engine's."""

    def unpin_all_weights(self) -> None:
        """Pins are the engine's."""

    # -- model patches

    @never_raises("finding the models attached to a model", lambda _: [], unless=in_a_node)
    def model_patches_models(self) -> list[Any]:
        """Models attached to this one (ControlNet-like model patches): managed dynamically too."""
        return [dynamic_twin(patcher, self.policy) for patcher in super().model_patches_models()]

    def __repr__(self) -> str:
        return f"<DynamicModelPatcher {type(self.model).__name__} {in_words(self.model_size())} on {self.load_device}>"


def _engine_device(device: torch.device) -> torch.device:
    if device.type in ("cuda", "xpu") and device.index is None:
        return torch.device(device.type, torch.get_device_module(device).current_device())
    return device


def dynamic_twin(patcher: Any, policy: Policy) -> Any:
    """A dynamic patcher of a classic one's model, for models that only ours run; itself where it is dynamic already.

    Models of the core's may use the classic one in between: each takes the model over when it is loaded.
    """
    if not isinstance(patcher, comfy.model_patcher.ModelPatcher) or patcher.is_dynamic():
        return patcher
    twin = getattr(patcher, "spillway_twin", None)
    if twin is None:
        twin = DynamicModelPatcher(patcher.model, patcher.load_device, patcher.offload_device, patcher.model_size())
        twin.policy = Policy(headroom_bytes=policy.headroom_bytes, pinned_bytes=0)
        twin.patches, twin.patches_uuid = patcher.patches, uuid.uuid4()
        twin.origin = weakref.ref(patcher)
        patcher.spillway_twin = twin
    return twin


def bundles_of(patcher: DynamicModelPatcher) -> list[Bundle]:
    """The bundles of a patcher's engine, for reports."""
    return patcher.state.dynamic.bundles if patcher.state.dynamic is not None else []
