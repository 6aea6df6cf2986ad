"""Run a model that has no room for weights, and print the peak of this process.

peak_memory.py FILE DEPTH WIDTH DTYPE
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from kit.nets import Stack, dynamic


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def main(path, depth, width, dtype):
    depth, width, dtype = int(depth), int(width), getattr(torch, dtype)

    def build():
        return Stack(depth, width, lambda width: torch.nn.Linear(width, width))

    torch.nn.Linear(width, width, dtype=dtype)(torch.ones(2, width, dtype=dtype))  # what torch itself needs
    model = dynamic(build, path, dtype, vram_bytes=0)
    x = model.module.input().to(dtype)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    outputs = [model(x) for _ in range(2)]
    peak = status("VmHWM") - before
    print(json.dumps({"peak": peak, "weights": model.total_bytes, "finite": bool(outputs[-1].isfinite().all())}))


main(*sys.argv[1:])
