"""The device that a benchmark computes on: the CPU, or the one that `--device` names."""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

from .pack import ROOT

CPU = "cpu"


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=CPU, help="what computes, by torch's name (default %(default)s)")


def start_device(name: str) -> torch.device:
    """Return the device of that name; the fake one of the tests where the environment asks for it."""
    sys.path.append(str(ROOT / "tests"))
    tests = importlib.import_module("kit.device")
    return tests.device_under_test() or torch.device(name)


def prepare_comfyui() -> None:
    """Do what must be done before ComfyUI looks for its device."""
    importlib.import_module("kit.device").prepare_comfyui()


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != CPU:
        torch.get_device_module(device).synchronize(device)


def used_bytes(device: torch.device) -> int | None:
    """Return the bytes of a device that are taken now, by this process and others; None on a CPU."""
    module = torch.get_device_module(device) if device.type != CPU else None
    if module is None or not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    return int(total - free)
