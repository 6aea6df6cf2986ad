"""Load one release of comfy-aimdo on the simulated driver. Once in a process: it cannot be started twice."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from spillway.ops.vbar.protocol import lock

from .sim import POISON, Driver, load_driver
from .wheels import package

# Which release the tests of this process run on.
VARIABLE = "SPILLWAY_SIM_AIMDO"

MIB = 1 << 20
PAGE = 32 * MIB
# What comfy-aimdo keeps free of what the driver reports.
HEADROOM = 256 * MIB


def version_under_test() -> str | None:
    """The release that this process is to test; None for a process without comfy-aimdo."""
    return os.environ.get(VARIABLE)


class Aimdo:
    """comfy-aimdo on the driver.

    unlocked: where native VBAR code was called without the engine's lock, which crashes once two threads do it.
    """

    def __init__(self, version: str, capacity: int) -> None:
        self.version = version
        self.release = tuple(int(part) for part in version.split("."))
        self.driver: Driver = load_driver()
        # It reads the capacity once, when it is initialised.
        self.driver.set(capacity=capacity, poison=POISON)
        sys.path.insert(0, str(package(version)))
        self.control: Any = importlib.import_module("comfy_aimdo.control")
        if not self.control.init("cuda"):
            raise RuntimeError(f"comfy-aimdo {version} does not load")
        self.control.set_log_critical()
        if not self.control.init_devices([0]):
            raise RuntimeError(f"comfy-aimdo {version} does not initialise the simulated device")
        self.unlocked: list[str] = []
        self._watch_lock(importlib.import_module("comfy_aimdo.model_vbar").lib)
        # Called with (address, bytes) of every tensor that is made of VBAR memory.
        self.on_tensor: Callable[[int, int], None] = lambda address, nbytes: None
        importlib.import_module("comfy_aimdo.torch").get_tensor_from_raw_ptr = self._tensor

    def _watch_lock(self, library: Any) -> None:
        for name in ("allocate", "fault", "unpin", "prioritize", "deprioritize", "free", "free_memory", "loaded_size"):
            self._watch(library, f"vbar_{name}")
        for name in ("get_residency", "get_nr_pages", "get_watermark", "get"):
            self._watch(library, f"vbar_{name}")

    def _watch(self, library: Any, name: str) -> None:
        native = getattr(library, name)

        def watched(*arguments: Any) -> Any:
            if not lock._is_owned():  # type: ignore[attr-defined]
                self.unlocked.append(f"{name} was called without the lock:\n{''.join(traceback.format_stack(limit=6))}")
            return native(*arguments)

        setattr(library, name, watched)

    def _tensor(self, address: int, nbytes: int, device: torch.device) -> torch.Tensor:
        self.on_tensor(address, nbytes)
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)

    def poll(self) -> None:
        """Make it ask the driver for free memory at its next call, not up to two seconds later.

        The time of its last question is in its device context, as milliseconds since 1970, within the first 96 bytes.
        """
        now = int(time.time() * 1000)
        for context in self.control.devctxs:
            for offset in range(8, 96, 8):
                word = ctypes.c_uint64.from_address(context + offset)
                if now - 86_400_000 < word.value <= now + 1000:
                    word.value = 0

    def others_take(self, nbytes: int) -> None:
        """Other processes hold that much of the device from now on, and comfy-aimdo notices."""
        self.driver.set(others=nbytes)
        self.poll()


_aimdo: Aimdo | None = None


def load_aimdo(version: str, capacity: int) -> Aimdo:
    """comfy-aimdo of this process, on a device of that capacity. Raises Unavailable where it cannot be had."""
    global _aimdo
    if _aimdo is None:
        _aimdo = Aimdo(version, capacity)
    if _aimdo.version != version or _aimdo.driver.get("capacity") != capacity:
        raise RuntimeError("one release and one capacity for each process: comfy-aimdo cannot be started twice")
    return _aimdo
