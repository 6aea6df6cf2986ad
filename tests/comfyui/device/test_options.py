"""ComfyUI's options for memory, a process for each: the latents are those of its own loaders under the same one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.comfyui.on_device import OPTIONS, wants_aimdo

PARITY = Path(__file__).parents[1] / "loading" / "test_parity.py"
CHOICE = "(latents_within and flux and 0.25) or (latents_within and flux and 1.0) or (pictures and flux_vae and 0.25)"
SETS = (
    "--highvram",
    "--novram",
    "--gpu-only",
    "--disable-dynamic-vram --lowvram",
    "--disable-pinned-memory --disable-async-offload",
    "--async-offload 1 --reserve-vram 1",
)
# This folder on sys.path would hide ComfyUI's `nodes`.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
ONCE = "--force-fp32" in os.environ.get(OPTIONS, "") and not wants_aimdo()


@pytest.mark.skipif(not ONCE, reason="runs in one of the processes, where ComfyUI computes in fp32")
@pytest.mark.parametrize("options", SETS)
def test_latents_are_comfyuis_under(options):
    command = [sys.executable, "-c", PYTEST]
    done = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore", str(PARITY), "-k", CHOICE],
        env={**os.environ, OPTIONS: f"--force-fp32 {options}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        pytest.fail(f"pytest ended with code {done.returncode}\n{(done.stdout + done.stderr)[-8000:]}", pytrace=False)
