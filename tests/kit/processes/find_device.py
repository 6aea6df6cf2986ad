"""Print, as JSON, the first accelerator that torch can compute on, or why there is none."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kit.device import VARIABLE, device_under_test


def found() -> dict:
    device = device_under_test()
    if device is None:
        kinds = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
        kinds += ["mps"] * torch.backends.mps.is_available()
        if not kinds:
            built = torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None)
            what = f"torch {torch.__version__} " + ("finds no device" if built else "is a build for the CPU alone")
            return {"none": what}
        device = torch.device(kinds[0], 0) if kinds[0] != "mps" else torch.device("mps")
    torch.ones(1, device=device)  # it is there, and computes
    return {"device": str(device), "torch": torch.__version__, "fake": VARIABLE in os.environ}


print(json.dumps(found()))
