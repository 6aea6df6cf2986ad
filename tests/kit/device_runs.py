"""What `dev.py test --only device` runs in ComfyUI on the fake device: a process per way of starting ComfyUI.

Imports the standard library alone, as dev.py does.
"""

from __future__ import annotations

from typing import NamedTuple

COMFYUI = "tests/comfyui"
PARITY = f"{COMFYUI}/loading/test_parity.py"
DEVICE = f"{COMFYUI}/device"
STAYS = f"{DEVICE}/test_nothing_stays.py"
# Folders whose tests all run on the device with --slow.
FOLDERS = [f"{COMFYUI}/{folder}" for folder in ("patcher", "patches", "nodes", "int8", "loading", "saving")]


class DeviceRun(NamedTuple):
    """options: of ComfyUI's command line. aimdo: dynamic VRAM, by real comfy-aimdo. quick, slow: arguments of pytest,
    without and with --slow.
    """

    options: str
    aimdo: bool
    quick: tuple[str, ...]
    slow: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SPILLWAY_FAKE_CUDA": "1",
            "SPILLWAY_FAKE_AIMDO": str(int(self.aimdo)),
            "SPILLWAY_COMFYUI_OPTIONS": self.options,
        }


# The longest first. A real T5 takes a minute and is no other code than CLIP.
RUNS = {
    "device, fp32": DeviceRun("--force-fp32", False, (DEVICE, PARITY, "-k", "not t5"), (DEVICE, *FOLDERS)),
    "device, dynamic VRAM": DeviceRun("--force-fp32", True, (STAYS, PARITY, "-k", "not t5"), (DEVICE, PARITY)),
    "device, 16 bit": DeviceRun("", False, (PARITY, "-k", "not t5"), (DEVICE, PARITY)),
}
