"""ComfyUI's server on the fake device: python serve_on_fake_device.py ARGUMENTS OF COMFYUI, in ComfyUI's folder."""

import os
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[3]

sys.path[:] = [os.getcwd(), *sys.path[1:], str(TESTS)]
os.environ["SPILLWAY_FAKE_CUDA"] = "1"
os.environ["SPILLWAY_COMFYUI_OPTIONS"] = " ".join(sys.argv[1:])

from kit.comfyui import on_device

on_device.prepare()
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
