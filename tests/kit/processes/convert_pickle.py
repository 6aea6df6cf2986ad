"""Convert a pickle of a size, and print the peak of this process meanwhile.

convert_pickle.py FOLDER MEGABYTES
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.pickles.convert import convert


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def main(folder, megabytes):
    folder, rows = Path(folder), 2500
    weight = torch.arange(rows * 1000, dtype=torch.float32).view(rows, 1000)  # 10 MB
    tensors = {f"layer.{index}.weight": weight + index for index in range(int(megabytes) // 10 + 1)}
    torch.save({"state_dict": tensors}, folder / "m.ckpt")
    del tensors
    torch.save({"a": weight[:2]}, folder / "first.ckpt")
    convert(folder / "first.ckpt")  # what the code itself needs
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    converted = convert(folder / "m.ckpt")
    peak = status("VmHWM") - before
    last = DiskMap(converted.path).tensor(f"layer.{int(megabytes) // 10}.weight")
    right = torch.equal(last, weight + int(megabytes) // 10)
    print(json.dumps({"peak": peak, "file": converted.nbytes, "same": right}))


main(*sys.argv[1:])
