"""Faults that a CPU forgives, planted one at a time: on this device a test in ComfyUI fails for each.

The engine's are in tests/lending/test_planted_faults.py, with that of readers, which only hangs here. Both run with
`dev.py test --slow`.
"""

import functools

import pytest

from kit.comfyui.dynamic_vram import software
from kit.planting import Fault, check_is_seen, check_passes

CASTER = "ops.lending.device_caster:DeviceCaster"
HERE = "comfyui/device/test_half_resident.py"
LORAS = f"{HERE}::test_loras_come_and_go"
HEED = "patcher.comfyui.flags:heed_flags"
FLAGS = "comfyui/device/test_flags.py"

FAULTS = {
    "memory is filled that kernels may still read": Fault(
        "ops.lending.reading:_start", "backend.wait(event, stream)", "pass", (LORAS,)
    ),
    "nobody waits for a transfer": Fault(f"{CASTER}.complete", "self.backend.wait(loan.event, None)", "pass", (LORAS,)),
    "what is not made yet is written back": Fault(
        "ops.lending.write_backs:WriteBacks.begin",
        "self.backend.wait(self.backend.record(None), stream)",
        "pass",
        (LORAS,),
    ),
    "buffers stay where they are": Fault(
        "patcher.dynamic_model:DynamicModel.place_buffers",
        "self._placed.place()",
        "pass",
        (f"{HERE}::test_buffers_are_on_the_device_while_a_model_is_loaded",),
    ),
    "a patch on the CPU": Fault(
        "patcher.comfyui.patches.weight_patch:WeightPatch.__call__",
        "return weight",
        "return weight.cpu()",
        (f"{HERE}::test_patches_are_made_on_the_device",),
    ),
    "the limit is ignored": Fault(
        "ops.vbar.software:SoftwareVBAR.set_limit",
        "self.limit = nbytes",
        "self.limit = None",
        (f"{HERE}::test_a_budget_is_kept_and_followed",),
    ),
    "more is free than there is": Fault(
        "patcher.comfyui.patcher:DynamicModelPatcher.get_free_memory",
        "dynamic = self.state.dynamic",
        "return 1 << 60",
        ("comfyui/device/test_full_device.py::test_conditions_are_batched_where_the_estimate_of_both_fits",),
    ),
    "nothing is loaded again": Fault(
        "patcher.comfyui.patcher:DynamicModelPatcher.partially_load",
        "before = self.loaded_size()",
        "before = self.loaded_size()\n        if before:\n            return 0",
        (f"{HERE}::test_each_clone_has_its_own_patches",),
    ),
    "an image encoder's weight is read where it lies": Fault(
        "ops.lending.idle_weight:IdleWeight.lent",
        "if kept or self.gives_source:",
        "if True:",
        ("comfyui/loading/test_companions.py::test_uso_gives_comfyuis_latents[small fp32]",),
    ),
    # ComfyUI's own options.
    "streams that were turned off": Fault(HEED, "backend.streams = 0", "pass", (f"{FLAGS}::test_streams",)),
    "more streams than were asked for": Fault(
        HEED, "min(backend.streams, args.async_offload)", "backend.streams", (f"{FLAGS}::test_streams",)
    ),
    "memory is locked all the same": Fault(
        HEED, 'not getattr(args, "disable_pinned_memory", False)', "True", (f"{FLAGS}::test_page_locking",)
    ),
    "reserved memory is used": Fault(
        HEED, "backend.reserved = int(args.reserve_vram * GIB)", "pass", (f"{FLAGS}::test_reserved_vram",)
    ),
    "what ComfyUI has locked is not counted": Fault(
        "patcher.comfyui.flags:room_beside_comfyui",
        ' - getattr(management, "TOTAL_PINNED_MEMORY", 0)',
        "",
        (f"{FLAGS}::test_pins_leave_what_comfyui_has_locked",),
    ),
}

# comfy-aimdo has a limit of its own. With dynamic VRAM, ComfyUI has the encoder use its file's weights where they lie.
WITHOUT_AIMDO = dict.fromkeys(("the limit is ignored", "an image encoder's weight is read where it lies"), software)

passes = functools.cache(check_passes)


@pytest.mark.planted
@pytest.mark.parametrize(
    "fault", [pytest.param(fault, id=name, marks=WITHOUT_AIMDO.get(name, ())) for name, fault in FAULTS.items()]
)
def test_a_planted_fault_is_seen(fault):
    """And its tests pass without it."""
    print(check_is_seen(fault))
    passes(fault.tests)
