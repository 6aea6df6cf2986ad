"""What `dev.py test --only device` runs in ComfyUI on the fake device: a process per way of starting ComfyUI.

Imports the standard library alone, as dev.py does.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

COMFYUI = "tests/comfyui"
PARITY = f"{COMFYUI}/loading/test_parity.py"
MANAGED = f"{COMFYUI}/loading/test_managed.py"
DEVICE = f"{COMFYUI}/device"
STAYS = f"{DEVICE}/test_nothing_stays.py"
CACHED = f"{DEVICE}/test_cached_outputs.py"
OUT_OF_MEMORY = f"{DEVICE}/test_out_of_memory.py"
SAVED = f"{DEVICE}/test_saved_formats.py"
PATCHER = f"{COMFYUI}/patcher"
# Whose servers are processes of their own, which run on the CPU or choose the device themselves.
ON_THE_CPU = ("browser", "server")
HERE = Path(__file__).resolve().parents[1] / "comfyui"
# Folders whose tests all run on the device with --slow. A folder that is added is one of them.
FOLDERS = [
    f"{COMFYUI}/{folder.name}"
    for folder in sorted(HERE.iterdir())
    if folder.name not in ("device", *ON_THE_CPU) and any(folder.glob("test_*.py"))
]
# Of them, what a device is most likely to break: where weights lie, who moves them, what makes them and who saves them.
HOST = (
    *(f"{PATCHER}/test_{name}.py" for name in ("loads", "full_card", "other_devices", "patcher")),
    f"{COMFYUI}/patches/test_lora.py",
    f"{COMFYUI}/nodes/test_memory.py",
    f"{COMFYUI}/nodes/test_merge.py",
    f"{COMFYUI}/loading/test_quantised_matmul.py",
    f"{COMFYUI}/loading/test_bad_input.py",
    f"{COMFYUI}/int8",
    f"{COMFYUI}/saving",
    *(f"{COMFYUI}/cache/test_{name}.py" for name in ("disk", "free", "output_cache", "outside_of_nodes")),
    *(f"{COMFYUI}/gguf/test_{name}.py" for name in ("nodes", "other_nodes", "vaes")),
    f"{COMFYUI}/quantise/test_formats.py::test_a_saved_format_is_what_is_multiplied_on_the_fly[fp8_e4m3fn scaled]",
)
# What is decided by the dtype that a device computes in.
IN_16_BIT = tuple(f"{COMFYUI}/{folder}" for folder in ("int8", "saving"))
IN_16_BIT_WITH_DYNAMIC_VRAM = tuple(f"{COMFYUI}/{folder}" for folder in ("patcher", "patches", "nodes", "saving"))
# The slowest of them, each of which has a sister that stays, and what is decided before a device is used.
BUT = (
    f"{PATCHER}/test_patcher.py::test_a_vae_in_tiles",
    f"{PATCHER}/test_other_devices.py::test_select_model_device_gives_a_dynamic_model_on_the_other_device[checkpoint]",
    f"{COMFYUI}/patches/test_lora.py::test_a_lora_gives_comfyuis_latents_at_any_budget",
    f"{COMFYUI}/nodes/test_memory.py::test_a_vae_out_of_memory",
    f"{COMFYUI}/int8/test_int8.py::test_a_layer_of_another_width",
    f"{COMFYUI}/int8/test_int8.py::test_latents_in_int8_are_near",
    f"{COMFYUI}/int8/test_int8.py::test_a_malformed_file",
    f"{COMFYUI}/int8/test_int8.py::test_quantising_needs_no_memory",
    f"{COMFYUI}/saving/test_memory.py",
)


class DeviceRun(NamedTuple):
    """options: of ComfyUI's command line. aimdo: dynamic VRAM, by real comfy-aimdo. quick, slow: arguments of pytest,
    without and with --slow. A run without quick ones is one of --slow alone, and of tests that are named.
    """

    options: str
    aimdo: bool
    quick: tuple[str, ...]
    slow: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SPILLWAY_FAKE_CUDA": "1",
            "SPILLWAY_TEST_AIMDO": str(int(self.aimdo)),
            "SPILLWAY_COMFYUI_OPTIONS": self.options,
        }


# The longest first. A real T5 takes a minute and is no other code than CLIP.
RUNS = {
    "device, fp32": DeviceRun(
        "--force-fp32",
        False,
        (DEVICE, PARITY, *HOST, *(f"--deselect={name}" for name in BUT), "-k", "not t5"),
        (DEVICE, *FOLDERS),
    ),
    "device, dynamic VRAM": DeviceRun(
        "--force-fp32",
        True,
        (STAYS, CACHED, SAVED, PARITY, f"{MANAGED}::test_a_state_dict_of_another_pack_is_managed", "-k", "not t5"),
        (DEVICE, PARITY, MANAGED),
    ),
    # As most users have it.
    "device, dynamic VRAM, 16 bit": DeviceRun(
        "", True, (OUT_OF_MEMORY,), (OUT_OF_MEMORY, *IN_16_BIT_WITH_DYNAMIC_VRAM)
    ),
    "device, 16 bit": DeviceRun("", False, (PARITY, "-k", "not t5"), (DEVICE, PARITY, *IN_16_BIT)),
}
