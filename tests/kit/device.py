"""The device that a process of tests runs on, where `dev.py gpu` names one.

SPILLWAY_TEST_DEVICE=cuda:0   the device
SPILLWAY_FAKE_CUDA=1          torch.cuda is the fake device of tests/fake_device
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not here: what torch reads from the environment must be set first
    import torch

VARIABLE = "SPILLWAY_TEST_DEVICE"
FAKE = "SPILLWAY_FAKE_CUDA"


def is_fake() -> bool:
    return os.environ.get(FAKE, "0") not in ("", "0")


def is_real() -> bool:
    """Say whether the device is a card of this machine, whose kernels are no CPU's."""
    return bool(os.environ.get(VARIABLE, "")) and not is_fake()


def device_under_test() -> torch.device | None:
    """Return the device, with its number, and start the fake one where it is meant. None: the CPU, as ever."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return None
    if is_fake():
        importlib.import_module("fake_device.device").start()
    import torch

    return torch.device(name)
