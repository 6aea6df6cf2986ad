"""Puts ComfyUI's ModelPatcher on top of the engine's dynamic model."""

from __future__ import annotations

import uuid
import weakref
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from ...ops.files.check_before_read import waiting_for_reads
from ...ops.gather import is_wrapper
from ...ops.ledger import Ledger, in_words
from ...ops.lending.repeat import register_pure
from ...ops.never_raises import never_raises
from ...ops.ram import allocator
from ...ops.ram.available import recent_ram
from ..dynamic_model import DynamicModel, models
from ..policy import Policy
from ..preload import quantise_now
from ..ram_pressure import free_ram
from . import seams, sizes, tables  # noqa: F401 - stand in ComfyUI's functions, and know its embeddings, from here on
from .attach_patches import HookPatches, attach_patches, cast_in_ops
from .compile.dynamic_models import CompileRequest, refuse_compiled
from .forecast.learnt import peaks_of, recall_pace
from .graph_policy import in_force
from .loading.loader_overrides import check_complete
from .loads import BATCH_MARGIN, current_load
from .loads import install as listen_to_loads
from .model_state import (
    PIN_SUBSETS,
    ModelState,
    model_dtype,
    register_pins,
    shared_state,
    source_of,
    sources_standing,
    state_of,
)
from .patches.tiling import give_methods_back
from .patches.weight_patch import rounded
from .progress import Progress
from .running import drop_unloaded, in_a_node

# ComfyUI's op classes, quantised ones too. Classes that architectures derive from them are judged by themselves.
register_pure("comfy.ops")
listen_to_loads()


