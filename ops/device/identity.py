"""Names a device, its driver and the versions that use it: what is remembered about one holds for no other."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def identity(device: torch.device) -> str:
    """Return one line: the device's name and number, its driver, torch, comfy-aimdo and this pack, with versions."""
    parts = [
        f"{device_name(device)} ({device})",
        f"driver {driver_version(device)}",
        f"torch {torch.__version__}",
        f"comfy-aimdo {installed('comfy-aimdo')}",
        f"Spillway {pack_version()}",
    ]
    return ", ".join(parts)


def device_name(device: torch.device) -> str:
    """Return the name that the driver gives the device, or its type."""
    module = getattr(torch, device.type, None)
    properties = getattr(module, "get_device_properties", None)
    return str(properties(device).name) if properties is not None else device.type


def driver_version(device: torch.device) -> str:
    """Return the driver's version as far as it can be asked, with the runtime that torch was built for."""
    if device.type == "xpu":
        return str(torch.xpu.get_device_properties(device).driver_version)
    if device.type != "cuda":
        return "unknown"
    if torch.version.hip is not None:
        return f"{_amd_driver()}, ROCm {torch.version.hip}"
    return f"{_nvidia_driver()}, CUDA {torch.version.cuda}"


@functools.cache
def _nvidia_driver() -> str:
    """Ask NVML, which every NVIDIA driver brings."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return "unknown"
    try:
        known = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0
    finally:
        nvml.nvmlShutdown()
    return text.value.decode(errors="replace") if known else "unknown"


def _amd_driver() -> str:
    try:
        return Path("/sys/module/amdgpu/version").read_text(encoding="utf-8").strip()
    except OSError:  # the kernel's own driver has the kernel's version, and Windows has no such file
        return "unknown"


@functools.cache
def pack_version() -> str:
    """Return the version in pyproject.toml."""
    try:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r'^version = "(.*)"', text, re.MULTILINE)
    return found[1] if found else "unknown"


def installed(name: str) -> str:
    """Return the version of an installed package, or none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
