"""Simulated devices follow one another under one name. What the engine keeps of a device must not outlive it."""

import torch

from spillway.ops.vbar import cap
from spillway.ops.vbar import software as software_vbar


def forget(device: torch.device) -> None:
    """Forget the memory and the VBARs of earlier devices of that name, which a cycle may still hold."""
    software_vbar._devices.pop(device, None)
    for vbar in [vbar for vbar in cap._open if vbar.backend.device == device]:
        cap.closed(vbar)
