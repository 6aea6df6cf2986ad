"""What `dev.py test --only device` runs in ComfyUI on the fake device: a process per way of starting ComfyUI.

Imports the standard library alone, as dev.py does.
"""

from __future__ import annotations

from typing import NamedTuple

COMFYUI = "tests/comfyui"
PARITY = f"{COMFYUI}/loading/test_parity.py"
DEVICE = f"{COMFYUI}/device"


class DeviceRun(NamedTuple):
    """options: of ComfyUI's command line. aimdo: dynamic VRAM, by real comfy-aimdo. arguments: of pytest."""

    options: str
    aimdo: bool
    arguments: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "SPILLWAY_FAKE_CUDA": "1",
            "SPILLWAY_FAKE_AIMDO": str(int(self.aimdo)),
            "SPILLWAY_COMFYUI_OPTIONS": self.options,
        }


# The longest first. A real T5 takes a minute and is no other code than CLIP.
RUNS = {
    "device, fp32": DeviceRun("--force-fp32", False, (DEVICE, PARITY, "-k", "not t5")),
    "device, dynamic VRAM": DeviceRun("--force-fp32", True, (PARITY, "-k", "not t5")),
    "device, 16 bit": DeviceRun("", False, (PARITY, "-k", "not t5")),
}
