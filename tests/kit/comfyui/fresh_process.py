"""Runs a script of this folder in a process of its own, with nothing in it but what the script imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import BASE, COMFYUI, ROOT


def run_script(name, *arguments):
    """What the script prints last, as JSON. It is given ComfyUI, the pack, the folder of models, and the arguments."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(name), COMFYUI, ROOT, BASE, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