class DynamicModelPatcher(comfy.model_patcher.ModelPatcher):
    """Patches a model whose weights Spillway manages. `policy` is this patcher's own, and clones inherit it.

    One engine serves all clones of a model. Loading attaches patches and moves nothing.
    """

    # A twin's classic patcher: see dynamic_twin.
    origin: weakref.ref[comfy.model_patcher.ModelPatcher] | None = None
    # Set by the node that compiles. Transformer blocks are then lent as a whole, and compiled as the request says.
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
        shared_state(model, load_device).join(self)
        register_pins(model, load_device)

    @never_raises("giving up a model that nothing uses any more")
    def __del__(self) -> None:
        state = state_of(getattr(self, "model", None))
        if state is not None:
            state.leave(self)

    @property
    def state(self) -> ModelState:
        """Give the state that all clones share."""
        return self.model.spillway_state  # type: ignore[no-any-return]

    @property
    def ledger(self) -> Ledger | None:
        """Give the engine's ledger. None before there is an engine."""
        return self.state.dynamic.ledger if self.state.dynamic is not None else None

    @property
    def dynamic(self) -> DynamicModel:
        """Give the engine. The first use makes it, or raises Unsupported or SourceError."""
        return self.state.engine(self.model, self.load_device, self.policy, blocks=self.compile_request is not None)

    def add_object_patch(self, name: str, obj: Any) -> None:
        """Put an object into the model, unless another node has compiled it: see refuse_compiled."""
        if not refuse_compiled(self.model, name, obj):
            super().add_object_patch(name, obj)

    @property
    def policy(self) -> Policy:
        """Give the policy in force: this patcher's own or else that of the running graph, and what the user set."""
        return self.state.heed(in_force(self._policy))

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._policy = policy

    def set_policy(self, policy: Policy) -> None:
        """Set the policy of this patcher. It takes effect when the model is next loaded."""
        self.policy = policy

    # -- what ComfyUI asks

    def is_dynamic(self) -> bool:
        return True

    def register_load_device(self, device: torch.device) -> None:
        """Note a device. ComfyUI's device selectors call this after they have changed `load_device`."""
        register_pins(self.model, device)

    def clone(self, disable_dynamic: bool = False, *args: Any, **kwargs: Any) -> Any:
        # A CLIP keeps its module beside the clone, so a classic patcher of another module would patch in vain. ComfyUI
        # asks a CLIP for one only because of hooks, which this patcher serves itself.
        cloned = super().clone(disable_dynamic and not self.is_clip, *args, **kwargs)
        if isinstance(cloned, DynamicModelPatcher):
            cloned.policy = self._policy
            cloned.compile_request = self.compile_request
        else:
            self.state.say(
                "another node (Select Model Device on 'cpu', TorchCompileModel) asked for ComfyUI's own model. "
                f"Spillway does not manage that one: it takes {in_words(self.model_size())} as a whole, and no policy "
                "holds it."
            )
        return cloned

    @never_raises("measuring a model", lambda _: 0, unless=in_a_node)
    def loaded_size(self) -> int:
        dynamic = self.state.dynamic
        return dynamic.device_bytes if dynamic is not None else 0

    def lowvram_patch_counter(self) -> int:
        return 0

    def pinned_memory_size(self) -> int:
        return self.state.dynamic.pinned_bytes if self.state.dynamic is not None else 0

    def resident_ram_bytes(self) -> int:
        """Count the bytes of RAM that resident weights take beside their file's pages.

        0 on devices with memory of their own.
        """
        return self.state.dynamic.resident_ram_bytes if self.state.dynamic is not None else 0

    def loaded_ram_size(self) -> int:
        return self.pinned_memory_size()

    @never_raises("marking a model as in use, or not")
    def set_in_use_by_current_prompt(self, in_use: bool) -> None:
        self.model.dynamic_pins[self.load_device]["current_prompt"] = in_use
        drop_unloaded()  # ComfyUI may unload everything after a prompt, where an error ends the prompt thread
        if not in_use and self.policy.keep == "free after use" and self.state.dynamic is not None:
            self.state.dynamic.release()

    # -- loading

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            before = self.loaded_size()
            # Unpatch also before a model is shrunk, which on a full card is every load. A clone with equal weight
            # patches may have loaded it. That clone's object patches, wrappers, callbacks, policy and compile request
            # would stay.
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
                self._expect_use(extra_memory)
            except BaseException:
                self.detach()
                raise
            return self.loaded_size() - before

    def _expect_use(self, extra_memory: float) -> None:
        """Take the first place on the device, and leave there what ComfyUI says that the computation needs.

        extra_memory: how much larger the weights may become, as ComfyUI sees it. comfy-aimdo gives way when memory is
        allocated. Weights that went beforehand would only have to come again.
        """
        dynamic, load = self.dynamic, current_load()
        self.state.samples = load is not None and load.samples
        if self.is_clip:
            self.state.size = sizes.TEXT
        if dynamic.residency is None and self.state.size:
            recall_pace(dynamic, str(self.state.size))
        shrinks = extra_memory < 0 and not dynamic.sees_allocations
        if load is None and shrinks and dynamic.must_be_told:
            free = comfy.model_management.get_free_memory(self.load_device)
            dynamic.expect_use(int(min(free - extra_memory, 1 << 60)))
        else:
            announced, self.state.announced = self.state.announced, False
            if load is None:
                dynamic.expect_use()
            else:
                dynamic.expect_use(load.nbytes, self._shown(load.nbytes) if announced else None)
        if shrinks and not (load is not None and dynamic.must_be_told):
            self.partially_unload(self.offload_device, int(-extra_memory))

    @never_raises("looking up what a computation took", lambda *_: None)
    def _shown(self, needed: int) -> int | None:
        """Give what a computation of this size took in an earlier run; None where that is not known.

        Versions of ComfyUI that batch by the memory that is free must find what they ask for.
        """
        if not hasattr(comfy.model_patcher.ModelPatcher, "get_free_memory"):
            return None
        return peaks_of(self.dynamic, str(self.state.size)).shown(needed)

    def get_free_memory(self, device: torch.device) -> int:
        """Count the bytes that a computation may take. ComfyUI batches conditions by that."""
        dynamic = self.state.dynamic
        if dynamic is not None and dynamic.must_be_told and device == dynamic.device:
            return dynamic.free_for_computation(BATCH_MARGIN if self.state.samples else 1.0)
        if hasattr(comfy.model_patcher.ModelPatcher, "get_free_memory"):
            free = int(super().get_free_memory(device))
        else:
            free = int(comfy.model_management.get_free_memory(device))
        # ComfyUI asks the machine alone, which may have more than this process can have.
        return min(free, recent_ram().available) if device.type == "cpu" else free

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
            if self.state.dynamic is None:
                self._take_over()
                check_complete(self.model)
            if self.compile_request is not None:
                self.state.lend_blocks()
            own = self.dynamic
            others = [model for model in list(models) if model is not own]
            free_ram(others, self.model_size() - own.pinned_bytes)
            self.state.follow(self.policy)
            dynamic = self.dynamic
            dynamic.check_files()  # some weights are read right here
            hooked = self.get_combined_hook_patches(self.forced_hooks)
            with waiting_for_reads():
                cast_in_ops(self, self.state, dynamic)
                self._attach_patches(hooked)
            self._hooked = bool(hooked)
            dynamic.place_buffers()
            self.state.compilers.use(dynamic, self.compile_request)
            self.model.device = device_to
            self.model.model_lowvram = False
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)
            if self.state.quantise is not None and not dynamic.is_coming:  # else each is made when it has come
                quantise_now(dynamic, Progress())

    def _take_over(self) -> None:
        """Get a twin's weights back as they were loaded, and the patches that its classic patcher has by now."""
        origin = self.origin() if self.origin is not None else None
        if origin is not None:
            origin.unpatch_model(origin.offload_device)
            self.patches = origin.patches

    # -- patches

    def _attach_patches(self, hooked: HookPatches) -> None:
        attach_patches(self, self.state, self.dynamic, hooked, had_hooks=self._hooked, int8_lora=self.policy.int8_lora)

    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[tuple]]:
        """Give the weights for merges into other models, each as it is in the model's dtype, whatever the file has."""
        for disk_map in getattr(self.model, "spillway_maps", ()):
            disk_map.check()  # other models' patchers read the sources
        patches: dict[str, list[tuple]] = super().get_key_patches(filter_prefix)
        for key, entries in patches.items():
            owner, _, attr = key.rpartition(".")
            weight = source_of(self, key, entries[0][0])
            dtype = model_dtype(comfy.utils.get_attr(self.model, owner) if owner else self.model, attr, weight)
            cast = weight.is_floating_point() and dtype != weight.dtype and not is_wrapper(weight)
            entries[0] = (weight, rounded(dtype) if cast else entries[0][1])
        return patches

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """Patch a weight for saving: the one that is stored, as an idle weight is patched already."""
        with sources_standing(self.state.dynamic, key):
            return super().patch_weight_to_device(key, *args, **kwargs)

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> Any:
        for disk_map in getattr(self.model, "spillway_maps", ()):
            disk_map.check()  # ComfyUI's own nodes read the sources
        with sources_standing(self.state.dynamic):
            return super().model_state_dict_for_saving(*args, **kwargs)

    def patch_hooks(self, hooks: Any) -> None:
        """Attach hooks as patches on top of the LoRAs. Only bundles that they touch are made again."""
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
        """Give this patcher where ComfyUI asks for a classic one to serve hooks of conditions."""
        return self

    # -- sampling

    def pre_run(self) -> None:
        if self.load_device.type == "cpu":
            allocator.begin_computing()
        super().pre_run()

    def cleanup(self) -> None:
        allocator.end_computing()
        super().cleanup()
        dynamic = self.state.dynamic
        if dynamic is not None and dynamic.residency is not None:
            dynamic.residency.note_peak()
            dynamic.ledger.summarise(dynamic.resident_bytes, dynamic.total_bytes)
            dynamic.free_buffers()
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
            # ComfyUI would unload the model as a whole if it were told of less than it asked for. It measures what is
            # really free afterwards.
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
        # The base class restores object patches. Weights have nothing to be restored from.
        patched = list(self.object_patches_backup)
        super().unpatch_model(device_to=None, unpatch_weights=False)
        give_methods_back(self.model, patched)
        if unpatch_weights:
            dynamic = self.state.dynamic
            if dynamic is not None:
                dynamic.release(pins=False)  # pins give way to whoever needs RAM
            self.model.current_weight_patches_uuid = None

    @never_raises("unloading a model", lambda patcher, *_, **__: patcher.model, unless=in_a_node)
    def detach(self, unpatch_all: bool = True) -> Any:
        model = super().detach(unpatch_all)
        if self.origin is not None:  # the classic patcher may use the model next
            self.state.close()
        return model

    def restore_loaded_backups(self) -> int:
        """Restore nothing: a dynamic model keeps nothing in backups."""
        return 0

    def pin_weight_to_device(self, key: str) -> None:
        """Do nothing: pins are the engine's."""

    def unpin_weight(self, key: str) -> None:
        """Do nothing: pins are the engine's."""

    def unpin_all_weights(self) -> None:
        """Do nothing: pins are the engine's."""

    # -- model patches

    @never_raises("finding the models attached to a model", lambda _: [], unless=in_a_node)
    def model_patches_models(self) -> list[Any]:
        """List the models attached to this one (model patches like ControlNets), as dynamic ones."""
        return [dynamic_twin(patcher, self.policy) for patcher in super().model_patches_models()]

    @never_raises("naming a model", lambda _: "<DynamicModelPatcher>")
    def __repr__(self) -> str:
        return f"<DynamicModelPatcher {type(self.model).__name__} {in_words(self.model_size())} on {self.load_device}>"


def dynamic_twin(patcher: Any, policy: Policy) -> Any:
    """Give the dynamic patcher of a classic patcher's model, or the patcher itself where it is dynamic already.

    Models of other loaders may use the classic patcher in between. Each of the two takes the model over when it is
    loaded.
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
