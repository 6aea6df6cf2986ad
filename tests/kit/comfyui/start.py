"""Find ComfyUI and import it in this process, with folders of its own. MISSING says why that failed, or is None.

Import this before torch is first used. MKL picks its kernels at its first call, and without MKL_CBWR=AUTO an fp32
product would depend on the alignment of its buffers, so that no test could compare bit for bit.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from cuda_sim import Unavailable
from kit.comfyui import on_device
from kit.find_comfyui import WrongVariable, find_comfyui
from kit.pack import ROOT

THREADS = 2

os.environ["MKL_CBWR"] = "AUTO"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = str(THREADS)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost several times as much on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def _put_first_on_path(comfyui):
    """Let ComfyUI's own top-level modules (`nodes`, `server`, ...) win over anything in this repository."""

    def keep(entry):
        try:
            return Path(entry).resolve() not in (ROOT, comfyui)
        except OSError:
            return True

    sys.path[:] = [str(comfyui), *filter(keep, sys.path)]
    known = sys.modules.get("nodes")
    if known is not None and Path(getattr(known, "__file__", None) or "/").resolve().parent != comfyui:
        raise pytest.UsageError(f"a module named `nodes` that is not ComfyUI's is already imported: {known!r}")


def _import(comfyui, base):
    """Import ComfyUI the way `main.py --cpu` would set it up, or on the device under test.

    Returns None, or why it cannot be imported.
    """
    try:
        has_device = on_device.prepare()
        import comfy.cli_args
    except ImportError as error:
        return f"{comfyui} cannot be imported with {sys.executable}: {error}"
    comfy.cli_args.args.cpu = not has_device
    comfy.cli_args.args.base_directory = str(base)  # models, input, output, temp and user folders
    try:
        import comfy.sample
        import comfy.sd
        import folder_paths
        import torch

        # Before ComfyUI's `nodes`, as main.py does: that puts a folder first on sys.path which has another utils.
        import utils.extra_config  # noqa: F401
    except ImportError as error:
        return f"{comfyui} cannot be imported with {sys.executable}: {error}"

    if has_device:
        on_device.finish()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)  # this also fills torch.empty with NaN
    for folders, _extensions in folder_paths.folder_names_and_paths.values():
        for folder in folders:
            if Path(folder).is_relative_to(base):
                os.makedirs(folder, exist_ok=True)
    for folder in (
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
        folder_paths.get_input_directory(),
        folder_paths.get_user_directory(),
    ):
        os.makedirs(folder, exist_ok=True)

    from kit.comfyui import checkpoints

    checkpoints.accept_small_lumina()
    return None


BASE = COMFYUI = None
NO_DEVICE = False  # the fake device is wanted, and this machine cannot build it
try:
    COMFYUI = find_comfyui()
    MISSING = "no ComfyUI found: set COMFYUI_PATH, or install the pack in ComfyUI's custom_nodes"
except WrongVariable as _error:
    MISSING = str(_error)
if COMFYUI is not None:
    COMFYUI = COMFYUI.resolve()
    _put_first_on_path(COMFYUI)
    BASE = Path(tempfile.mkdtemp(prefix="spillway-comfyui-"))
    atexit.register(shutil.rmtree, BASE, ignore_errors=True)  # up to some GB: never left to pytest's kept folders
    try:
        MISSING = _import(COMFYUI, BASE)
    except Unavailable as _reason:
        MISSING, NO_DEVICE = f"the fake device: {_reason}", True
if MISSING and not NO_DEVICE and os.environ.get("SPILLWAY_REQUIRE_HOST", "0") not in ("", "0"):
    raise pytest.UsageError(f"SPILLWAY_REQUIRE_HOST is set, but {MISSING}")
