"""Faults in what is done with files, compiling, moves and room for pins, planted one at a time: a test fails for each.

Those of a device are in tests/comfyui/device/test_planted_faults.py. They run with `dev.py test --slow`.
"""

import functools

import pytest

from kit.device import is_fake
from kit.planting import Fault, check_is_seen, check_passes

CHECK = "patcher.comfyui.loading.check_quantised"
OVERRIDES = "patcher.comfyui.loading.loader_overrides"
CLASSIC = "patcher.comfyui.compile.classic_models"
DYNAMIC = "patcher.comfyui.compile.dynamic_models"

FILES = "comfyui/loading/test_quantised_files.py"
COMPILED = "comfyui/compile/test_dynamic_models.py"
OTHERS = "comfyui/compile/test_other_models.py"
USO = "comfyui/loading/test_companions.py::test_uso_gives_comfyuis_latents[small fp32]"
MOVES = "comfyui/nodes/test_memory.py::test_a_model_moves_between_two_devices_and_back"

FAULTS = {
    # Quantised files.
    "a scale may be missing": Fault(
        f"{CHECK}:_check_layer",
        "NEEDED.get(name, ())",
        "()",
        (f"{FILES}::test_a_layer_without_its_scale_is_an_error",),
    ),
    "nothing is known of W4A8": Fault(
        f"{CHECK}:_check_layer",
        "NEEDED.get(name, ())",
        "dict(NEEDED, asym_w4a8_int8=()).get(name, ())",
        (f"{FILES}::test_a_layer_in_w4a8_without_one_of_its_scales_is_an_error",),
    ),
    "a scale that nothing explains is left out": Fault(
        f"{CHECK}:_check_scales",
        "if dtype.itemsize > 1:",
        "if True:",
        (f"{FILES}::test_a_scale_without_a_format_is_an_error_and_no_noise",),
    ),
    "an old scale needs no mark": Fault(
        f"{CHECK}:_check_scales",
        "not any(layer.startswith(prefix) for prefix in marked)",
        "False",
        (f"{FILES}::test_an_old_scale_without_the_mark_is_an_error_and_no_noise",),
    ),
    "the old form holds any FP8": Fault(
        f"{CHECK}:_check_scales",
        "if dtype != torch.float8_e4m3fn:",
        "if False:",
        (f"{FILES}::test_the_old_form_in_e5m2_is_an_error_and_not_empty",),
    ),
    "a weight has whatever dtype": Fault(
        f"{CHECK}:_check_layer",
        "if weight.dtype != stored and not (",
        "if False and not (",
        (f"{FILES}::test_a_weight_in_another_dtype_than_its_format_is_an_error",),
    ),
    "no file is checked": Fault(
        f"{OVERRIDES}:building",
        "check_quantised(disk_map)",
        "pass",
        (f"{FILES}::test_every_loader_refuses_scales_without_a_format",),
    ),
    "a tensor of four bits is never left out": Fault(
        "ops.files.disk_map:_is_left_out",
        "if bits is None:",
        "if True:",
        (f"{FILES}::test_a_tensor_of_four_bits_that_nobody_needs_does_no_harm",),
    ),
    "nobody says what was left out": Fault(
        f"{OVERRIDES}:_left_out_words",
        "if words else",
        "if False else",
        (f"{FILES}::test_a_needed_tensor_of_four_bits_is_an_error_that_names_it",),
    ),
    "a part is a model": Fault(
        "ops.parts.index:part_words",
        "if part is None:",
        "if True:",
        (f"{FILES}::test_a_shard_alone_is_an_error_that_says_which_part_it_is",),
    ),
    # Compiling.
    "the guard filter is on whatever was asked": Fault(
        f"{DYNAMIC}:SharedCompilers.use",
        "ignore=request.use_guard_filter",
        "ignore=True",
        (f"{COMPILED}::test_the_guard_filter_saves_compilations_and_changes_no_latent",),
    ),
    "the guard filter is off whatever was asked": Fault(
        f"{DYNAMIC}:SharedCompilers.use",
        "ignore=request.use_guard_filter",
        "ignore=False",
        (f"{COMPILED}::test_the_guard_filter_saves_compilations_and_changes_no_latent",),
    ),
    "the guard filter of a model of ComfyUI is always on": Fault(
        f"{CLASSIC}:compile_arguments",
        "if not request.use_guard_filter:",
        "if False:",
        (f"{OTHERS}::test_the_guard_filter_of_a_model_of_comfyui_saves_compilations",),
    ),
    "the guard filter of a model of ComfyUI is never on": Fault(
        f"{CLASSIC}:compile_arguments",
        "if not request.use_guard_filter:",
        "if True:",
        (f"{OTHERS}::test_the_guard_filter_of_a_model_of_comfyui_saves_compilations",),
    ),
    "products that cannot be traced break each graph": Fault(
        "ops.compile.compiled_function:CompiledFunction._check_pieces",
        "if any(package in text for text in broken):",
        "if False:",
        (f"{COMPILED}::test_blocks_whose_quantised_products_cannot_be_traced_run_uncompiled",),
    ),
    "the wrapper of the node before stays around a model of ours": Fault(
        "nodes.compile:SpillwayLazyTorchCompile.execute",
        "clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)",
        "pass",
        (f"{OTHERS}::test_the_last_node_of_a_chain_compiles",),
    ),
    "the wrapper of the node before stays around a model of ComfyUI": Fault(
        f"{CLASSIC}:compile_other",
        "clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)",
        "pass",
        (f"{OTHERS}::test_the_last_node_of_a_chain_compiles",),
    ),
    # Forwards that cannot run again, and weights that are read outside of their layer's call.
    "a forward that takes frames out of a cache runs again": Fault(
        "ops.lending.repeat:may_repeat",
        "cls = type(module)",
        "return True",
        ("comfyui/patcher/test_repeat_wan.py::test_one_out_of_memory_gives_the_frames_or_raises",),
    ),
    "a weight that is borrowed from an idle layer is not patched": Fault(
        "ops.lending.idle_weight:IdleWeight.lent",
        "yield self.view_of(self._of(tensors[self.bundle.params.index(self.param)]))",
        "yield self.view_of(self.param.source.to(self.device, self.dtype))",
        ("comfyui/patcher/test_reads.py",),
    ),
    "an image encoder's weight is read as its file has it": Fault(
        "ops.lending.idle_weight:IdleWeight.lent",
        "yield self.view_of(self._of(tensors[self.bundle.params.index(self.param)]))",
        "yield self.view_of(self.param.source.to(self.device))",
        (USO,),
    ),
    "an image encoder's weight is read outside of a loan": Fault(
        "ops.lending.idle_weight:IdleWeight.lent", "if kept or self.gives_source:", "if True:", (USO,)
    ),
    "an image encoder computes in the dtype of its file": Fault(
        "patcher.comfyui.model_state:model_dtype",
        'getattr(module, f"{attr}_comfy_model_dtype", None) or parameter.dtype',
        "parameter.dtype",
        (USO,),
    ),
    # Moves, and room for pins.
    "a model is moved in name alone": Fault(
        "patcher.comfyui.device:moved", "copied.load_device = device", "pass", (MOVES,)
    ),
    "the other device is not told": Fault(
        "patcher.comfyui.device:moved", "copied.register_load_device(device)", "pass", (MOVES,)
    ),
    "room is made for a model twice": Fault(
        "patcher.comfyui.patcher:DynamicModelPatcher.load",
        "free_ram(others, self.model_size() - own.pinned_bytes)",
        "free_ram(others, 2 * self.model_size())",
        ("comfyui/patcher/test_patcher.py::test_pins_of_other_models_give_way_to_the_size_of_a_loaded_one",),
    ),
    "no room is made for a model": Fault(
        "patcher.comfyui.patcher:DynamicModelPatcher.load",
        "free_ram(others, self.model_size() - own.pinned_bytes)",
        "pass",
        ("comfyui/patcher/test_patcher.py::test_pins_of_other_models_give_way_to_the_size_of_a_loaded_one",),
    ),
    "buffers stay after sampling": Fault(
        "patcher.comfyui.patcher:DynamicModelPatcher.cleanup",
        "dynamic.free_buffers()",
        "pass",
        ("comfyui/patcher/test_loads.py",),
    ),
}

passes = functools.cache(check_passes)


@pytest.mark.planted
@pytest.mark.skipif(is_fake(), reason="what a device may forgive is planted in tests/comfyui/device")
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(fault):
    """And its tests pass without it."""
    print(check_is_seen(fault))
    passes(fault.tests)
