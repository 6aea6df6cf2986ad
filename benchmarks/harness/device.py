"""The device that a benchmark computes on: the CPU, or the one that `--device` names."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING

from .pack import ROOT

if TYPE_CHECKING:  # not here, as a contestant may have to do something before torch is imported
    import torch

CPU = "cpu"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=CPU, help="what computes, by torch's name (default %(default)s)")


def start_device(name: str) -> torch.device:
    """Return the device of that name; the fake one of the tests where the environment asks for it."""
    import torch

    sys.path.append(str(ROOT / "tests"))
    tests = importlib.import_module("kit.device")
    return tests.device_under_test() or torch.device(name)


def prepare_comfyui(device: str, dynamic_vram: bool, card_bytes: int | None) -> None:
    """Do what must be done before ComfyUI looks for its device, and before torch is imported.

    card_bytes: what the card is to be said to have in all.
    """
    os.environ["SPILLWAY_TEST_DEVICE"] = device
    os.environ["SPILLWAY_TEST_AIMDO"] = str(int(dynamic_vram))
    if not dynamic_vram:
        os.environ["SPILLWAY_COMFYUI_OPTIONS"] = "--disable-dynamic-vram"
    importlib.import_module("kit.comfyui.on_device").prepare()
    if card_bytes is not None:
        import torch

        real = torch.cuda.mem_get_info
        torch.cuda.mem_get_info = lambda device=None: (real(device)[0], card_bytes)


def finish_comfyui() -> None:
    """Do what ComfyUI's main.py does once ComfyUI is imported."""
    import comfy.model_patcher

    on_device = importlib.import_module("kit.comfyui.on_device")
    on_device.finish()
    if on_device.wants_aimdo():
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != CPU:
        import torch

        torch.get_device_module(device).synchronize(device)


def used_bytes(device: torch.device) -> int | None:
    """Return the bytes of a device that are taken now, by this process and others; None on a CPU."""
    import torch

    module = torch.get_device_module(device) if device.type != CPU else None
    if module is None or not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    return int(total - free)
