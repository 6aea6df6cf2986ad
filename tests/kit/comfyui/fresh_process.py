"""Run a script of the folder `processes` in a process of its own, with nothing in it but what the script imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kit.comfyui.start import BASE, COMFYUI, ROOT
from kit.limited import inside

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")


def run_script(name, *arguments, around=None, **variables):
    """Give a script ComfyUI, the pack, the folder of models and the arguments. Return the JSON that it prints last.

    around: a control group to run it in. variables: of its environment.
    """
    command = [sys.executable, Path(__file__).parent / "processes" / name, COMFYUI, ROOT, BASE, *arguments]
    done = subprocess.run(
        inside(around, command),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", **variables},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run_with_lora(path, lora_path, **options):
    """Run a model once with a LoRA; lora_run.py says what the options are, and what comes back."""
    return run_script("lora_run.py", path, lora_path, json.dumps(options))
