"""ComfyUI on the device under test, as its main.py would start it on a card.

SPILLWAY_FAKE_CUDA=1           the fake device
SPILLWAY_TEST_DEVICE=cuda:0    a real one
SPILLWAY_TEST_AIMDO=1          dynamic VRAM: real comfy-aimdo, the release that is installed, on the device's driver
SPILLWAY_COMFYUI_OPTIONS       command line options of ComfyUI, for example "--force-fp32 --gpu-only"
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kit.device import VARIABLE, is_fake

AIMDO = "SPILLWAY_TEST_AIMDO"
OPTIONS = "SPILLWAY_COMFYUI_OPTIONS"


def wants_aimdo() -> bool:
    return os.environ.get(AIMDO, "0") not in ("", "0")


def prepare() -> bool:
    """Does what must be done before ComfyUI looks for a device. False where this process is to use the CPU.

    torch must not have been imported where the device is a real one: both comfy-aimdo and the choice of torch's
    allocator would come too late.
    """
    if is_fake():
        return _prepare_fake()
    if not os.environ.get(VARIABLE, ""):
        return False
    read_options()
    if wants_aimdo():
        import comfy_aimdo.control

        if not comfy_aimdo.control.init():
            raise RuntimeError("comfy-aimdo does not load")
    import cuda_malloc  # noqa: F401 - ComfyUI's choice of torch's allocator

    return True


def _prepare_fake() -> bool:
    from fake_device.device import start

    start()
    read_options()
    import comfy_kitchen

    for backend in ("cuda", "triton"):  # their kernels call the real driver
        comfy_kitchen.registry.disable(backend)
    if wants_aimdo():
        import comfy_aimdo.control

        # Before its other modules: each takes the library once, when it is imported.
        if not comfy_aimdo.control.init("cuda"):
            raise RuntimeError("comfy-aimdo does not load")
    return True


def read_options() -> None:
    """Lets ComfyUI take its options from the variable, as main.py takes them from the command line."""
    import comfy.options

    comfy.options.enable_args_parsing()
    before, sys.argv = sys.argv, ["main.py", *os.environ.get(OPTIONS, "").split()]
    try:
        import comfy.cli_args
    finally:
        sys.argv = before


def finish() -> None:
    """Turns dynamic VRAM on. What ComfyUI loads has its classic patcher all the same, as every picture is compared with
    that one's: a dynamic one rounds patched weights otherwise. `comfyuis_dynamic_models` gives its dynamic one.
    """
    if not wants_aimdo():
        return
    import comfy.controlnet
    import comfy.memory_management
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import comfy_aimdo.control

    devices = [device.index for device in comfy.model_management.get_all_torch_devices()]
    if not comfy_aimdo.control.init_devices(devices):
        raise RuntimeError("comfy-aimdo does not initialise the device")
    comfy_aimdo.control.set_log_critical()
    comfy.memory_management.aimdo_enabled = True
    for owner, name in (
        (comfy.sd, "load_diffusion_model_state_dict"),
        (comfy.sd, "load_state_dict_guess_config"),
        (comfy.sd, "load_text_encoder_state_dicts"),
        (comfy.sd.VAE, "__init__"),
        (comfy.controlnet, "load_controlnet_state_dict"),
        (comfy.utils, "load_torch_file"),
    ):
        setattr(owner, name, _classic_at_once(getattr(owner, name)))


def _classic_at_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """Lets models with a classic patcher have their weights in the model's dtype, as they do without dynamic VRAM. With
    it, ComfyUI leaves a cast to a dynamic patcher, and an fp32 file ends in an error where it computes in fp16.
    """

    @functools.wraps(load)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import comfy.model_patcher

        if comfy.model_patcher.CoreModelPatcher is not comfy.model_patcher.ModelPatcher:
            return load(*args, **kwargs)
        with weights_at_once():
            return load(*args, **kwargs)

    return wrapped


@contextmanager
def comfyuis_dynamic_models() -> Iterator[None]:
    """Lets what ComfyUI loads be what it is to users: dynamic where dynamic VRAM is on."""
    import comfy.model_patcher

    before = comfy.model_patcher.CoreModelPatcher
    if wants_aimdo():
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    try:
        yield
    finally:
        comfy.model_patcher.CoreModelPatcher = before


@contextmanager
def weights_at_once() -> Iterator[None]:
    """Lets ComfyUI's layers have weights when they are made. With dynamic VRAM on they get theirs from a file."""
    import comfy.memory_management

    enabled = comfy.memory_management.aimdo_enabled
    comfy.memory_management.aimdo_enabled = False
    try:
        yield
    finally:
        comfy.memory_management.aimdo_enabled = enabled
