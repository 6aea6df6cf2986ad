"""Run into the limits of a process (`ulimit -v`, `ulimit -d`). Print what came of it, as JSON.

refused_memory.py FOLDER
"""

import json
import mmap
import resource
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import nn

import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.cache.output_cache import OutputCache
from spillway.ops.device.backend import backend_for
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.read_whole import read_whole
from spillway.ops.ram import shortage
from spillway.ops.ram.available import available_ram, total_ram
from spillway.ops.ram.process_limits import process_limits
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

MIB = 1 << 20
folder, said = Path(sys.argv[1]), {}


def sparse(path, nbytes):
    """Write a file of one tensor of zeros that takes no room on the disk."""
    head = json.dumps({"x": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + nbytes)
    return path


def used(place):
    return int(Path("/proc/self/statm").read_text().split()[place]) * mmap.PAGESIZE


def limited(kind, nbytes):
    """Let this process have that much more than it has."""
    base = used(0 if kind == resource.RLIMIT_AS else 5)
    resource.setrlimit(kind, (base + nbytes, resource.RLIM_INFINITY))


def unlimited():
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def attempt(name, make):
    try:
        result = make()
        said[name] = "done" if result is None else result
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"


class Wide(nn.Module):
    """One layer whose result, and nothing else, is large."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 4096, bias=False)

    def forward(self, x):
        return self.layer(x)


torch.set_grad_enabled(False)
small, large = sparse(folder / "small.safetensors", 64 * MIB), sparse(folder / "large.safetensors", 600 * MIB)
wide = Wide()
model = DynamicModel(wide, policy=Policy(headroom_bytes=0))
model(torch.zeros(1, 64))  # threads and kernels, which take addresses once

limited(resource.RLIMIT_AS, 200 * MIB)
ram = available_ram()
said["addresses"] = [ram.available // MIB, total_ram() == ram.total, ram.in_words(), ram.remedy]
attempt("map", lambda: DiskMap(large) and None)
attempt("read", lambda: read_whole(large) and None)  # too large for that part of the memory: it is mapped
attempt("weight", lambda: backend_for("cpu").empty(400 * MIB) is None)
attempt("forward", lambda: model(torch.zeros(100 * MIB // 4096, 64)) is None)
attempt("smaller forward", lambda: model(torch.zeros(10, 64)) is None)
attempt("small map", lambda: DiskMap(small) and None)

unlimited()
cache = OutputCache(0)
for number in range(8):
    image = torch.zeros(32 * MIB, dtype=torch.uint8)
    cache.put(number, image, image, seconds=number, kind=f"Image{number}")
del image
limited(resource.RLIMIT_AS, 16 * MIB)
attempt("small map after images", lambda: DiskMap(small) and None)
said["cache"] = [len(cache.entries), list(cache.ledger.decisions)[-1]]
other = threading.Thread(target=cache.lock.acquire)
other.start(), other.join()
attempt("cached", lambda: shortage.give_way(1))

unlimited()
limited(resource.RLIMIT_DATA, 100 * MIB)
said["private"] = [available_ram().available // MIB, available_ram().reason, [one.option for one in process_limits()]]
attempt("large map", lambda: DiskMap(large).read_only)
attempt("map of more than half", lambda: DiskMap(small).read_only)
attempt("small map to write in", lambda: DiskMap(sparse(folder / "tiny.safetensors", MIB)).read_only)
attempt("private weight", lambda: backend_for("cpu").empty(400 * MIB) is None)
print(json.dumps(said))
